"""Parameters that the adapter's file holds whole.

They are `modules_to_save`, norms trained by LN tuning (Zhao et al., 2023), trained biases and resized embeddings.
"""

from collections.abc import Mapping

from peftchat.merging.adapter import ADAPTER, Adapter, Site
from peftchat.merging.fold.change import Change, Read, Replacement


def rule(site: Site, read: Read) -> Mapping[str, Change] | None:
    """A module with a trained copy, which takes its place."""
    from peft.tuners.ln_tuning.layer import LNTuningLayer
    from peft.utils.other import ModulesToSaveWrapper

    if isinstance(site.module, ModulesToSaveWrapper):
        trained = site.module.modules_to_save[ADAPTER]
    elif isinstance(site.module, LNTuningLayer):
        trained = site.module.ln_tuning_layers[ADAPTER]
    else:
        return None
    return {f"{site.path}.{name}": Replacement(value.detach()) for name, value in trained.named_parameters()}


def from_file(adapter: Adapter) -> dict[str, Change]:
    """Base parameters that lie in the file beside the adapter's own."""
    return {name: Replacement(value) for name, value in adapter.saved.items()}
