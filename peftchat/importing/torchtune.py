"""torchtune: YAML files in which `_component_` names a function, and the other keys are its arguments."""

from collections.abc import Mapping
from typing import Any

from peftchat.importing.draft import IS_OFF, Draft, SourceLine, as_bool, as_number, shown
from peftchat.importing.rules import Table, by, deferred, group, inert, is_templated, refused, same
from peftchat.importing.shared_rules import (
    FLOAT32_WEIGHTS,
    KERNEL,
    LAUNCH,
    LOGGING,
    NOT_TEXT,
    PARALLEL,
    PREPARED,
    RESUME,
    RUN_FOLDER,
    checkpointing,
)
from peftchat.importing.source_file import SourceFile, with_references
from peftchat.importing.tool import Tool
from peftchat.importing.torchtune_data import DATASETS, finish_data

_OPTIMIZERS = {
    "torch.optim.AdamW": "adamw_torch",
    "bitsandbytes.optim.AdamW8bit": "adamw_8bit",
    "bitsandbytes.optim.AdamW": "adamw_torch",
    "bitsandbytes.optim.PagedAdamW8bit": "paged_adamw_8bit",
    "bitsandbytes.optim.PagedAdamW": "paged_adamw_32bit",
    "torch.optim.SGD": "sgd",
    "torch.optim.Adagrad": "adagrad",
    "torch.optim.RMSprop": "rmsprop",
}
_SCHEDULES = {
    "get_cosine_schedule_with_warmup": "cosine",
    "get_linear_schedule_with_warmup": "linear",
    "get_constant_schedule_with_warmup": "constant_with_warmup",
}
_LOSSES = ("LinearCrossEntropyLoss", "CEWithChunkedOutputLoss", "CrossEntropyLoss")
_MODULES = {"output_proj": "o_proj"}
_MLP = ["gate_proj", "up_proj", "down_proj"]
_REWARDS = "learns from rewards; peftchat learns from answers and pairs"
_TEACHER = "learns from a larger model's probabilities; peftchat learns from answers and pairs"
_LORA_KEYS = ("lora_attn_modules", "apply_lora_to_mlp", "apply_lora_to_output")
_ONE = (None, False, 0, 1, -1, "")


def _name(value: Any) -> str:
    return str(value).rpartition(".")[2]


def _model(draft: Draft, line: SourceLine) -> None:
    """Tell the method by the name of the function that builds the model."""
    name = _name(line.value)
    if any(part in name for part in ("vision", "clip", "early_fusion")):
        draft.refuse(line, NOT_TEXT, blocks=True)
    elif "classifier" in name:
        draft.refuse(line, _REWARDS, blocks=True)
    elif name.startswith("qlora_"):
        draft.keep_all(line, {"method": "qlora", "quantization.bits": 4})
    elif name.startswith("lora_"):
        quantized = draft.is_on("model.quantize_base")
        draft.keep_all(line, {"method": "qlora", "quantization.bits": 4} if quantized else {"method": "lora"})
    else:
        draft.keep(line, "method", "full")


def _checkpoint_folder(draft: Draft, line: SourceLine) -> None:
    kind = _name(draft.get("checkpointer._component_"))
    if is_templated(line.value):
        draft.refuse(line, "its value is filled in elsewhere; give `model.name`")
    elif "Meta" in kind:
        why = "a folder in Meta's own form; give the hub's form of the same model as `model.name`"
        draft.change(line, {}, why)
        draft.ask("model.name", f"the hub's form of the model in {line.value}")
    else:
        draft.keep(line, "model.name", line.value)


def _optimizer(draft: Draft, line: SourceLine) -> None:
    name = _OPTIMIZERS.get(str(line.value))
    if name is None:
        draft.refuse(line, f"`{shown(line.value)}` is not among peftchat's optimizers; see `training.optim`")
        return
    fused = name == "adamw_torch" and draft.is_on("optimizer.fused")
    draft.keep(line, "training.optim", "adamw_torch_fused" if fused else name)


def _betas(draft: Draft, line: SourceLine) -> None:
    if isinstance(line.value, list) and len(line.value) == 2:
        draft.keep_all(line, {f"training.adam_beta{at}": value for at, value in enumerate(line.value, 1)})
    else:
        draft.refuse(line, "expected two numbers")


def _schedule(draft: Draft, line: SourceLine) -> None:
    name = _SCHEDULES.get(_name(line.value))
    if name is None:
        draft.refuse(line, f"`{_name(line.value)}` is not among peftchat's schedules")
    else:
        draft.keep(line, "training.lr_scheduler_type", name)


def _loss(draft: Draft, line: SourceLine) -> None:
    name = _name(line.value)
    if name in _LOSSES:
        draft.leave(line, "the mean over trained tokens, as it is here")
    elif name == "DPOLoss":
        draft.keep(line, "objective", "dpo")
    else:
        draft.refuse(line, f"`{name}` is another loss than those of peftchat's objectives", blocks=True)


def _loss_setting(draft: Draft, line: SourceLine) -> None:
    if _name(draft.get("loss._component_")) == "DPOLoss" and line.key == "loss.beta":
        draft.keep(line, "dpo.beta", line.value)
    elif as_number(line.value) == 0:
        draft.leave(line, IS_OFF)
    else:
        draft.refuse(line, "peftchat's loss has no such setting")


def _max_steps(draft: Draft, line: SourceLine) -> None:
    epochs, steps = as_number(draft.get("epochs")) or 1, as_number(line.value)
    if epochs == 1:
        draft.keep(line, "training.max_steps", steps)
    else:
        why = f"the steps of {epochs} epochs together; examples of a part of an epoch are not the first ones again"
        draft.change(line, {"training.max_steps": int(epochs) * int(steps)}, why)


def _dtype(draft: Draft, line: SourceLine) -> None:
    names = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
    dtype = names.get(str(line.value))
    has_adapter = "lora_" in _name(draft.get("model._component_"))
    if dtype is not None and (has_adapter or dtype == "float32"):
        draft.keep(line, "model.dtype", dtype)
    elif dtype is not None:
        draft.change(line, {"model.dtype": dtype}, FLOAT32_WEIGHTS)
    else:
        draft.refuse(line, f"`{shown(line.value)}` is not among peftchat's dtypes")


def _offload(draft: Draft, line: SourceLine) -> None:
    if as_bool(line.value) is True:
        why = "ZeRO-3 with offload keeps weights and optimizer in the CPU's memory"
        draft.change(line, {"distributed.strategy": "zero3", "distributed.offload": "all"}, why)
    else:
        draft.leave(line, IS_OFF)


def _tracker(draft: Draft, line: SourceLine) -> None:
    names = {"WandBLogger": "wandb", "TensorBoardLogger": "tensorboard"}
    name = _name(line.value)
    if name in names:
        draft.keep(line, "training.report_to", [names[name]])
    else:
        draft.leave(line, "peftchat writes `metrics.jsonl` in any case")


def _output(draft: Draft, line: SourceLine) -> None:
    if is_templated(line.value):
        draft.leave(line, "its value is filled in elsewhere; the run is named after the file")
    else:
        draft.keep(line, "output_dir", line.value)


def _save_steps(draft: Draft, line: SourceLine) -> None:
    if line.key == "save_every_n_steps":
        draft.keep(line, "training.save_steps", line.value)
    else:
        draft.keep(line, "training.save_strategy", "epoch")


_TABLE: Table = {
    "model._component_": by(_model),
    **group(deferred(), " ".join(f"model.{key}" for key in _LORA_KEYS)),
    "model.lora_rank": same("adapter.r"),
    "model.lora_alpha": same("adapter.alpha"),
    "model.lora_dropout": same("adapter.dropout"),
    "model.use_dora": deferred(),
    "model.quantize_base": inert("the method says it: `qlora`"),
    "model": refused("torchtune builds the model by these numbers; peftchat takes the model's config as it is"),
    **group(
        refused(NOT_TEXT, blocks=True),
        "model.decoder_trainable model.encoder_trainable model.fusion_trainable model.image_size "
        "tokenizer.image_size tokenizer.max_num_tiles",
    ),
    "tokenizer.max_seq_len": same("data.max_length"),
    "tokenizer.prompt_template": refused("a text around each message; write it as a `.jinja` file of `chat.template`"),
    "tokenizer": inert("the tokenizer lies beside the model"),
    "checkpointer.checkpoint_dir": by(_checkpoint_folder),
    "checkpointer.keep_last_n_checkpoints": same("training.save_total_limit"),
    "checkpointer.adapter_checkpoint": refused("an adapter to go on with; merge it into its base first", blocks=True),
    "checkpointer": inert("peftchat reads a model's folder, and writes one"),
    "output_dir": by(_output),
    **DATASETS,
    "batch_size": same("training.per_device_train_batch_size"),
    "batch_size_val": same("training.per_device_eval_batch_size"),
    "gradient_accumulation_steps": same("training.gradient_accumulation_steps"),
    "epochs": same("training.num_train_epochs"),
    "max_steps_per_epoch": by(_max_steps),
    "optimizer._component_": by(_optimizer),
    "optimizer.lr": same("training.learning_rate"),
    "optimizer.weight_decay": same("training.weight_decay"),
    "optimizer.eps": same("training.adam_epsilon"),
    "optimizer.betas": by(_betas),
    "optimizer.fused": inert("`optimizer._component_` says it"),
    "optimizer": refused("peftchat's optimizers have no such setting"),
    "optimizer_in_bwd": inert("the update is the same; peftchat makes it after the backward pass"),
    "lr_scheduler._component_": by(_schedule),
    "lr_scheduler.num_warmup_steps": same("training.warmup_steps"),
    "lr_scheduler.num_cycles": refused("a cosine of half a turn", unless=(None, 0.5)),
    "loss._component_": by(_loss),
    "loss": by(_loss_setting),
    "clip_grad_norm": same("training.max_grad_norm"),
    "seed": same("training.seed"),
    "dtype": by(_dtype),
    "device": inert("a GPU where there is one, else the CPU"),
    "compile": same("training.torch_compile"),
    "enable_activation_checkpointing": checkpointing(),
    "log_every_n_steps": same("training.logging_steps"),
    "run_val_every_n_steps": same("training.eval_steps"),
    **group(by(_save_steps), "save_every_n_steps save_every_n_epochs"),
    "metric_logger._component_": by(_tracker),
    "metric_logger": inert(LOGGING),
    **group(by(_offload), "fsdp_cpu_offload fsdp.cpu_offload"),
    **group(inert(KERNEL), "enable_activation_offloading ac_mode ac_option memory_efficient_fsdp_wrap use_flex"),
    **group(inert(PREPARED), "collate_fn dataloader num_workers"),
    **group(
        inert(LOGGING), "log_peak_memory_stats log_level profiler debug_logging_enabled debug_num_samples_per_step"
    ),
    **group(
        inert(LAUNCH),
        "custom_sharded_layers low_cpu_ram fsdp cudnn_deterministic_mode use_distributed_state_dict "
        "data_parallel_shard_dim data_parallel_replicate_dim tensor_parallel_plan",
    ),
    "tensor_parallel_dim": refused(PARALLEL, unless=_ONE),
    "context_parallel_dim": refused(PARALLEL, unless=_ONE),
    **group(inert(RESUME), "resume_from_checkpoint"),
    **group(inert(RUN_FOLDER), "save_adapter_weights_only"),
    **group(inert("a name that other keys refer to"), "name base_model_path"),
    **group(refused(_TEACHER, blocks=True), "teacher_model teacher_checkpointer kd_loss kd_ratio"),
    **group(
        refused(_REWARDS, blocks=True),
        "policy_model reward_and_value_model reward_functions grpo_samples ppo_epochs ppo_batch_size "
        "value_checkpointer reward_checkpointer ref_policy_checkpointer forward_batch_size num_steps "
        "max_generated_tokens orchestration inference postprocessing training min_response_length penalise_no_eos "
        "reward_penalty whiten_rewards gamma lmbda kl_coeff",
    ),
    "ref_checkpointer": inert("the reference is the base, with the adapter switched off"),
    "quantizer": refused("other numbers in training; peftchat trains in 16 or 32 bits"),
    **group(inert("concerns how a finished model answers"), "temperature top_k stop_token_ids"),
    **group(refused("another kind of training", blocks=True), "early_exit_loss layer_dropout"),
    "enable_kv_cache": inert("training never uses the cache of generation"),
    "apply_chat_template": inert("conversations are always written by the chat template"),
}


def _finish(draft: Draft) -> None:
    _targets(draft)
    finish_data(draft)
    because = "torchtune's default"
    method = draft.values.get("method")
    if method == "qlora":
        draft.assume("quantization.double", True, because)
    draft.assume("training.gradient_accumulation_steps", 1, because)
    draft.assume("training.per_device_train_batch_size", 1, because)
    draft.assume("training.num_train_epochs", 1.0, because)
    if "lr_scheduler" not in draft.source:
        draft.assume("training.lr_scheduler_type", "constant", f"{because}: no schedule")
    if draft.get("clip_grad_norm") is None:
        draft.assume("training.max_grad_norm", 0.0, f"{because}: gradients are not clipped")
    if draft.get("optimizer.weight_decay") is None and "AdamW" in str(draft.get("optimizer._component_")):
        draft.assume("training.weight_decay", 0.01, "AdamW's default")
    if "model.name" in draft.values:
        draft.assume("chat.template", "model", "torchtune's tokenizers write the model's own turns")


def _targets(draft: Draft) -> None:
    names: list[str] = []
    lines = draft.take(*(f"model.{key}" for key in _LORA_KEYS))
    for line in lines:
        value = line.value
        if line.key.endswith("attn_modules"):
            names += [_MODULES.get(str(one), str(one)) for one in (value if isinstance(value, list) else [value])]
        elif as_bool(value) is True:
            names += _MLP if line.key.endswith("mlp") else ["lm_head"]
    for line in lines:
        if line.key.endswith("attn_modules") or as_bool(line.value) is True:
            draft.keep(line, "adapter.target_modules", names)
        else:
            draft.leave(line, "off; the other modules are listed")
    for line in draft.take("model.use_dora"):
        if as_bool(line.value) is True:
            draft.keep(line, "adapter.variant", "dora")
        else:
            draft.leave(line, IS_OFF)


def _not_a_training(source: SourceFile) -> str | None:
    held: Mapping[str, Any] = source.document.values
    if "tasks" in held and "optimizer" not in held:
        return "it evaluates; `peftchat evaluate` does that"
    if "prompt" in held and "optimizer" not in held:
        return "it answers a prompt; `peftchat generate` and `peftchat chat` do that"
    if "quantizer" in held and "optimizer" not in held:
        return "it quantizes a finished model; `peftchat export` does that"
    return None


def has_components(value: Any) -> bool:
    """Return whether a file names functions as torchtune does."""
    if isinstance(value, Mapping):
        return "_component_" in value or any(has_components(held) for held in value.values())
    return isinstance(value, list) and any(has_components(held) for held in value)


TORCHTUNE = Tool(
    name="torchtune",
    title="torchtune",
    table=_TABLE,
    marks=frozenset(("checkpointer", "metric_logger", "tokenizer", "profiler", "enable_activation_checkpointing")),
    finish=_finish,
    prepare=with_references,
    not_a_training=_not_a_training,
)
