"""A user's own DeepSpeed file: everything in it that would quietly overrule the recipe is an error."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from peftchat.recipe.document import Keys
from peftchat.recipe.problems import Problem
from peftchat.recipe.schema import Recipe

KEYS: Keys = ("distributed", "deepspeed_config")


def deepspeed_problems(recipe: Recipe) -> Iterator[Problem]:
    """What is wrong with the file that `distributed.deepspeed_config` names; nothing if it names none."""
    name = recipe.distributed.deepspeed_config
    if name is None:
        return
    path = Path(name).expanduser()
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        yield Problem(KEYS, f"cannot read `{name}`: {error.strerror}", "Check the path.")
    except (ValueError, RecursionError) as error:
        yield Problem(KEYS, f"`{name}` is not JSON: {error}")
    else:
        if isinstance(content, dict):
            yield from _contradictions(content, name, recipe)
        else:
            yield Problem(KEYS, f"`{name}` does not hold a JSON object")


def _contradictions(content: Mapping[str, Any], name: str, recipe: Recipe) -> Iterator[Problem]:
    if "scheduler" in content:
        what = f"`{name}` has a `scheduler`, which overrules `training.lr_scheduler_type` without a word"
        yield Problem(KEYS, what, "Remove that block.")
    zero = content.get("zero_optimization")
    stage = zero.get("stage") if isinstance(zero, dict) else None
    if f"zero{stage}" != recipe.distributed.strategy:
        what = f"`{name}` sets ZeRO stage {stage}, and `distributed.strategy` is `{recipe.distributed.strategy}`"
        yield Problem(KEYS, what, "Make the two agree.")
    for key, found, wanted in _pairs(content, recipe):
        if found not in ("auto", wanted):
            what = f"`{name}` sets `{key}` to {json.dumps(found)}, and the recipe says {json.dumps(wanted)}"
            yield Problem(KEYS, what, 'Write "auto" in the file, so that the recipe decides.')


def _pairs(content: Mapping[str, Any], recipe: Recipe) -> Iterator[tuple[str, Any, Any]]:
    """Each setting the file shares with the recipe: its key there, its value there, the recipe's value."""
    training = recipe.training
    plain = {
        "gradient_accumulation_steps": training.gradient_accumulation_steps,
        "train_micro_batch_size_per_gpu": training.per_device_train_batch_size,
        "gradient_clipping": training.max_grad_norm,
    }
    for key, wanted in plain.items():
        if key in content:
            yield key, content[key], wanted
    for key, dtype in (("bf16", "bfloat16"), ("fp16", "float16")):
        block = content.get(key)
        if isinstance(block, dict) and "enabled" in block:
            yield f"{key}.enabled", block["enabled"], recipe.model.dtype == dtype
    optimizer = content.get("optimizer")
    if isinstance(optimizer, dict):
        yield from _optimizer_pairs(optimizer, recipe)


def _optimizer_pairs(optimizer: Mapping[str, Any], recipe: Recipe) -> Iterator[tuple[str, Any, Any]]:
    training = recipe.training
    yield "optimizer.type", optimizer.get("type"), "AdamW" if "adamw" in training.optim else training.optim
    params = optimizer.get("params")
    wanted = {
        "lr": training.learning_rate,
        "betas": [training.adam_beta1, training.adam_beta2],
        "eps": training.adam_epsilon,
        "weight_decay": training.weight_decay,
    }
    for key, value in wanted.items():
        if isinstance(params, dict) and key in params:
            yield f"optimizer.params.{key}", params[key], value
