"""Which PEFT methods can become weights, and why the others cannot.

Everything not named here folds: either by a rule of its own or by PEFT's own `merge` on one layer at a time.
"""

from typing import Any

from peftchat.errors import UserError

_PROMPTS = "it trains vectors that are put before the prompt, not weights"
_GATED = "what it adds depends on the input, so no fixed weights do the same"
_CURE_PROMPTS = "Use the run folder as it is: `peftchat chat RUN` loads base and adapter."

REFUSED: dict[str, str] = {
    "PROMPT_TUNING": _PROMPTS,
    "MULTITASK_PROMPT_TUNING": _PROMPTS,
    "P_TUNING": _PROMPTS,
    "PREFIX_TUNING": "it trains keys and values that are put before the prompt's, not weights",
    "CARTRIDGE": "it trains keys and values that are put before the prompt's, not weights",
    "CPT": _PROMPTS,
    "ADAPTION_PROMPT": _GATED,
    "POLY": _GATED,
    "XLORA": _GATED,
    "LILY": _GATED,
    "SHADOW": _GATED,
    "BEFT": "it adds a bias where the model has none",
    "OSF": "its file holds only half of a decomposition of the base, which PEFT makes while it loads",
    "PSOFT": "its file holds only a rotation inside a decomposition of the base that PEFT makes while it loads",
    "FROD": "its file needs a decomposition of all layers of the base at once",
    "ADAMSS": "its file needs a clustering of the base's weights that PEFT makes while it loads",
}
"""PEFT type -> why it is not folded tensor by tensor."""

_IN_MEMORY = frozenset({"OSF", "PSOFT", "FROD", "ADAMSS"})

RESIDUAL_INITS = frozenset({"pissa", "olora"})
"""LoRA initialisations that took their start out of the base: what was trained is `base - start + adapter`. The start
is a fixed function of the base and is computed again, a layer at a time."""

_LOST_INITS = ("pissa_niter", "corda", "loftq", "lora_ga")


def refuse_unfoldable(config: Any, where: str) -> None:
    """Raise for an adapter that cannot be folded from its file and the base.

    Args:
        config: a PEFT config.
        where: the adapter, for the message.

    Raises:
        InputError: with the reason and what to do instead.
    """
    kind = str(config.peft_type).rpartition(".")[2].upper()
    if config.is_prompt_learning or kind in REFUSED:
        cure = _CURE_PROMPTS
        if kind in _IN_MEMORY:
            cure = "Load base and adapter with peft and call merge_and_unload, which holds the whole model in memory."
        raise UserError(f"{kind} cannot be merged: {REFUSED.get(kind, _PROMPTS)}", where=where, cure=cure)
    start = getattr(config, "init_lora_weights", None)
    if isinstance(start, str) and start.startswith(_LOST_INITS):
        raise UserError(
            f"the adapter was started with init_lora_weights={start}, which changed the base in a way that its file "
            "does not hold",
            where=where,
            cure="Save the adapter with `path_initial_model_for_weight_conversion`, which makes a plain LoRA of it.",
        )
    if getattr(config, "layer_replication", None):
        raise UserError("it repeats layers of the base, which peft does not merge either", where=where)
