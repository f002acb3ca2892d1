"""Rules that several tools share: precision, quantization, trackers, DeepSpeed and FSDP, targets of an adapter."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

from peftchat.importing.draft import IS_OFF, Draft, SourceLine, as_bool, as_number, shown
from peftchat.importing.rules import Rule, by, is_templated, whole
from peftchat.recipe.objectives import Objective
from peftchat.recipe.sections import REPORTERS, Optimizer, Schedule

OPTIMIZERS: Mapping[str, str] = {
    **{name: name for name in get_args(Optimizer)},
    "adamw_hf": "adamw_torch",
    "adamw": "adamw_torch",
    "adamw_apex_fused": "adamw_torch_fused",
    "adamw_bnb_8bit": "adamw_8bit",
    "adamw_torch_8bit": "adamw_8bit",
    "ao_adamw_8bit": "adamw_8bit",
    "paged_adamw": "paged_adamw_32bit",
    "lion": "lion_32bit",
    "lion_pytorch": "lion_32bit",
    "paged_lion": "paged_lion_32bit",
}
OPTIMIZER_WHY = "the same algorithm in the implementation that peftchat installs"
NO_OPTIMIZER = "is not among peftchat's optimizers; choose one of docs/recipe.md"

SCHEDULES: Mapping[str, str] = {name: name for name in get_args(Schedule)}
NO_SCHEDULE = "is not among peftchat's schedules; choose one of docs/recipe.md"

OBJECTIVES: tuple[str, ...] = get_args(Objective)

FASTEST = "`model.attention: auto` takes the fastest kernel that is installed; results are the same"
FLOAT32_WEIGHTS = "products are computed in it, and trained weights are kept in float32: more exact, with more memory"
KERNEL = "a faster kernel with the same results; peftchat chooses its own"
LOGGING = "concerns what is printed, not what is learned"
PREPARED = "peftchat encodes, orders and collates examples by itself"
LAUNCH = "concerns how processes are started; `distributed` says that"
RUN_FOLDER = "peftchat writes the run folder in one form"
HUB = "`peftchat push` uploads a run when you have looked at it"
OTHER_ADAPTER = "an adapter to go on with; `model.adapter` takes finished runs of peftchat, others are merged before"
RESUME = "`peftchat train RECIPE --resume` goes on with a run"
NOT_TEXT = "concerns images, sound or video, which peftchat does not read"
PARALLEL = "peftchat gives every process examples of its own, so this would change the batch per step"

_ATTENTION = {
    **dict.fromkeys(("flash_attention_2", "fa2", "auto", "flash", "xformers", "sage"), "auto"),
    **{name: name for name in ("flash_attention_3", "flex_attention", "sdpa", "eager")},
    "fa3": "flash_attention_3",
    "disabled": "eager",
}


def offered_objective(name: str | None) -> str | None:
    """Return an objective if peftchat has it."""
    return name if name in OBJECTIVES else None


def attention() -> Rule:
    """Return the rule of the attention implementation."""

    def act(draft: Draft, line: SourceLine) -> None:
        name = "auto" if "/" in str(line.value) else _ATTENTION.get(str(line.value))
        if name is None:
            draft.refuse(line, f"`{shown(line.value)}` is not among peftchat's implementations of attention")
        elif name == line.value:
            draft.keep(line, "model.attention", name)
        elif name == "auto":
            draft.leave(line, FASTEST)
        else:
            draft.change(line, {"model.attention": name}, "the same attention by its name here")

    return by(act)


def targets() -> Rule:
    """Return the rule of the modules that get an adapter."""

    def act(draft: Draft, line: SourceLine) -> None:
        value = line.value
        if isinstance(value, list) and len(value) == 1:
            value = value[0]
        if value in ("all", "all-linear", "all_linear"):
            draft.keep(line, "adapter.target_modules", "all-linear")
            return
        names = [name.strip() for name in value.split(",")] if isinstance(value, str) else value
        if not isinstance(names, list) or not all(
            isinstance(one, str) and re.fullmatch(r"[\w.]+", one) for one in names
        ):
            draft.refuse(line, "a pattern of names; give `adapter.target_modules` a list of module names")
            return
        draft.keep(line, "adapter.target_modules", names)

    return by(act)


def ask_targets(draft: Draft) -> None:
    """Say that a tool which names no modules leaves them to PEFT, whose choice depends on the architecture."""
    if draft.values.get("method") != "full" and "adapter.target_modules" not in draft.values:
        what = "the file names none, and PEFT then takes a few, often [q_proj, v_proj]; here it is all linear layers"
        draft.ask("adapter.target_modules", what)


def variant(name: str, why: str = "") -> Rule:
    """Return the rule of a switch that turns LoRA into another variant."""

    def act(draft: Draft, line: SourceLine) -> None:
        if as_bool(line.value) in (False, None):
            draft.leave(line, IS_OFF)
        else:
            draft.keep(line, "adapter.variant", name)

    return by(act)


def loraplus() -> Rule:
    """Return the rule of the ratio of learning rates that makes LoRA a LoRA+."""

    def act(draft: Draft, line: SourceLine) -> None:
        draft.keep_all(line, {"adapter.variant": "loraplus", "adapter.loraplus_lr_ratio": as_number(line.value)})

    return by(act)


def deepspeed() -> Rule:
    """Return the rule of a DeepSpeed configuration: a file's name, or its content."""
    return whole(_deepspeed)


def _deepspeed(draft: Draft, line: SourceLine) -> None:
    if isinstance(line.value, Mapping):
        _take_zero(draft, line, line.value, "the content")
        return
    name = str(line.value)
    if is_templated(name):
        draft.refuse(line, "its value is filled in elsewhere; give `distributed.strategy`")
        return
    found = beside(draft.path, name)
    if found is not None:
        try:
            held = json.loads(found.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            held = None
        if isinstance(held, Mapping):
            _take_zero(draft, line, held, "the file")
            return
    stage = re.search(r"(?:zero|_z|stage)[-_]?([0-3])", name.lower())
    if stage is None:
        why = f"`{name}` is not here; set `distributed.strategy` to zero2 or zero3, or give `deepspeed_config`"
        draft.refuse(line, why)
        return
    # A file that is not here is known by its name alone; the projects name theirs by stage and offload.
    offload = "offload" in name.lower()
    zero: dict[str, Any] = {"stage": int(stage[1])}
    if offload:
        zero["offload_optimizer"] = {"device": "cpu"}
    if offload and int(stage[1]) == 3:
        zero["offload_param"] = {"device": "cpu"}
    _take_zero(draft, line, {"zero_optimization": zero}, "its name")


def _take_zero(draft: Draft, line: SourceLine, held: Mapping[str, Any], read: str) -> None:
    zero = held.get("zero_optimization")
    zero = zero if isinstance(zero, Mapping) else {}
    stage = zero.get("stage", 0)
    if stage not in (0, 1, 2, 3):
        draft.refuse(line, f"`stage: {shown(stage)}` is no stage of ZeRO; expected 0 to 3")
        return
    becomes: dict[str, Any] = {"distributed.strategy": ("ddp", "zero2", "zero2", "zero3")[stage]}
    is_offloaded = {
        part: isinstance(zero.get(key), Mapping) and zero[key].get("device", "none") != "none"
        for part, key in (("optimizer", "offload_optimizer"), ("weights", "offload_param"))
    }
    if any(is_offloaded.values()) and stage >= 1:
        becomes["distributed.offload"] = "all" if is_offloaded["weights"] and stage == 3 else "optimizer"
    nearest = "; stage 1 is not offered, and stage 2 also shards the gradients" if stage == 1 else ""
    # The file's own scheduler and optimizer replace those of the training arguments, without a word.
    part = _own_part(held)
    if part is not None:
        why = f"{read} has a `{part}` of its own, which replaces that of the other lines; take it out of the file"
        draft.refuse(line, why)
        return
    draft.change(line, becomes, f"by {read}: ZeRO stage {stage}{nearest}; peftchat writes the file")


def _own_part(held: Mapping[str, Any]) -> str | None:
    """Return a part of a DeepSpeed file that does not follow the training arguments; None if all do."""
    if held.get("scheduler"):
        return "scheduler"
    optimizer = held.get("optimizer")
    if not isinstance(optimizer, Mapping):
        return None
    params = optimizer.get("params", {})
    follows = isinstance(params, Mapping) and all(value == "auto" for value in params.values())
    return None if follows and str(optimizer.get("type")).lower() in ("adam", "adamw") else "optimizer"


def fsdp() -> Rule:
    """Return the rule of the switch for PyTorch's sharding."""

    def act(draft: Draft, line: SourceLine) -> None:
        text = shown(line.value)
        if as_bool(line.value) is False:
            draft.leave(line, IS_OFF)
        elif "shard_grad_op" in text:
            draft.change(line, {"distributed.strategy": "zero2"}, "ZeRO-2 shards the same: gradients and optimizer")
        else:
            why = "ZeRO-3 shards the same: weights, gradients and optimizer"
            draft.change(line, {"distributed.strategy": "zero3"}, why)

    return by(act)


def fsdp_offload() -> Rule:
    """Return the rule of keeping sharded weights in the memory of the CPU."""

    def act(draft: Draft, line: SourceLine) -> None:
        if as_bool(line.value) is True:
            why = "ZeRO-3 with offload keeps weights and optimizer in the CPU's memory"
            draft.change(line, {"distributed.strategy": "zero3", "distributed.offload": "all"}, why)
        else:
            draft.leave(line, IS_OFF)

    return by(act)


def trackers() -> Rule:
    """Return the rule of experiment trackers."""

    def act(draft: Draft, line: SourceLine) -> None:
        given = line.value if isinstance(line.value, list) else [line.value]
        names = [str(name) for name in given if str(name).lower() not in ("none", "null")]
        known = [name for name in names if name in REPORTERS]
        if not names:
            draft.leave(line, "no tracker, as it is here")
        elif "all" in names:
            draft.leave(line, "every tracker that is installed; name those you want in `training.report_to`")
        elif known != names:
            other = ", ".join(name for name in names if name not in REPORTERS)
            why = f"`{other}` is not among peftchat's trackers: {', '.join(REPORTERS)}"
            draft.change(line, {"training.report_to": known} if known else {}, why)
        else:
            draft.keep(line, "training.report_to", names)

    return by(act)


def held_out() -> Rule:
    """Return the rule of a share, or a number, of examples held out for evaluation."""

    def act(draft: Draft, line: SourceLine) -> None:
        size = as_number(line.value)
        if size == 0:
            draft.leave(line, "nothing is held out, as it is here")
        elif isinstance(size, int | float) and not isinstance(size, bool) and 0 < size < 1:
            draft.keep(line, "data.eval_fraction", size)
        else:
            draft.refuse(line, "a number of examples; give the share of all that it is as `data.eval_fraction`")

    return by(act)


def checkpointing() -> Rule:
    """Return the rule of gradient checkpointing, which may also move activations to the CPU."""

    def act(draft: Draft, line: SourceLine) -> None:
        value = as_bool(line.value)
        if isinstance(value, bool):
            draft.keep(line, "training.gradient_checkpointing", value)
        else:
            why = "activations are recomputed, and not kept in the CPU's memory"
            draft.change(line, {"training.gradient_checkpointing": True}, why)

    return by(act)


def method(draft: Draft, *, has_adapter: bool, in_4bit: bool, in_8bit: bool, lines: Mapping[str, SourceLine]) -> None:
    """Set the method; `lines` are those of the switches, by `adapter`, `4bit` and `8bit`, where they are written."""
    chosen = "full" if not has_adapter else "qlora" if in_4bit or in_8bit else "lora"
    if in_4bit and in_8bit:
        draft.refuse(lines["8bit"], "contradicts the switch for 4 bits: a base has one or the other")
    for bits, is_on in (("4bit", in_4bit), ("8bit", in_8bit)):
        line = lines.get(bits)
        if line is None or (bits == "8bit" and in_4bit and in_8bit):
            continue
        if is_on and not has_adapter:
            why = "quantized weights cannot be trained without an adapter; name one, or remove this line"
            draft.refuse(line, why)
        elif is_on:
            draft.keep(line, "quantization.bits", int(bits[0]))
        else:
            draft.leave(line, IS_OFF)
    if "adapter" in lines:
        draft.keep(lines["adapter"], "method", chosen)
    else:
        draft.assume("method", chosen, "no adapter is named" if chosen == "full" else f"{draft.tool}'s default")


def precision(draft: Draft, *, bfloat16: bool, float16: bool, lines: list[SourceLine], mixed: bool) -> None:
    """Set the dtype by switches for 16 bits.

    Args:
        draft: is written to.
        bfloat16: whether bfloat16 is asked for.
        float16: whether float16 is.
        lines: the switches as they are written.
        mixed: the other tool keeps trained weights in float32 beside the 16 bits.
    """
    dtype = "float16" if float16 else "bfloat16" if bfloat16 else "float32"
    is_full = draft.values.get("method") == "full"
    for line in lines:
        if as_bool(line.value) in (False, None):
            draft.leave(line, "off; the dtype follows from the others")
        elif not mixed and is_full and dtype != "float32":
            draft.change(line, {"model.dtype": dtype}, FLOAT32_WEIGHTS)
        else:
            draft.keep(line, "model.dtype", dtype)
    draft.assume("model.dtype", dtype, f"what {draft.tool} computes in without a switch")


def beside(path: Path, name: str) -> Path | None:
    """Return the file of that name: in the working folder, beside the configuration, or above it."""
    for folder in (Path(), *path.absolute().parents):
        try:
            if (folder / name).is_file():
                return folder / name
        except (OSError, ValueError):
            return None
    return None
