"""LLaMA-Factory's second form of files (`examples/v1`), with plugins for adapters, sharding and kernels."""

from collections.abc import Mapping
from typing import Any

from peftchat.errors import UserError
from peftchat.importing.draft import IS_OFF, Draft, SourceLine, as_bool, as_number, shown
from peftchat.importing.llamafactory import template
from peftchat.importing.llamafactory_data import source_keys
from peftchat.importing.rules import Table, by, deferred, group, inert, refused, same, words
from peftchat.importing.shared_rules import (
    KERNEL,
    LAUNCH,
    LOGGING,
    PARALLEL,
    PREPARED,
    RESUME,
    RUN_FOLDER,
    attention,
    beside,
    checkpointing,
    deepspeed,
    method,
    precision,
    targets,
)
from peftchat.importing.source_file import SourceFile, read_source
from peftchat.importing.tool import Tool

_PREFERENCES = ("pref_loss", "pref_beta", "simpo_gamma", "pref_ftx")
_DEFERRED = ("peft_config.name", "quant_config.name", "quant_config.quantization_bit", "bf16", "train_dataset")
_LOSSES = {"sigmoid": "dpo", "orpo": "orpo", "simpo": "simpo"}
_ONE = (None, False, 0, 1, "")


def _sharding(draft: Draft, line: SourceLine) -> None:
    name = str(line.value)
    if name == "deepspeed":
        draft.leave(line, "`dist_config.config_file` says how")
    elif name == "ddp":
        draft.keep(line, "distributed.strategy", "ddp")
    else:
        why = "ZeRO-3 shards the same: weights, gradients and optimizer"
        draft.change(line, {"distributed.strategy": "zero3"}, why)


def _batching(draft: Draft, line: SourceLine) -> None:
    name = str(line.value)
    if name == "normal":
        draft.keep(line, "data.packing", False)
    elif name == "padding_free":
        why = "no padding, with the same examples in a step"
        draft.leave(line, f"{why}: `model.attention: auto` does it")
    else:
        draft.change(line, {"data.packing": True}, "packs of `data.max_length` tokens, which hold whole conversations")


def _model_class(draft: Draft, line: SourceLine) -> None:
    if line.value == "llm":
        draft.leave(line, "a model that writes text, as it is here")
    else:
        draft.refuse(line, f"`{shown(line.value)}`: peftchat trains models that write text", blocks=True)


def _plain_optimizer(draft: Draft, line: SourceLine) -> None:
    if str(line.value) == "adamw":
        draft.change(line, {"training.optim": "adamw_torch_fused"}, "AdamW by the name of its implementation here")
    else:
        draft.refuse(line, f"`{shown(line.value)}` is not among peftchat's optimizers; see `training.optim`")


def _save_epochs(draft: Draft, line: SourceLine) -> None:
    becomes = {"training.save_strategy": "epoch"}
    if as_number(line.value) == 1:
        draft.keep_all(line, becomes)
    else:
        draft.change(line, becomes, "checkpoints are written at the end of each epoch")


_TABLE: Table = {
    "model": same("model.name"),
    "model_class": by(_model_class),
    "trust_remote_code": same("model.trust_remote_code"),
    "template": by(template),
    **group(deferred(), " ".join((*_DEFERRED, *_PREFERENCES))),
    "peft_config.r": same("adapter.r"),
    "peft_config.lora_alpha": same("adapter.alpha"),
    "peft_config.lora_dropout": same("adapter.dropout"),
    "peft_config.target_modules": targets(),
    "dist_config.name": by(_sharding),
    "dist_config.config_file": deepspeed(),
    "flash_attn": attention(),
    "micro_batch_size": same("training.per_device_train_batch_size"),
    "global_batch_size": deferred(),
    "cutoff_len": same("data.max_length"),
    "learning_rate": same("training.learning_rate"),
    "num_train_epochs": same("training.num_train_epochs"),
    "max_steps": same("training.max_steps"),
    "max_grad_norm": same("training.max_grad_norm"),
    "batching_strategy": by(_batching),
    "enable_activation_checkpointing": checkpointing(),
    "optim_config.name": by(_plain_optimizer),
    "optim_config.wd": same("training.weight_decay"),
    "optim_config": inert("concerns an optimizer that is refused, or is its default"),
    "lr_scheduler_config.name": words(
        "training.lr_scheduler_type", {name: name for name in ("linear", "cosine", "constant")}, ""
    ),
    "lr_scheduler_config": refused("see `training.lr_scheduler_kwargs`"),
    "seed": same("training.seed"),
    "output_dir": same("output_dir"),
    "save_steps": same("training.save_steps"),
    "save_epochs": by(_save_epochs),
    "save_total_limit": same("training.save_total_limit"),
    "logging_steps": same("training.logging_steps"),
    "resume_from_checkpoint": inert(RESUME),
    "save_ckpt_as_hf": inert(RUN_FOLDER),
    "full_determinism": inert("runs on the same machine and versions repeat by themselves"),
    **group(inert(KERNEL), "kernel_config"),
    **group(inert(PREPARED), "batching_workers"),
    **group(
        inert(LAUNCH),
        "dist_config dist_timeout dp_size mp_replicate_size mp_shard_size cp_mode init_config quant_config",
    ),
    **group(refused(PARALLEL, unless=_ONE), "cp_size dist_config.ep_size dist_config.cp_size"),
    **group(inert("concerns how a finished model answers"), "sample_backend max_new_tokens"),
    **group(inert(LOGGING), "report_to run_name"),
    "eval_dataset": refused("give `data.eval` its files"),
    "dpo_label_smoothing": refused("only `dpo.loss_type: robust` smooths labels here"),
    "ld_alpha": refused("another loss than peftchat's"),
    "peft_config": refused("a setting that peftchat's adapters do not have"),
}


def _finish(draft: Draft) -> None:
    _method(draft)
    is_bf16 = draft.get("bf16") is None or draft.is_on("bf16")
    precision(draft, bfloat16=is_bf16, float16=False, lines=draft.take("bf16"), mixed=True)
    _preferences(draft)
    for line in draft.take("train_dataset"):
        _data(draft, line)
    because = "LLaMA-Factory's default"
    _batch(draft)
    draft.assume("training.learning_rate", 1e-4, because)
    draft.assume("data.packing", False, because)
    draft.assume("chat.template", "model", because)
    if "lr_scheduler_config" not in draft.source:
        draft.assume("training.lr_scheduler_type", "constant", f"{because}: no schedule")


def _method(draft: Draft) -> None:
    kind = draft.get("peft_config.name")
    bits = as_number(draft.get("quant_config.quantization_bit"))
    lines: dict[str, SourceLine] = {}
    for line in draft.take("peft_config.name"):
        if kind == "lora":
            lines["adapter"] = line
        else:
            why = f"`{shown(kind)}` trains some weights only; `model.freeze_layers` names layers that stay"
            draft.refuse(line, why, blocks=True)
    for line in draft.take("quant_config.name", "quant_config.quantization_bit"):
        if line.key.endswith("bit") and bits in (4, 8):
            lines[f"{bits}bit"] = line
        elif line.value in ("bnb", "bitsandbytes", None):
            draft.leave(line, "bitsandbytes, as it is here")
        else:
            draft.refuse(line, f"`{shown(line.value)}`: peftchat trains on bitsandbytes' 4 or 8 bits")
    method(draft, has_adapter=kind == "lora", in_4bit=bits == 4, in_8bit=bits == 8, lines=lines)


def _preferences(draft: Draft) -> None:
    given = draft.take(*_PREFERENCES)
    if not given:
        draft.ask("objective", "the command, which is not in the file, says `sft` or `dpo`; `sft` is taken")
        return
    objective = _LOSSES.get(str(draft.get("pref_loss") or "sigmoid"), "dpo")
    draft.assume("objective", objective, "the file has settings of preferences")
    for line in given:
        if line.key == "pref_loss":
            draft.keep(line, "objective", objective)
        elif line.key == "pref_beta":
            draft.keep(line, f"{objective}.beta", line.value)
        elif line.key == "simpo_gamma" and objective == "simpo":
            draft.keep(line, "simpo.gamma", line.value)
        elif not as_number(line.value):
            draft.leave(line, IS_OFF)
        elif objective == "dpo":
            draft.keep(line, "dpo.rpo_alpha", line.value)
        else:
            draft.refuse(line, f"`objective: {objective}` has no such setting")


def _batch(draft: Draft) -> None:
    micro = as_number(draft.get("micro_batch_size")) or 1
    draft.assume("training.per_device_train_batch_size", 1, "LLaMA-Factory's default")
    for line in draft.take("global_batch_size"):
        if line.value is None:
            draft.leave(line, "empty: one micro-batch of each process")
            continue
        # Two ways to say one thing exclude each other in a recipe.
        draft.drop("training.per_device_train_batch_size")
        why = f"the micro-batch ({micro} there) follows from memory; the update is the same"
        draft.change(line, {"training.global_batch_size": line.value}, why)
        return
    draft.assume("training.gradient_accumulation_steps", 1, "LLaMA-Factory's default")


def _data(draft: Draft, line: SourceLine) -> None:
    """Take a file of data, or a YAML file that names several."""
    name = str(line.value)
    if not name.endswith((".yaml", ".yml")):
        draft.keep(line, "data.train.0.path", name)
        return
    found = beside(draft.path, name)
    if found is None:
        draft.change(line, {}, f"a list of data sets, {name}, which is not here")
        draft.ask("data.train.0.path", f"the files that {name} names")
        return
    try:
        listed = read_source(found).document.values
    except UserError as error:
        draft.refuse(line, f"cannot be read: {error}")
        return
    becomes: dict[str, Any] = {}
    entries = [entry for entry in listed.values() if isinstance(entry, Mapping)]
    for at, entry in enumerate(entries):
        given = (
            {"hf_hub_url": entry.get("path")} if entry.get("source") == "hf_hub" else {"file_name": entry.get("path")}
        )
        root = found.parent.parent if str(entry.get("path", "")).startswith(found.parent.name) else found.parent
        keys = source_keys(given, {}, root)
        becomes |= {f"data.train.{at}.{key}": value for key, value in keys.items()}
    draft.change(line, becomes, f"the files that {name} names")


def is_second_form(values: Mapping[str, Any]) -> bool:
    """Return whether a file has the second form."""
    return isinstance(values.get("model"), str) and ("model_class" in values or "train_dataset" in values)


def _not_a_training(source: SourceFile) -> str | None:
    held = source.document.values
    peft = held.get("peft_config")
    if isinstance(peft, Mapping) and "export_dir" in peft:
        return "it writes a merged model; `peftchat merge` and `peftchat export` do that"
    if "train_dataset" not in held and as_bool(held.get("do_train")) is not True:
        return "it names no data to train on"
    return None


LLAMAFACTORY_V1 = Tool(
    name="llamafactory-v1",
    title="LLaMA-Factory (v1)",
    table=_TABLE,
    marks=frozenset(("model_class", "train_dataset", "dist_config", "peft_config", "kernel_config")),
    finish=_finish,
    not_a_training=_not_a_training,
)
