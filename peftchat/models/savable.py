"""What transformers refuses to save, mended before training, and the tokenizer as it is saved for chatting."""

import copy
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import GenerationConfig, PretrainedConfig, PreTrainedTokenizerBase

_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff")
"""Settings that say how to sample, and mean that a model is to be sampled."""

_MODES = ("do_sample", "num_beams", "return_dict_in_generate", "use_cache", "cache_implementation", "suppress_tokens")
"""Settings by which transformers judges the others."""


def mend_generation_settings(config: "PretrainedConfig", generation: "GenerationConfig") -> list[str]:
    """Change generation settings that transformers loads, uses and refuses to save.

    It saves neither sampling settings without `do_sample` nor settings that contradict each other, and no model config
    that holds generation settings. Many published models have one or the other. `GenerationConfig.validate`:
    https://github.com/huggingface/transformers/blob/main/src/transformers/generation/configuration_utils.py

    Sampling settings stand for sampling, so `do_sample` is set, unless it is off explicitly. What else cannot be saved
    is reset. Generation settings of the model config move to the others.

    Args:
        config: the model's config, changed in place.
        generation: its generation settings, changed in place.

    Returns:
        One line for each change.
    """
    notes = _move_from_config(config, generation)
    if generation.temperature == 0:
        # Of all that transformers samples from, the most likely token: it refuses to sample so.
        generation.do_sample = None
        for name in _SAMPLING:
            setattr(generation, name, None)
        notes.append("generation_config.json: temperature 0 is saved as no sampling, which is the same.")
    if _is_savable(generation):
        return notes
    sampling = {name: value for name in _SAMPLING if (value := _own_value(generation, name)) is not None}
    if sampling and generation.do_sample is None:
        generation.do_sample = True
        given = ", ".join(f"{name} {value}" for name, value in sampling.items())
        notes.append(f"generation_config.json: do_sample is set to true, because it has {given}.")
    notes += _reset_unsavable(generation)
    return notes


def _move_from_config(config: "PretrainedConfig", generation: "GenerationConfig") -> list[str]:
    notes = []
    text = config.get_text_config()
    for part in (config,) if text is config else (config, text):
        moved: dict[str, Any] = part._get_generation_parameters()
        for name, value in moved.items():
            if getattr(generation, name, None) is None:
                setattr(generation, name, value)
            delattr(part, name)
        if moved:
            notes.append(f"config.json: {', '.join(moved)} moved to generation_config.json, where transformers looks.")
    return notes


def _is_savable(generation: "GenerationConfig") -> bool:
    try:
        generation.validate(strict=True)
    except (ValueError, TypeError, AttributeError):
        return False
    return True


def _own_value(generation: "GenerationConfig", name: str) -> Any:
    """Return a setting's value where it is not transformers' default."""
    value = getattr(generation, name, None)
    return None if value == type(generation)._get_default_generation_params().get(name) else value


def _reset_unsavable(generation: "GenerationConfig") -> list[str]:
    """Reset each setting that cannot be saved together with those before it."""
    kept = type(generation)()
    names = [name for name in vars(generation) if not name.startswith("_") and name != "transformers_version"]
    notes = []
    for name in sorted(names, key=lambda name: (name not in _MODES, name not in _SAMPLING)):
        value, before = getattr(generation, name), copy.copy(vars(kept))
        if value == before.get(name):
            continue
        setattr(kept, name, value)
        if _is_savable(kept):
            continue
        vars(kept).clear()
        vars(kept).update(before)
        if name in before:
            setattr(generation, name, before[name])
        else:
            delattr(generation, name)
        notes.append(f"generation_config.json: {name} {value} is dropped, because transformers does not save it.")
    return notes


def pad_on_left(tokenizer: "PreTrainedTokenizerBase") -> None:
    """Let a tokenizer pad on the left, as batched generation needs it: an answer begins where its prompt ends.

    transformers saves the side only if the tokenizer was created with it.
    """
    tokenizer.padding_side = "left"
    tokenizer.init_kwargs["padding_side"] = "left"
