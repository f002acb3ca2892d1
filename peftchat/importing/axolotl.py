"""Axolotl: the keys of its YAML files (https://docs.axolotl.ai/docs/config-reference.html)."""

from peftchat.importing.axolotl_data import DATASETS, finish_data
from peftchat.importing.axolotl_left import AXOLOTL_LEFT
from peftchat.importing.draft import EMPTY, IS_OFF, Draft, SourceLine, as_bool, as_number, shown
from peftchat.importing.rules import Rule, Table, by, deferred, group, inert, refused, same, whole, words
from peftchat.importing.shared_rules import (
    FASTEST,
    KERNEL,
    LOGGING,
    NO_OPTIMIZER,
    NO_SCHEDULE,
    OBJECTIVES,
    OPTIMIZER_WHY,
    OPTIMIZERS,
    OTHER_ADAPTER,
    SCHEDULES,
    ask_targets,
    attention,
    checkpointing,
    deepspeed,
    fsdp,
    fsdp_offload,
    held_out,
    loraplus,
    method,
    offered_objective,
    precision,
    targets,
    variant,
)
from peftchat.importing.tool import Tool, names

_PRECISION = ("bf16", "bfloat16", "fp16", "float16", "float32")

_TEMPLATES = {"chatml": "chatml", "llama3": "llama3", "tokenizer_default": "model"}

_OBJECTIVES = {"dpo": "dpo", "ipo": "dpo", "orpo": "orpo", "simpo": "simpo", "kto": "kto"}

_KERNEL_PLUGINS = ("liger", "cut_cross_entropy", "kernels")
_STRATEGIES = {"no": "no", False: "no", "steps": "steps", "epoch": "epoch", "best": "epoch"}


def _template(draft: Draft, line: SourceLine) -> None:
    name = str(line.value)
    if name in _TEMPLATES:
        draft.keep(line, "chat.template", _TEMPLATES[name])
    elif name == "alpaca":
        draft.refuse(line, "a plain text without turns; peftchat trains turns of a chat")
    elif name == "jinja":
        draft.leave(line, "`chat_template_jinja` names the template")
    else:
        why = f"the model's own template instead of Axolotl's copy for `{name}`; compare with `peftchat mask`"
        draft.change(line, {"chat.template": "model"}, why)


def _jinja(draft: Draft, line: SourceLine) -> None:
    if str(line.value).endswith(".jinja"):
        draft.keep(line, "chat.template", line.value)
    else:
        draft.refuse(line, "write this text to a file that ends in `.jinja`, and give its path as `chat.template`")


def _plugin(draft: Draft, line: SourceLine) -> None:
    names = line.value if isinstance(line.value, list) else [line.value]
    other = [
        str(name) for name in names if not any(part in str(name) for part in ("liger", "cut_cross_entropy", "kernels"))
    ]
    trackers = [name for name in other if "swanlab" in name]
    if not other:
        draft.leave(line, KERNEL)
    elif other == trackers:
        draft.leave(line, LOGGING)
    else:
        last = ", ".join(name.rpartition(".")[2] for name in other)
        draft.refuse(line, f"peftchat has no such part: {last}", blocks=any("diffusion" in name for name in other))


def _init(draft: Draft, line: SourceLine) -> None:
    value = line.value
    if as_bool(value) is True:
        draft.leave(line, "PEFT's default, as it is here")
    elif value in ("gaussian", "orthogonal"):
        draft.keep(line, "adapter.init_lora_weights", value)
    elif isinstance(value, str) and value.startswith(("pissa", "olora", "loftq", "eva", "corda")):
        name = value.split("_")[0]
        draft.keep(line, "adapter.variant", name)
    else:
        draft.refuse(line, f"`{shown(value)}` is not among peftchat's initial values of an adapter")


def _per_epoch(draft: Draft, line: SourceLine) -> None:
    """Take a number of evaluations or checkpoints in an epoch, whose steps depend on the data."""
    kind = line.key.partition("s_per")[0]
    count = as_number(line.value)
    if count == 0:
        draft.keep(line, f"training.{kind}_strategy", "no")
    elif count == 1:
        draft.keep(line, f"training.{kind}_strategy", "epoch")
    else:
        why = f"once an epoch; the steps of an epoch are not known here, so give `{kind}_steps` to have it more often"
        draft.change(line, {f"training.{kind}_strategy": "epoch"}, why)


def _steps(draft: Draft, line: SourceLine) -> None:
    kind = line.key.partition("_")[0]
    steps = as_number(line.value)
    if isinstance(steps, float) and 0 < steps < 1:
        why = "once an epoch; a share of all steps is not known here"
        draft.change(line, {f"training.{kind}_strategy": "epoch"}, why)
    else:
        draft.keep(line, f"training.{kind}_steps", line.value)


def _sharded_checkpointing(draft: Draft, line: SourceLine) -> None:
    if draft.get("gradient_checkpointing") is not None:
        draft.leave(line, "`gradient_checkpointing` is given and decides; results are the same")
    else:
        checkpointing().act(draft, line)


def _batch_size(draft: Draft, line: SourceLine) -> None:
    """Take the whole batch of a process, from which Axolotl computes the accumulation."""
    micro, whole_batch = as_number(draft.get("micro_batch_size")) or 1, as_number(line.value)
    if draft.get("gradient_accumulation_steps") is not None:
        draft.leave(line, "`gradient_accumulation_steps` is given, which decides")
    elif isinstance(whole_batch, int) and isinstance(micro, int) and whole_batch >= micro:
        why = "Axolotl divides it by `micro_batch_size`"
        draft.change(line, {"training.gradient_accumulation_steps": whole_batch // micro}, why)
    else:
        draft.refuse(line, "is less than `micro_batch_size`")


def _min_rate(draft: Draft, line: SourceLine) -> None:
    ratio = as_number(line.value)
    if ratio == 0:
        draft.leave(line, IS_OFF)
    elif draft.get("lr_scheduler") in (None, "cosine"):
        becomes = {"training.lr_scheduler_kwargs": {"min_lr_rate": ratio}}
        draft.drop("training.lr_scheduler_type")
        draft.change(
            line,
            {**becomes, "training.lr_scheduler_type": "cosine_with_min_lr"},
            "a cosine that ends at this share of the rate has a name of its own",
        )
    else:
        draft.leave(line, "only a cosine schedule reads it")


def _train_on_inputs(draft: Draft, line: SourceLine) -> None:
    draft.keep(line, "chat.loss_on", "everything" if as_bool(line.value) is True else "answers")


def _length(draft: Draft, line: SourceLine) -> None:
    meanings = {"drop": "drop", "raise": "error"}
    value = str(line.value)
    if value in meanings:
        draft.keep(line, "data.truncation", meanings[value])
    else:
        draft.change(line, {"data.truncation": "turns"}, "cut between turns, not within one")


def _attention_flag(name: str) -> Rule:
    def act(draft: Draft, line: SourceLine) -> None:
        if as_bool(line.value) is not True:
            draft.leave(line, IS_OFF)
        elif name == "auto":
            draft.leave(line, FASTEST)
        else:
            draft.keep(line, "model.attention", name)

    return by(act)


def _wandb(draft: Draft, line: SourceLine) -> None:
    tracker = "mlflow" if line.key.startswith("mlflow") else line.key.partition("_")[0].removeprefix("use")
    if as_bool(line.value) is False:
        draft.leave(line, IS_OFF)
        return
    why = f"reports to {tracker}; its project is set by the tracker's own variable"
    draft.change(line, {"training.report_to": [tracker]}, why)


def _tensorboard(draft: Draft, line: SourceLine) -> None:
    if as_bool(line.value) is True:
        draft.keep(line, "training.report_to", ["tensorboard"])
    else:
        draft.leave(line, IS_OFF)


def _base_adapter(draft: Draft, line: SourceLine) -> None:
    draft.refuse(line, OTHER_ADAPTER, blocks=True)


def _model_type(draft: Draft, line: SourceLine) -> None:
    if "Classification" in str(line.value):
        draft.refuse(line, "a classifier; peftchat trains models that write text", blocks=True)
    else:
        draft.leave(line, "the model's config names its architecture")


_QUANTIZATION = {"nf4": "nf4", "fp4": "fp4"}

_TABLE: Table = {
    "base_model": same("model.name"),
    "revision_of_model": same("model.revision"),
    "trust_remote_code": same("model.trust_remote_code"),
    "model_type": by(_model_type),
    "attn_implementation": attention(),
    **group(_attention_flag("auto"), "flash_attention xformers_attention sage_attention"),
    "sdp_attention": _attention_flag("sdpa"),
    "flex_attention": _attention_flag("flex_attention"),
    "eager_attention": _attention_flag("eager"),
    **group(deferred(), "adapter load_in_4bit load_in_8bit rl rl_beta simpo_gamma cpo_alpha dpo_beta"),
    **group(deferred(), " ".join(_PRECISION)),
    **group(deferred(), "lora_target_modules lora_target_linear"),
    "bnb_config_kwargs.bnb_4bit_use_double_quant": same("quantization.double"),
    "bnb_config_kwargs.bnb_4bit_quant_type": words("quantization.type", _QUANTIZATION, ""),
    "lora_r": same("adapter.r"),
    "lora_alpha": same("adapter.alpha"),
    "lora_dropout": same("adapter.dropout"),
    "peft_use_dora": variant("dora"),
    "peft_use_rslora": variant("rslora"),
    "peft_init_lora_weights": by(_init),
    "peft.loftq_config.loftq_bits": variant("loftq"),
    "loraplus_lr_ratio": loraplus(),
    "lora_model_dir": by(_base_adapter),
    "chat_template": by(_template),
    "chat_template_jinja": by(_jinja),
    "chat_template_kwargs": whole(lambda draft, line: draft.keep(line, "chat.template_kwargs", line.value)),
    "default_system_message": same("chat.system"),
    "train_on_inputs": by(_train_on_inputs),
    **DATASETS,
    "sequence_len": same("data.max_length"),
    "excess_length_strategy": by(_length),
    "sample_packing": same("data.packing"),
    "pad_to_multiple_of": same("data.pad_to_multiple_of"),
    "val_set_size": held_out(),
    "learning_rate": same("training.learning_rate"),
    "num_epochs": same("training.num_train_epochs"),
    "max_steps": same("training.max_steps"),
    "micro_batch_size": same("training.per_device_train_batch_size"),
    "gradient_accumulation_steps": same("training.gradient_accumulation_steps"),
    "eval_batch_size": same("training.per_device_eval_batch_size"),
    "batch_size": by(_batch_size),
    "optimizer": words("training.optim", OPTIMIZERS, OPTIMIZER_WHY, otherwise=NO_OPTIMIZER),
    "lr_scheduler": words("training.lr_scheduler_type", SCHEDULES, "", otherwise=NO_SCHEDULE),
    "lr_scheduler_kwargs": whole(lambda draft, line: draft.keep(line, "training.lr_scheduler_kwargs", line.value)),
    "cosine_min_lr_ratio": by(_min_rate),
    **group(same("training.warmup_steps"), "warmup_steps warmup_ratio"),
    "weight_decay": same("training.weight_decay"),
    "max_grad_norm": same("training.max_grad_norm"),
    "adam_beta1": same("training.adam_beta1"),
    "adam_beta2": same("training.adam_beta2"),
    **group(same("training.adam_epsilon"), "adam_epsilon adam_eps"),
    "gradient_checkpointing": checkpointing(),
    "gradient_checkpointing_kwargs": whole(
        lambda draft, line: draft.keep(line, "training.gradient_checkpointing_kwargs", line.value)
    ),
    "torch_compile": words("training.torch_compile", {True: True, False: False, "auto": None}, "peftchat decides"),
    "seed": same("training.seed"),
    **group(by(_per_epoch), "evals_per_epoch saves_per_epoch"),
    **group(by(_steps), "eval_steps save_steps"),
    **group(
        words("training.eval_strategy", _STRATEGIES, "", otherwise="is not a strategy here"),
        "eval_strategy evaluation_strategy",
    ),
    "save_strategy": words("training.save_strategy", _STRATEGIES, "checkpoints are written each epoch"),
    "save_total_limit": same("training.save_total_limit"),
    "logging_steps": same("training.logging_steps"),
    "load_best_model_at_end": same("training.load_best_model_at_end"),
    "metric_for_best_model": same("training.metric_for_best_model"),
    "early_stopping_patience": same("training.early_stopping_patience"),
    "dataloader_num_workers": same("training.dataloader_num_workers"),
    "output_dir": same("output_dir"),
    "deepspeed": deepspeed(),
    "fsdp": fsdp(),
    "fsdp_config": inert("ZeRO needs no such settings"),
    **group(fsdp_offload(), "fsdp_config.offload_params fsdp_config.fsdp_offload_params"),
    **group(
        by(_sharded_checkpointing), "fsdp_config.activation_checkpointing fsdp_config.fsdp_activation_checkpointing"
    ),
    **group(by(_wandb), "wandb_project use_wandb mlflow_tracking_uri trackio_project_name"),
    **group(same("training.run_name"), "wandb_name mlflow_run_name trackio_run_name"),
    "use_tensorboard": by(_tensorboard),
    "orpo_alpha": same("orpo.beta"),
    "dpo_loss_type": words("dpo.loss_type", {name: name for name in ("sigmoid", "hinge", "ipo", "robust")}, ""),
    "dpo_label_smoothing": refused("only `dpo.loss_type: robust` smooths labels here"),
    "kto_desirable_weight": same("kto.desirable_weight"),
    "kto_undesirable_weight": same("kto.undesirable_weight"),
    "plugins": by(_plugin),
    **AXOLOTL_LEFT,
}


def _finish(draft: Draft) -> None:
    _adapter(draft)
    bf16 = any(as_bool(draft.get(key)) in (True, "auto") for key in ("bf16", "bfloat16"))
    is_auto = not any(draft.get(key) is not None for key in _PRECISION)
    fp16 = draft.is_on("fp16") or draft.is_on("float16")
    lines = draft.take(*_PRECISION)
    precision(draft, bfloat16=bf16 or is_auto, float16=fp16 and not bf16, lines=lines, mixed=False)
    ask_targets(draft)
    _objective(draft)
    finish_data(draft)
    if draft.values.get("method") != "full":
        draft.assume("adapter.r", 8, "PEFT's default, as Axolotl has none")
        draft.assume("adapter.alpha", 8, "PEFT's default, as Axolotl has none")
    because = "Axolotl's default"
    draft.assume("training.num_train_epochs", 1.0, because)
    draft.assume("training.gradient_accumulation_steps", 1, because)
    draft.assume("training.per_device_train_batch_size", 1, because)
    draft.assume("data.max_length", 512, because)
    draft.assume("data.packing", False, because)
    if draft.values.get("objective") == "simpo":
        draft.assume("simpo.beta", 0.1, "TRL's default")
        draft.assume("simpo.gamma", 0.5, "TRL's default")
    draft.assume("data.truncation", "drop", f"{because}: examples that are too long are dropped")


def _adapter(draft: Draft) -> None:
    lines = {key: line for key in ("adapter", "load_in_4bit", "load_in_8bit") for line in draft.take(key)}
    name = draft.get("adapter")
    if name not in (None, "lora", "qlora"):
        draft.refuse(lines.pop("adapter"), f"`{shown(name)}` is not among peftchat's variants by that name")
    if name == "qlora" and not draft.is_on("load_in_4bit"):
        draft.refuse(lines.pop("adapter"), "QLoRA needs `load_in_4bit: true`, in Axolotl too")
    given = {"adapter": "adapter", "load_in_4bit": "4bit", "load_in_8bit": "8bit"}
    method(
        draft,
        has_adapter=name is not None,
        in_4bit=draft.is_on("load_in_4bit"),
        in_8bit=draft.is_on("load_in_8bit"),
        lines={given[key]: line for key, line in lines.items()},
    )
    chosen = draft.take("lora_target_modules", "lora_target_linear")
    for line in chosen:
        if line.key == "lora_target_linear":
            if as_bool(line.value) is True:
                draft.keep(line, "adapter.target_modules", "all-linear")
            else:
                draft.leave(line, "off; the list of modules decides")
        elif line.value is None or line.value == []:
            draft.leave(line, "empty: `lora_target_linear` decides")
        elif draft.is_on("lora_target_linear"):
            draft.leave(line, "`lora_target_linear` takes in all of them")
        else:
            targets().act(draft, line)


def _objective(draft: Draft) -> None:
    lines = {line.key: line for line in draft.take("rl", "rl_beta", "dpo_beta", "simpo_gamma", "cpo_alpha")}
    rl = lines.pop("rl", None)
    name = None if rl is None else rl.value
    objective = offered_objective(_OBJECTIVES.get(str(name)))
    if rl is not None and objective is None:
        if name is None or as_bool(name) is False:
            draft.leave(rl, "none: the answers of conversations are learned")
        else:
            draft.refuse(rl, f"`{name}` is not among peftchat's objectives: {', '.join(OBJECTIVES)}", blocks=True)
    elif rl is not None:
        draft.keep_all(rl, {"objective": objective} | ({"dpo.loss_type": "ipo"} if name == "ipo" else {}))
    if objective == "simpo" and rl is not None and as_number(draft.get("cpo_alpha")) != 0:
        why = "adds the mean loss of the chosen answers unless `cpo_alpha: 0` is written, and SimPO here never does"
        draft.lines.remove(draft.line_of("rl"))  # type: ignore[arg-type]
        draft.refuse(rl, why)
    for key, line in lines.items():
        if line.value is None:
            draft.leave(line, EMPTY)
        elif objective is None:
            draft.leave(line, "concerns an objective that is off or refused")
        elif key in ("rl_beta", "dpo_beta"):
            draft.keep(line, f"{objective}.beta", line.value)
        elif key == "simpo_gamma" and objective == "simpo":
            draft.keep(line, "simpo.gamma", line.value)
        elif key == "cpo_alpha" and as_number(line.value) == 0:
            draft.leave(line, IS_OFF)
        else:
            draft.refuse(line, f"`objective: {objective}` has no such weight")


AXOLOTL = Tool(
    name="axolotl",
    title="Axolotl",
    table=_TABLE,
    marks=names(
        "base_model micro_batch_size sequence_len val_set_size num_epochs sample_packing lora_target_linear "
        "dataset_prepared_path evals_per_epoch saves_per_epoch pretraining_dataset"
    ),
    finish=_finish,
)
