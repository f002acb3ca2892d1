"""Rows of single tokens, trained by PEFT's trainable tokens: they replace the base's rows."""

from collections.abc import Mapping
from typing import Any

from peftchat.merging.adapter import ADAPTER, Site
from peftchat.merging.fold.change import Change, Read, Rows


def layer_of(site: Site) -> Any:
    """PEFT's token layer of a site, None if it is a site of another kind."""
    from peft.tuners.trainable_tokens.layer import TrainableTokensLayer
    from peft.utils.other import TrainableTokensWrapper

    layer = site.module.token_adapter if isinstance(site.module, TrainableTokensWrapper) else site.module
    return layer if isinstance(layer, TrainableTokensLayer) else None


def rule(site: Site, read: Read) -> Mapping[str, Change] | None:
    """Token rows beside another method, or trained alone; on the embedding, on the head, or on both through a tie."""
    rows = rows_of(site)
    return None if rows is None else {f"{site.path}.weight": rows}


def rows_of(site: Site) -> Rows | None:
    """The trained rows of a site, None if it is a site of another kind."""
    layer = layer_of(site)
    if layer is None:
        return None
    return Rows(tuple(layer.token_indices[ADAPTER]), layer.trainable_tokens_delta[ADAPTER].detach())
