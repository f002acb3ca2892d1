"""A user's own DeepSpeed file: everything in it that would overrule the recipe is refused by its key."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from peftchat.recipe.document import Keys
from peftchat.recipe.error_messages import Problem
from peftchat.recipe.schema import Recipe

KEYS: Keys = ("distributed", "deepspeed_config")

_REMOVE = "Remove that block."
_AUTO = 'Write "auto" in the file, so that the recipe decides.'

_OTHER_ENGINES = {
    "amp": "`model.dtype`",
    "torch_autocast": "`model.dtype`",
    "autotuning": "the recipe",
    "curriculum_learning": "`data`",
    "data_efficiency": "`data`",
    "progressive_layer_drop": "`training`",
    "pipeline": "`distributed.strategy`",
    "tensor_parallel": "`distributed.strategy`",
    "sequence_parallel_size": "`distributed.strategy`",
    "hybrid_engine": "`method`",
    "sparse_attention": "`model.attention`",
    "compression_training": "`quantization`",
    "quantize_training": "`quantization`",
    "weight_quantization": "`quantization`",
    "load_universal_checkpoint": "`--resume`",
    "tensorboard": "`training.report_to`",
    "wandb": "`training.report_to`",
    "comet": "`training.report_to`",
    "csv_monitor": "`training.report_to`",
}
"""Blocks that would change what is trained, or where it reports -> what decides about that in a recipe."""


def read_deepspeed_file(name: str) -> dict[str, Any]:
    """Read a DeepSpeed file; a byte order mark is skipped.

    Raises:
        OSError: it cannot be read.
        ValueError: it holds no JSON object, a key twice, or a number that is not finite.
    """
    text = Path(name).read_text(encoding="utf-8-sig")
    try:
        content = json.loads(text, object_pairs_hook=_without_repetition, parse_constant=_refuse_constant)
    except json.JSONDecodeError as error:
        line = text.splitlines()[error.lineno - 1] if error.lineno <= len(text.splitlines()) else ""
        comment = "; JSON has no comments" if line.strip().startswith(("//", "#", "/*")) or " //" in line else ""
        raise ValueError(f"line {error.lineno} is not JSON: {error.msg}{comment}") from error
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    if not isinstance(content, dict):
        raise ValueError("it does not hold a JSON object")
    return content


def deepspeed_problems(recipe: Recipe) -> Iterator[Problem]:
    """Yield what is wrong with the file that `distributed.deepspeed_config` names; nothing if it names none."""
    name = recipe.distributed.deepspeed_config
    if name is None:
        return
    try:
        content = read_deepspeed_file(name)
    except OSError as error:
        yield Problem(KEYS, f"cannot read `{name}`: {error.strerror}", "Check the path.")
    except UnicodeDecodeError:
        yield Problem(KEYS, f"cannot read `{name}`: it is not UTF-8", "Save the file as UTF-8.")
    except ValueError as error:
        yield Problem(KEYS, f"cannot read `{name}`: {error}", "Correct the file.")
    else:
        yield from _contradictions(content, name, recipe)


def _contradictions(content: Mapping[str, Any], name: str, recipe: Recipe) -> Iterator[Problem]:
    if "scheduler" in content:
        what = f"`{name}` has a `scheduler`, which overrules `training.lr_scheduler_type` without a word"
        yield Problem(KEYS, what, _REMOVE)
    for key, decides in _OTHER_ENGINES.items():
        if _is_on(content.get(key)):
            yield Problem(KEYS, f"`{name}` has `{key}`, and {decides} decides about that", _REMOVE)
    for key in ("zero_optimization", "bf16", "bfloat16", "fp16", "optimizer"):
        if key in content and not isinstance(content[key], dict):
            what = f"`{name}` sets `{key}` to {json.dumps(content[key])}, expected an object"
            yield Problem(KEYS, what, "Correct the file.")
            return
    zero = content.get("zero_optimization", {})
    stage = zero.get("stage")
    if isinstance(stage, bool) or f"zero{stage}" != recipe.distributed.strategy:
        what = f"`{name}` sets ZeRO stage {stage}, and `distributed.strategy` is `{recipe.distributed.strategy}`"
        yield Problem(KEYS, what, "Make the two agree.")
    for key, found, wanted in _pairs(content, recipe):
        if not _agree(found, wanted):
            what = f"`{name}` sets `{key}` to {json.dumps(found)}, and the recipe says {json.dumps(wanted)}"
            yield Problem(KEYS, what, _AUTO)
    yield from _batch_problems(content, name, recipe)


def _pairs(content: Mapping[str, Any], recipe: Recipe) -> Iterator[tuple[str, Any, Any]]:
    """Yield each setting the file shares with the recipe: its key there, its value there, the recipe's value.

    These are the keys that transformers fills in or compares, and those that DeepSpeed reads beside them:
    https://github.com/huggingface/transformers/blob/main/src/transformers/integrations/deepspeed.py
    """
    training = recipe.training
    plain: dict[str, Any] = {"gradient_clipping": training.max_grad_norm}
    if training.global_batch_size is None:
        plain["gradient_accumulation_steps"] = training.gradient_accumulation_steps
        plain["train_micro_batch_size_per_gpu"] = training.per_device_train_batch_size
    for key, wanted in plain.items():
        if key in content:
            yield key, content[key], wanted
    for key, dtype in (("bf16", "bfloat16"), ("bfloat16", "bfloat16"), ("fp16", "float16")):
        if key in content:
            # Without the key, DeepSpeed leaves a block switched off.
            yield f"{key}.enabled", content[key].get("enabled", False), recipe.model.dtype == dtype
    optimizer = content.get("optimizer")
    if isinstance(optimizer, dict):
        yield from _optimizer_pairs(optimizer, recipe)


def _optimizer_pairs(optimizer: Mapping[str, Any], recipe: Recipe) -> Iterator[tuple[str, Any, Any]]:
    training = recipe.training
    wanted_type = "AdamW" if "adamw" in training.optim else training.optim
    found_type = optimizer.get("type")
    # DeepSpeed compares the names in lower case.
    is_same = isinstance(found_type, str) and found_type.lower() == wanted_type.lower()
    yield "optimizer.type", wanted_type if is_same else found_type, wanted_type
    params = optimizer.get("params", {})
    if not isinstance(params, dict):
        yield "optimizer.params", params, {}
        return
    wanted: dict[str, Any] = {
        "lr": training.learning_rate,
        "betas": [training.adam_beta1, training.adam_beta2],
        "eps": training.adam_epsilon,
        "weight_decay": training.weight_decay,
        # Decay that is added to the gradient is Adam's, not AdamW's.
        "adam_w_mode": True,
        "amsgrad": False,
    }
    for key, value in wanted.items():
        if key in params:
            yield f"optimizer.params.{key}", params[key], value


def _batch_problems(content: Mapping[str, Any], name: str, recipe: Recipe) -> Iterator[Problem]:
    """Yield batch sizes that can only be checked, or only hold, for a number of processes."""
    training, distributed = recipe.training, recipe.distributed
    if training.global_batch_size is not None:
        for key in ("train_batch_size", "gradient_accumulation_steps", "train_micro_batch_size_per_gpu"):
            if content.get(key, "auto") != "auto":
                what = f"`{name}` sets `{key}`, and `training.global_batch_size` decides about that"
                yield Problem(KEYS, what, _AUTO)
        return
    found = content.get("train_batch_size", "auto")
    if found == "auto":
        return
    examples = training.per_device_train_batch_size * training.gradient_accumulation_steps
    if distributed.processes is None:
        is_wrong = isinstance(found, bool) or not isinstance(found, int) or found <= 0 or found % examples != 0
        wanted = f"{examples} for each process"
    else:
        total = examples * distributed.processes * distributed.nodes
        is_wrong, wanted = not _agree(found, total), str(total)
    if is_wrong:
        what = f"`{name}` sets `train_batch_size` to {json.dumps(found)}, and the recipe says {wanted}"
        yield Problem(KEYS, what, _AUTO)


def _agree(found: Any, wanted: Any) -> bool:
    """Return whether two values are the same; `true` is not 1, and 1 is 1.0."""
    if found == "auto":
        return True
    if isinstance(found, list) and isinstance(wanted, list):
        return len(found) == len(wanted) and all(map(_agree, found, wanted))
    return isinstance(found, bool) == isinstance(wanted, bool) and bool(found == wanted)


def _is_on(block: Any) -> bool:
    """Return whether a block has an effect: it is there and not switched off."""
    if isinstance(block, dict):
        return bool(block.get("enabled", bool(block)))
    return block not in (None, False, "auto", 1)


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content: dict[str, Any] = {}
    for key, value in pairs:
        if key in content:
            raise ValueError(f"the key `{key}` occurs twice")
        content[key] = value
    return content


def _refuse_constant(text: str) -> float:
    raise ValueError(f"{text} is not a number of JSON")
