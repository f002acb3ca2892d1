"""TRL: the YAML files of its command line, and the flags of `trl sft` and its kin in shell scripts."""

import re
from collections.abc import Mapping
from typing import Any

from peftchat.importing.draft import EMPTY, IS_OFF, Draft, SourceLine, as_bool, as_number, shown
from peftchat.importing.rules import Rule, Table, by, deferred, group, inert, refused, same, whole, words
from peftchat.importing.shared_rules import (
    KERNEL,
    LAUNCH,
    LOGGING,
    NOT_TEXT,
    OBJECTIVES,
    PREPARED,
    ask_targets,
    attention,
    method,
    offered_objective,
    precision,
    targets,
    variant,
)
from peftchat.importing.source_file import SourceFile
from peftchat.importing.tool import Tool, names
from peftchat.importing.training_arguments import TRAINING_ARGUMENTS, assume_training_arguments
from peftchat.recipe.document import SourceLocation

_PRECISION = ("bf16", "fp16")
_METHOD = ("use_peft", "load_in_4bit", "load_in_8bit")
_COMMAND = re.compile(r"\b(?:trl\s+|scripts?/)(\w+)\b")
_OBJECTIVE_KEY = "command"

_TRAINERS = names("sft dpo kto orpo cpo grpo rloo reward ppo online_dpo gkd nash_md xpo prm")
_BETA = ("beta", "loss_type", "label_smoothing", "simpo_gamma", "cpo_alpha", "rpo_alpha")
_DROPOUT = ("lora_dropout", "disable_dropout")
_DPO_LOSSES = ("sigmoid", "hinge", "ipo", "robust")
_REWARDS = "learns from rewards; peftchat learns from answers and pairs"

_RATES = {"sft": 2e-5, "dpo": 1e-6, "kto": 1e-6, "orpo": 1e-6, "cpo": 1e-6, "simpo": 1e-6}
"""The default learning rates of TRL's trainers."""


def _dtype(draft: Draft, line: SourceLine) -> None:
    name = str(line.value).removeprefix("torch.")
    if name == "auto":
        draft.change(line, {"model.dtype": "bfloat16"}, "the usual dtype of published weights; `auto` is not offered")
    else:
        draft.keep(line, "model.dtype", name)


def _columns(name: str) -> Rule:
    def act(draft: Draft, line: SourceLine) -> None:
        if line.value == name or (name == "messages" and line.value == "text"):
            draft.leave(line, "fields are found by their usual names")
        else:
            draft.keep(line, f"data.train.0.columns.{name}", line.value)

    return by(act)


def _text_field(draft: Draft, line: SourceLine) -> None:
    if line.value in ("messages", "conversations"):
        draft.leave(line, "fields are found by their usual names")
    elif line.value == "text":
        draft.leave(line, "conversations need no field of plain text; a `text` of turns is read as `guanaco`")
    else:
        draft.refuse(line, "plain text without turns; peftchat trains turns of a chat", blocks=True)


def _switch(key: str, on: Any, off: Any) -> Rule:
    def act(draft: Draft, line: SourceLine) -> None:
        draft.keep(line, key, on if as_bool(line.value) is True else off)

    return by(act)


def _test_split(draft: Draft, line: SourceLine) -> None:
    if draft.get("eval_strategy") in (None, "no", False):
        draft.leave(line, "`eval_strategy` is off, so it is not read")
    elif draft.get("dataset_name") is not None:
        becomes = {"data.eval.0.path": draft.get("dataset_name"), "data.eval.0.split": line.value}
        draft.keep_all(line, becomes)
    else:
        draft.leave(line, "no data set is named")


def _mixture(draft: Draft, line: SourceLine) -> None:
    """Take the list `datasets` of a file, each with its path, subset, split and columns."""
    entries = line.value if isinstance(line.value, list) else []
    becomes: dict[str, Any] = {}
    for at, entry in enumerate(entries):
        if not isinstance(entry, Mapping):
            continue
        names = {"path": "path", "name": "subset", "split": "split", "data_files": "data_files"}
        for key, value in entry.items():
            if key == "data_files":
                draft.refuse(line, "files within a data set; give each file as a source of `data.train`")
                return
            if key in names:
                becomes[f"data.train.{at}.{names[key]}"] = value
    draft.keep_all(line, becomes)


def _chat_template(draft: Draft, line: SourceLine) -> None:
    if str(line.value).endswith(".jinja"):
        draft.keep(line, "chat.template", line.value)
    else:
        draft.refuse(line, "save that tokenizer's template as a `.jinja` file, and give its path as `chat.template`")


def _launcher_file(draft: Draft, line: SourceLine) -> None:
    name = str(line.value)
    stage = re.search(r"zero_?([123])", name)
    if stage is not None:
        strategy = "zero3" if stage[1] == "3" else "zero2"
        draft.change(line, {"distributed.strategy": strategy}, "by its name; peftchat starts the processes")
    elif "fsdp" in name:
        draft.change(line, {"distributed.strategy": "zero3"}, "ZeRO-3 shards the same; peftchat starts the processes")
    else:
        draft.leave(line, "peftchat starts one process on each GPU by itself")


def _reference(draft: Draft, line: SourceLine) -> None:
    draft.leave(line, "how a reference model is kept; here it is the base with the adapter switched off")


_TABLE: Table = {
    **TRAINING_ARGUMENTS,
    _OBJECTIVE_KEY: deferred(),
    "model_name_or_path": same("model.name"),
    "model_revision": same("model.revision"),
    "trust_remote_code": same("model.trust_remote_code"),
    **group(by(_dtype), "dtype torch_dtype"),
    "attn_implementation": attention(),
    **group(deferred(), " ".join((*_METHOD, *_PRECISION, *_BETA, *_DROPOUT))),
    "bnb_4bit_quant_type": words("quantization.type", {"nf4": "nf4", "fp4": "fp4"}, ""),
    "use_bnb_nested_quant": same("quantization.double"),
    "lora_r": same("adapter.r"),
    "lora_alpha": same("adapter.alpha"),
    "lora_target_modules": targets(),
    "lora_modules_to_save": refused("an adapter trains no whole modules beside it; embeddings of added tokens alone"),
    "lora_target_parameters": inert("`all-linear` includes the experts of a mixture"),
    "lora_task_type": inert("a model that writes text, as it is here"),
    "use_rslora": variant("rslora"),
    "use_dora": variant("dora"),
    "dataset_name": same("data.train.0.path"),
    "dataset_config": same("data.train.0.subset"),
    "dataset_train_split": same("data.train.0.split"),
    "dataset_test_split": by(_test_split),
    "datasets": whole(_mixture),
    "dataset_text_field": by(_text_field),
    "dataset_streaming": inert(PREPARED),
    "test_split_size": same("data.eval_fraction"),
    "chat_template_path": by(_chat_template),
    "eos_token": same("chat.end_token"),
    **group(same("data.max_length"), "max_length max_seq_length"),
    "truncation_mode": words(
        "data.truncation", {"keep_start": "turns", "keep_end": "drop_first_turns"}, "cut between turns, not within one"
    ),
    "packing": same("data.packing"),
    "pad_to_multiple_of": words("data.pad_to_multiple_of", {"auto": None}, "peftchat's own", otherwise="is not `auto`"),
    "assistant_only_loss": _switch("chat.loss_on", "answers", "everything"),
    "completion_only_loss": _switch("chat.loss_on", "last_answer", "everything"),
    "config_file": by(_launcher_file),
    "router_aux_loss_coef": refused("peftchat adds no loss of routers"),
    "shuffle_dataset": inert("examples are drawn at random in any case"),
    "model_init_kwargs": refused("see the section `model` of a recipe"),
    **group(
        inert(PREPARED),
        "dataset_num_proc dataset_kwargs packing_strategy padding_free eval_packing pad_token max_prompt_length "
        "max_completion_length dataset_batch_size",
    ),
    **group(inert(KERNEL), "activation_offloading bnb_4bit_quant_storage"),
    **group(by(_reference), "precompute_ref_log_probs precompute_ref_batch_size"),
    **group(
        refused("a setting of DPO that peftchat does not have", unless=(None, False, 0, "reverse_kl")),
        "loss_weights ld_alpha f_divergence_type use_weighting sync_ref_model reference_free ref_model_init_kwargs",
    ),
    **group(
        inert("concerns a setting that is off or refused"),
        "f_alpha_divergence_coef discopop_tau ref_model_mixup_alpha ref_model_sync_steps",
    ),
    **group(
        refused(_REWARDS, blocks=True),
        "reward_funcs reward_model_name_or_path num_generations use_vllm vllm_mode reward_model_path",
    ),
    "ignore_bias_buffers": inert(LAUNCH),
    "gradient_checkpointing_kwargs": TRAINING_ARGUMENTS["gradient_checkpointing_kwargs"],
    **group(inert(LAUNCH), "env accelerate_config"),
    **group(inert(LOGGING), "log_completions"),
    **group(refused(NOT_TEXT), "max_pixels image_size"),
}


def _prepare(source: SourceFile) -> SourceFile:
    """Find the trainer that a script, or a comment of a file, names: it is not among the keys."""
    text = " ".join(source.command) if source.command else source.text
    found = {match[1]: match for match in _COMMAND.finditer(text) if match[1] in _TRAINERS}
    if len(found) != 1 or _OBJECTIVE_KEY in source.document.values:
        return source
    ((name, match),) = found.items()
    around = source.document.place(())
    line = around.line if source.command else text[: match.start()].count("\n") + 1
    values = {_OBJECTIVE_KEY: name, **source.document.values}
    source.document.places[(_OBJECTIVE_KEY,)] = SourceLocation(around.name, line, around.file)
    return SourceFile(source.path, source.text, type(source.document)(values, source.document.places), source.command)


def _finish(draft: Draft) -> None:
    _method(draft)
    fp16 = draft.is_on("fp16")
    is_off = as_bool(draft.get("bf16")) is False
    lines = draft.take(*_PRECISION)
    if "model.dtype" in draft.values:
        for line in lines:
            draft.leave(line, "`model.dtype` decides in what is computed")
    else:
        precision(draft, bfloat16=not fp16 and not is_off, float16=fp16, lines=lines, mixed=True)
    objective = _objective(draft)
    ask_targets(draft)
    _dropout(draft, objective)
    if draft.get("use_bnb_nested_quant") is None and draft.values.get("quantization.bits") == 4:
        draft.assume("quantization.double", False, "TRL's default")
    draft.assume("chat.template", "model", "TRL writes conversations by the model's own template")
    draft.assume("data.max_length", 1024, "TRL's default")
    if objective == "sft":
        draft.assume("data.packing", False, "TRL's default")
        draft.ask("data.train", "conversations are read, or prompts with answers; TRL also trains plain `text`")
        if "chat.loss_on" not in draft.values and draft.get("dataset_text_field") != "prompt":
            draft.assume(
                "chat.loss_on",
                "everything",
                "TRL's default for `messages`; of `prompt` and `completion` it trains the latter",
            )
    assume_training_arguments(draft, learning_rate=_RATES.get(objective, 2e-5))


def _dropout(draft: Draft, objective: str) -> None:
    """Take the dropout of an adapter, which TRL's trainers of pairs switch off unless they are told not to."""
    is_off = objective != "sft" and as_bool(draft.get("disable_dropout")) is not False
    for line in draft.take(*_DROPOUT):
        if line.value is None:
            draft.leave(line, EMPTY)
        elif line.key == "disable_dropout":
            draft.leave(line, "`adapter.dropout` says it")
        elif is_off and as_number(line.value):
            draft.change(line, {"adapter.dropout": 0.0}, "TRL switches dropout off for this objective")
        else:
            draft.keep(line, "adapter.dropout", line.value)
    if draft.values.get("method") != "full" and not is_off:
        draft.assume("adapter.dropout", 0.05, "TRL's default")


def _method(draft: Draft) -> None:
    given = {line.key: line for line in draft.take(*_METHOD)}
    names = {"use_peft": "adapter", "load_in_4bit": "4bit", "load_in_8bit": "8bit"}
    method(
        draft,
        has_adapter=draft.is_on("use_peft"),
        in_4bit=draft.is_on("load_in_4bit"),
        in_8bit=draft.is_on("load_in_8bit"),
        lines={names[key]: line for key, line in given.items()},
    )


def _objective(draft: Draft) -> str:
    """Set the objective: by the command, or by the keys where there is none."""
    command = draft.get(_OBJECTIVE_KEY)
    given = draft.take(*_BETA)
    objective = str(command) if command else "dpo" if any(line.key == "beta" for line in given) else "sft"
    if objective == "cpo" and draft.get("loss_type") == "simpo":
        objective = "simpo"
    for line in draft.take(_OBJECTIVE_KEY):
        if offered_objective(objective) is None:
            why = f"`{objective}` is not among peftchat's objectives: {', '.join(OBJECTIVES)}"
            draft.refuse(line, why, blocks=True)
        else:
            draft.keep(line, "objective", objective)
    if command is None:
        draft.assume("objective", objective, "the file has a `beta`, as preferences have")
        draft.ask("objective", f"the command, which is not in the file, says it; `{objective}` is taken")
    for line in given:
        value = as_number(line.value)
        if line.value is None:
            draft.leave(line, EMPTY)
        elif objective == "sft" or offered_objective(objective) is None:
            _of_sft(draft, line)
        elif line.key == "beta":
            draft.keep(line, f"{objective}.beta", value)
        elif line.key == "loss_type":
            _loss(draft, line, objective)
        elif line.key == "simpo_gamma" and objective == "simpo":
            draft.keep(line, "simpo.gamma", value)
        elif line.key == "cpo_alpha" and objective == "cpo":
            draft.keep(line, "cpo.alpha", value)
        elif line.key == "rpo_alpha" and objective == "dpo":
            draft.keep(line, "dpo.rpo_alpha", value)
        elif line.key == "label_smoothing" and draft.get("loss_type") == "robust":
            draft.keep(line, "dpo.label_smoothing", value)
        elif value == 0:
            draft.leave(line, IS_OFF)
        else:
            draft.refuse(line, f"`objective: {objective}` has no such setting")
    return objective


def _of_sft(draft: Draft, line: SourceLine) -> None:
    if line.key == "loss_type" and line.value not in ("nll", "chunked_nll"):
        draft.refuse(line, f"`{shown(line.value)}` is another loss than peftchat's mean over answers")
    else:
        draft.leave(line, "the mean over answers, as it is here, or off")


def _loss(draft: Draft, line: SourceLine, objective: str) -> None:
    names = line.value if isinstance(line.value, list) else [line.value]
    if names == ["simpo"] and as_number(draft.get("cpo_alpha")) == 0:
        draft.keep_all(line, {})
    elif names == ["simpo"]:
        draft.refuse(line, "adds the mean loss of the chosen answers unless `cpo_alpha: 0` is written")
    elif objective == "dpo" and sorted(map(str, names)) == ["sft", "sigmoid"]:
        draft.keep(line, "dpo.rpo_alpha", 1.0)
    elif len(names) == 1 and objective in ("dpo", "cpo") and names[0] in _DPO_LOSSES:
        draft.keep(line, f"{objective}.loss_type", names[0])
    else:
        draft.refuse(line, f"`{shown(line.value)}` is not among the losses of `objective: {objective}`")


TRL = Tool(
    name="trl",
    title="TRL",
    table=_TABLE,
    marks=names(
        "dataset_name dataset_train_split use_peft max_length packing dataset_text_field assistant_only_loss "
        "lora_target_modules beta dataset_config"
    ),
    finish=_finish,
    prepare=_prepare,
)
