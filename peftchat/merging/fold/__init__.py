"""One rule a kind of layer: what an adapter makes of the parameters of one module.

`changes_of` asks the rules in turn; the last one takes everything, by PEFT's own `merge` on that module alone. A rule
of its own pays where weights can be folded row by row, which keeps memory below one tensor: plain LoRA, DoRA and the
rows of new tokens, which are nearly all of what is trained.
"""

from collections.abc import Callable, Mapping

from peftchat.merging.adapter import Adapter, Site
from peftchat.merging.fold import dora, low_rank, saved_module, token_rows, whole_layer
from peftchat.merging.fold.change import Change, Read

Rule = Callable[[Site, Read], Mapping[str, Change] | None]
"""A site and a reader of base parameters -> the changed parameters, or None where the rule does not apply."""

RULES: tuple[Rule, ...] = (
    token_rows.rule,
    saved_module.rule,
    low_rank.rule,
    dora.rule,
    whole_layer.rule,
)


def changes_of(adapter: Adapter, read: Read) -> dict[str, Change]:
    """Everything that `adapter` changes, by parameter name.

    Args:
        adapter: an installed adapter.
        read: the base's parameter of a name, whole, in float32.
    """
    changes: dict[str, Change] = {}
    for site in adapter.sites:
        changes.update(next(found for rule in RULES if (found := rule(site, read)) is not None))
    changes.update(saved_module.from_file(adapter))
    return changes
