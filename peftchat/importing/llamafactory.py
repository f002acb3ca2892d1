"""LLaMA-Factory: the keys of its YAML and JSON files, and the flags of `llamafactory-cli train`."""

from peftchat.importing.draft import EMPTY, IS_OFF, Draft, SourceLine, as_bool, as_number, shown
from peftchat.importing.llamafactory_data import take_datasets
from peftchat.importing.llamafactory_left import LLAMAFACTORY_LEFT
from peftchat.importing.rules import Rule, Table, by, deferred, group, inert, refused, same, words
from peftchat.importing.shared_rules import (
    OBJECTIVES,
    OTHER_ADAPTER,
    attention,
    held_out,
    loraplus,
    method,
    offered_objective,
    precision,
    targets,
    variant,
)
from peftchat.importing.source_file import SourceFile
from peftchat.importing.tool import Tool, names
from peftchat.importing.training_arguments import TRAINING_ARGUMENTS, assume_training_arguments

_PRECISION = ("bf16", "fp16", "pure_bf16")
_METHOD = ("finetuning_type", "quantization_bit")
_PREFERENCES = ("pref_loss", "pref_beta", "simpo_gamma", "pref_ftx", "dpo_label_smoothing")

TEMPLATES = {"llama3": "llama3", "chatml": "chatml"}

_LOSSES = {"sigmoid": "dpo", "hinge": "dpo", "ipo": "dpo", "orpo": "orpo", "simpo": "simpo"}


def template(draft: Draft, line: SourceLine) -> None:
    """Take the name of a template."""
    name = str(line.value)
    if name in TEMPLATES:
        draft.keep(line, "chat.template", TEMPLATES[name])
        return
    becomes: dict[str, object] = {"chat.template": "model"}
    if name.endswith("_nothink"):
        becomes["chat.template_kwargs"] = {"enable_thinking": False}
    why = f"the model's own template instead of LLaMA-Factory's copy for `{name}`; compare with `peftchat mask`"
    draft.change(line, becomes, why)


def _stage(draft: Draft, line: SourceLine) -> None:
    stage = str(line.value)
    if stage == "sft":
        draft.keep(line, "objective", "sft")
    elif stage == "dpo":
        objective = _LOSSES.get(str(draft.get("pref_loss") or "sigmoid"))
        if objective is None:
            draft.refuse(line, "`pref_loss` asks for a loss that peftchat does not have", blocks=True)
        else:
            draft.keep(line, "objective", objective)
    elif offered_objective(stage) is not None:
        draft.keep(line, "objective", stage)
    elif stage == "pt":
        draft.refuse(line, "plain text without turns; peftchat trains turns of a chat", blocks=True)
    else:
        draft.refuse(line, f"`{stage}` is not among peftchat's objectives: {', '.join(OBJECTIVES)}", blocks=True)


def _packing(draft: Draft, line: SourceLine) -> None:
    is_on = as_bool(line.value) is True
    if is_on and not draft.is_on("neat_packing"):
        why = "conversations of a pack do not attend to each other, as `neat_packing` has it"
        draft.change(line, {"data.packing": True}, why)
    else:
        draft.keep(line, "data.packing", is_on)


def _neat_packing(draft: Draft, line: SourceLine) -> None:
    if as_bool(line.value) is True:
        draft.keep(line, "data.packing", True)
    else:
        draft.leave(line, IS_OFF)


def _loss_on(name: str) -> Rule:
    def act(draft: Draft, line: SourceLine) -> None:
        if as_bool(line.value) is True:
            draft.keep(line, "chat.loss_on", name)
        else:
            draft.leave(line, IS_OFF)

    return by(act)


def _checkpointing_off(draft: Draft, line: SourceLine) -> None:
    draft.keep(line, "training.gradient_checkpointing", as_bool(line.value) is not True)


def _base_adapter(draft: Draft, line: SourceLine) -> None:
    draft.refuse(line, OTHER_ADAPTER, blocks=True)


def _thinking(draft: Draft, line: SourceLine) -> None:
    if as_bool(line.value) is False:
        draft.keep(line, "chat.template_kwargs", {"enable_thinking": False})
    else:
        draft.leave(line, "reasoning is written as the template does, as it is here")


_TABLE: Table = {
    **TRAINING_ARGUMENTS,
    "model_name_or_path": same("model.name"),
    "model_revision": same("model.revision"),
    "trust_remote_code": same("model.trust_remote_code"),
    "flash_attn": attention(),
    "attn_implementation": attention(),
    "adapter_name_or_path": by(_base_adapter),
    "stage": by(_stage),
    **group(deferred(), " ".join((*_METHOD, *_PRECISION, *_PREFERENCES, "dataset", "eval_dataset", "max_samples"))),
    "quantization_method": words(
        "quantization.type",
        {"bnb": None, "bitsandbytes": None},
        "bitsandbytes, as it is here",
        otherwise="is another quantization; peftchat trains on bitsandbytes' 4 or 8 bits",
    ),
    "quantization_type": words("quantization.type", {"nf4": "nf4", "fp4": "fp4"}, ""),
    "double_quantization": same("quantization.double"),
    "lora_rank": same("adapter.r"),
    "lora_alpha": same("adapter.alpha"),
    "lora_dropout": same("adapter.dropout"),
    "lora_target": targets(),
    "use_dora": variant("dora"),
    "use_rslora": variant("rslora"),
    "pissa_init": variant("pissa"),
    "pissa_iter": inert("PiSSA's matrices are computed exactly here"),
    "pissa_convert": inert("the run folder holds a plain LoRA in any case"),
    "loraplus_lr_ratio": loraplus(),
    "oft_block_size": same("adapter.oft_block_size"),
    "oft_target": targets(),
    "module_dropout": same("adapter.dropout"),
    "template": by(template),
    "default_system": same("chat.system"),
    "enable_thinking": by(_thinking),
    "train_on_prompt": _loss_on("everything"),
    "mask_history": _loss_on("last_answer"),
    "dataset_dir": inert("where the names of `dataset` were looked up"),
    "cutoff_len": same("data.max_length"),
    "packing": by(_packing),
    "neat_packing": by(_neat_packing),
    "val_size": held_out(),
    "mix_strategy": words(
        "data.resample", {"concat": None}, "all of all sources, as here", otherwise="needs a `weight` for each source"
    ),
    "interleave_probs": refused("give each source of `data.train` a `weight`"),
    "disable_gradient_checkpointing": by(_checkpointing_off),
    "use_reentrant_gc": inert("results are the same"),
    "early_stopping_steps": same("training.early_stopping_patience"),
    "disable_shuffling": refused("examples are drawn at random"),
    "kto_chosen_weight": same("kto.desirable_weight"),
    "kto_rejected_weight": same("kto.undesirable_weight"),
    **LLAMAFACTORY_LEFT,
}


def _finish(draft: Draft) -> None:
    _method(draft)
    fp16, pure = draft.is_on("fp16"), draft.is_on("pure_bf16")
    bf16 = pure or draft.is_on("bf16") or not fp16
    lines = draft.take(*_PRECISION)
    precision(draft, bfloat16=bf16 and not fp16, float16=fp16, lines=lines, mixed=not pure)
    _preferences(draft)
    take_datasets(draft)
    because = "LLaMA-Factory's default"
    if draft.values.get("method") != "full" and "adapter.oft_block_size" not in draft.values:
        rank = as_number(draft.get("lora_rank")) or 8
        draft.assume("adapter.r", 8, because)
        draft.assume("adapter.alpha", 2 * rank, f"{because}: twice the rank")
    draft.assume("chat.template", "model", because)
    draft.assume("data.packing", False, because)
    assume_training_arguments(draft, learning_rate=5e-5)


def _method(draft: Draft) -> None:
    given = {line.key: line for line in draft.take(*_METHOD)}
    lines: dict[str, SourceLine] = {}
    kind, bits = draft.get("finetuning_type") or "lora", as_number(draft.get("quantization_bit"))
    if (line := given.get("finetuning_type")) is not None:
        if kind in ("lora", "full"):
            lines["adapter"] = line
        elif kind == "oft":
            draft.keep_all(line, {"method": "qlora" if bits in (4, 8) else "lora", "adapter.variant": "oft"})
        else:
            why = f"`{kind}` trains some weights only; `model.freeze_layers` names layers that stay"
            draft.refuse(line, why, blocks=True)
    if (line := given.get("quantization_bit")) is not None:
        if bits in (4, 8):
            lines["4bit" if bits == 4 else "8bit"] = line
        elif bits is None:
            draft.leave(line, EMPTY)
        else:
            draft.refuse(line, f"`{shown(line.value)}` bits; bitsandbytes has 4 and 8")
    if kind == "oft":
        for line in (line for key, line in lines.items() if key != "adapter"):
            draft.keep(line, "quantization.bits", bits)
        return
    method(draft, has_adapter=kind != "full", in_4bit=bits == 4, in_8bit=bits == 8, lines=lines)


def _preferences(draft: Draft) -> None:
    objective = draft.values.get("objective", "sft")
    for line in draft.take(*_PREFERENCES):
        value = as_number(line.value)
        if line.value is None:
            draft.leave(line, EMPTY)
        elif objective == "sft":
            draft.leave(line, "concerns an objective that is off or refused")
        elif line.key == "pref_beta":
            draft.keep(line, f"{objective}.beta", value)
        elif line.key == "pref_loss":
            draft.keep_all(line, {"dpo.loss_type": value} if objective == "dpo" else {})
        elif line.key == "simpo_gamma" and objective == "simpo":
            draft.keep(line, "simpo.gamma", value)
        elif line.key == "pref_ftx" and objective == "dpo" and value:
            draft.keep(line, "dpo.rpo_alpha", value)
        elif value == 0:
            draft.leave(line, IS_OFF)
        else:
            draft.refuse(line, f"`objective: {objective}` has no such setting")
    if objective == "simpo":
        draft.assume("simpo.beta", 0.1, "LLaMA-Factory's default")
        draft.assume("simpo.gamma", 0.5, "LLaMA-Factory's default")


def _not_a_training(source: SourceFile) -> str | None:
    values = source.document.values
    if any(str(key).startswith("export_") for key in values):
        return "it writes a merged model; `peftchat merge` and `peftchat export` do that"
    if as_bool(values.get("do_predict")) is True and as_bool(values.get("do_train")) is not True:
        return "it answers questions; `peftchat generate` and `peftchat evaluate` do that"
    if "infer_backend" in values and "do_train" not in values:
        return "it answers questions; `peftchat chat` and `peftchat serve` do that"
    if "tokenized_path" in values and "do_train" not in values:
        return "it encodes data; `peftchat train` does that by itself"
    return None


LLAMAFACTORY = Tool(
    name="llamafactory",
    title="LLaMA-Factory",
    table=_TABLE,
    marks=names(
        "stage finetuning_type cutoff_len lora_rank lora_target dataset_dir template quantization_bit pref_beta "
        "overwrite_cache export_dir infer_backend"
    ),
    finish=_finish,
    not_a_training=_not_a_training,
)
