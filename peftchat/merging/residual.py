"""Starts that were taken out of the base.

PiSSA and OLoRA begin with factors of the weight itself and train on what is left, `W - start`. An adapter that was
saved as it is belongs to that remainder, which is made again here by PEFT's own code: it is a function of W alone.
"""

import torch

from peftchat.merging.adapter import ADAPTER, Site


def take_out_start(site: Site) -> None:
    """Turn the site's base weights into the remainder the adapter was trained on; keep the trained factors.

    The site's weights must be real, in float32. Sites with any other start stay as they are.
    """
    if not site.start:
        return
    layer = site.module
    trained = {name: value.detach().clone() for name, value in layer.named_parameters() if f".{ADAPTER}." in name}
    if site.start == "pissa":
        layer.pissa_init(ADAPTER, site.start)
    else:
        layer.olora_init(ADAPTER)
    with torch.no_grad():
        for name, value in layer.named_parameters():
            if name in trained:
                value.copy_(trained[name])
