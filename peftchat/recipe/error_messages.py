"""Error messages of a recipe: names of other tools, former names, and pydantic's errors in plain words."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, get_args

from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from peftchat.errors import UserError
from peftchat.recipe.document import Document, Keys, dotted
from peftchat.recipe.schema import Recipe
from peftchat.strict_model import StrictModel
from peftchat.variants import ADAPTERS, Adapter, get_adapter

FORMER_KEYS: Mapping[tuple[str, str], str] = {
    ("chat", "special_text"): "special_token_text",
    ("chat", "empty_rows"): "untrainable_examples",
    ("data", "max_train_rows"): "max_train_samples",
    ("data", "max_eval_rows"): "max_eval_samples",
    ("training", "rows_per_step"): "global_batch_size",
    ("training", "max_tokens"): "max_train_tokens",
    ("training", "max_minutes"): "max_train_minutes",
}
"""(section, key of an older version) -> the key today."""

FORMER_SOURCE_KEYS: Mapping[str, str] = {
    "top_k": "oasst_top_k",
    "name": "subset",
    "config": "subset",
    "config_name": "subset",
    "dataset_config_name": "subset",
    "commit": "revision",
    "lang": "languages",
    "language": "languages",
}
"""Key of an older version or another tool in an entry of `data.train` or `data.eval` -> the key today."""

FORMER_VALUES: Mapping[Keys, Mapping[str, str]] = {
    ("model", "attention"): {"per_dialogue": "varlen"},
    ("chat", "special_token_text"): {"text": "escape", "refuse": "error"},
    ("chat", "untrainable_examples"): {"refuse": "error"},
    ("data", "truncation"): {"turns_leading": "drop_first_turns", "refuse": "error"},
}
"""Key -> the value of an older version -> the value today."""

RENAMED: Mapping[str, str] = {
    **{former: f"{section}.{key}" for (section, former), key in FORMER_KEYS.items()},
    "evaluation_strategy": "training.eval_strategy",
    "num_epochs": "training.num_train_epochs",
    "epochs": "training.num_train_epochs",
    "n_epochs": "training.num_train_epochs",
    "lr": "training.learning_rate",
    "batch_size": "training.per_device_train_batch_size",
    "micro_batch_size": "training.per_device_train_batch_size",
    "per_gpu_train_batch_size": "training.per_device_train_batch_size",
    "per_gpu_eval_batch_size": "training.per_device_eval_batch_size",
    "lr_scheduler": "training.lr_scheduler_type",
    "optimizer": "training.optim",
    "activation_checkpointing": "training.gradient_checkpointing",
    "activation_checkpointing_kwargs": "training.gradient_checkpointing_kwargs",
    "max_seq_length": "data.max_length",
    "max_seq_len": "data.max_length",
    "sequence_len": "data.max_length",
    "cutoff_len": "data.max_length",
    "block_size": "data.max_length",
    "sample_packing": "data.packing",
    "dataset": "data.train",
    "datasets": "data.train",
    "dataset_name": "data.train",
    "val_set_size": "data.eval_fraction",
    "max_samples": "data.max_train_samples",
    "base_model": "model.name",
    "model_name_or_path": "model.name",
    "model_id": "model.name",
    "model_revision": "model.revision",
    "torch_dtype": "model.dtype",
    "attn_implementation": "model.attention",
    "finetuning_type": "method",
    "rl": "objective",
    "stage": "objective",
    "pref_loss": "objective",
    "pref_beta": "dpo.beta",
    "lora_r": "adapter.r",
    "lora_rank": "adapter.r",
    "lora_alpha": "adapter.alpha",
    "lora_dropout": "adapter.dropout",
    "lora_target": "adapter.target_modules",
    "lora_target_modules": "adapter.target_modules",
    "bnb_4bit_quant_type": "quantization.type",
    "bnb_4bit_use_double_quant": "quantization.double",
    "chat_template": "chat.template",
    "system_prompt": "chat.system",
    "num_processes": "distributed.processes",
    "num_gpus": "distributed.processes",
    "num_machines": "distributed.nodes",
    "deepspeed": "distributed.deepspeed_config",
}
"""Another tool's or an older version's name -> ours."""

_DTYPE = "`model.dtype` decides the number type of the run."
_LOSS = "peftchat computes its own loss, on the learned positions only, which does not do this."
_PREPARED = "Rows are encoded, ordered and collated by peftchat; see `data`."
_LAUNCH = "Processes are started and joined as `distributed` says."
_RUN_FOLDER = "The run folder is written by peftchat in one form; it loads in stock transformers and peft."
_HUB = "peftchat does not upload: push the run folder when you have looked at it."
_REPORT = "peftchat writes `metrics.jsonl` and shows its own progress."
_EVAL = "Evaluation is the mean loss of the learned positions on the held-out rows."

UNSUPPORTED_KEYS: Mapping[str, str] = {
    "warmup_ratio": "Write `warmup_steps`: below 1 it is a share of all steps.",
    "overwrite_output_dir": "A run folder is never overwritten: choose another `output_dir`, or use `--resume`.",
    "do_train": "`peftchat train` always trains.",
    "do_eval": "Give `data.eval` or `data.eval_fraction` to evaluate.",
    "do_predict": "`peftchat chat` answers with the trained model.",
    "resume_from_checkpoint": "Use the flag `--resume`.",
    "output_dir": "It stands at the top level of the recipe, not in a section.",
    "load_in_4bit": "Write `method: qlora`; `quantization.bits` is 4 unless set.",
    "load_in_8bit": "Write `method: qlora` with `quantization: {bits: 8}`.",
    "bf16": _DTYPE,
    "fp16": _DTYPE,
    "bf16_full_eval": _DTYPE,
    "fp16_full_eval": _DTYPE,
    "tf32": _DTYPE,
    "torch_compile_backend": "`torch_compile` compiles by torch's default.",
    "torch_compile_mode": "`torch_compile` compiles by torch's default.",
    "label_smoothing_factor": _LOSS,
    "use_liger_kernel": _LOSS,
    "liger_kernel_config": _LOSS,
    "neftune_noise_alpha": "Noise on embeddings would also move the rows of the new tokens.",
    "average_tokens_across_devices": "It is always on: the loss is the mean over all learned tokens of a step.",
    "use_cache": "Training never uses the generation cache.",
    "auto_find_batch_size": "A batch that changes by itself cannot be repeated; lower the batch size by hand.",
    "optim_target_modules": "The optimizers that need it are not offered.",
    "torch_empty_cache_steps": "Lower `per_device_train_batch_size` or `data.max_length` if memory is short.",
    "logging_strategy": "Lines are logged every `logging_steps`.",
    "logging_first_step": "The first step is always logged.",
    "log_on_each_node": _REPORT,
    "logging_nan_inf_filter": "A loss is logged as it is, also when it is not a number.",
    "include_num_input_tokens_seen": "Tokens are always counted; see `run.json`.",
    "log_level": _REPORT,
    "log_level_replica": _REPORT,
    "disable_tqdm": _REPORT,
    "project": "Set it by the tracker's own environment variables.",
    "trackio_space_id": "Set it by the tracker's own environment variables.",
    "trackio_bucket_id": "Set it by the tracker's own environment variables.",
    "trackio_static_space_id": "Set it by the tracker's own environment variables.",
    "eval_delay": _EVAL,
    "prediction_loss_only": _EVAL,
    "eval_do_concat_batches": _EVAL,
    "eval_use_gather_object": _EVAL,
    "eval_accumulation_steps": _EVAL,
    "include_for_metrics": _EVAL,
    "batch_eval_metrics": _EVAL,
    "save_only_model": "A checkpoint always holds what `--resume` needs.",
    "save_on_each_node": _RUN_FOLDER,
    "enable_jit_checkpoint": _RUN_FOLDER,
    "greater_is_better": "It follows from `metric_for_best_model`.",
    "push_to_hub": _HUB,
    "hub_token": _HUB,
    "hub_private_repo": _HUB,
    "hub_model_id": _HUB,
    "hub_strategy": _HUB,
    "hub_always_push": _HUB,
    "hub_revision": _HUB,
    "ignore_data_skip": "A resumed run always goes on with the rows it has not seen.",
    "restore_callback_states_from_checkpoint": "A resumed run needs no such setting.",
    "full_determinism": "Set `seed`; runs on the same machine and versions repeat.",
    "use_cpu": "A CPU is used where there is no GPU; set CUDA_VISIBLE_DEVICES to an empty text to force it.",
    "accelerator_config": _LAUNCH,
    "parallelism_config": _LAUNCH,
    "local_rank": _LAUNCH,
    "ddp_find_unused_parameters": _LAUNCH,
    "ddp_bucket_cap_mb": _LAUNCH,
    "ddp_broadcast_buffers": _LAUNCH,
    "ddp_static_graph": _LAUNCH,
    "ddp_backend": _LAUNCH,
    "ddp_timeout": _LAUNCH,
    "fsdp": "Use `distributed.strategy: zero3`, which shards the same things.",
    "fsdp_config": "Use `distributed.strategy: zero3`, which shards the same things.",
    "debug": "Use the ordinary debuggers of Python and torch.",
    "skip_memory_metrics": "Peak memory is always in `run.json`.",
    "dataloader_drop_last": _PREPARED,
    "dataloader_pin_memory": _PREPARED,
    "dataloader_persistent_workers": _PREPARED,
    "dataloader_prefetch_factor": _PREPARED,
    "dataloader_multiprocessing_context": _PREPARED,
    "dataloader_in_order": _PREPARED,
    "remove_unused_columns": _PREPARED,
    "label_names": _PREPARED,
    "train_sampling_strategy": _PREPARED,
    "length_column_name": _PREPARED,
    "group_by_length": _PREPARED,
    "assistant_only_loss": "Use `chat.loss_on`.",
    "completion_only_loss": "Use `chat.loss_on`.",
    "train_on_inputs": "Use `chat.loss_on`.",
    "padding_free": "`data.packing` does it.",
    "neat_packing": "`data.packing` always keeps the conversations of a pack apart.",
    "eval_packing": "`data.packing` holds for training and evaluation.",
    "packing_strategy": "Packs are always filled with whole conversations.",
    "bias": "Biases of the base stay as they are.",
}
"""Name of a setting of transformers that is not accepted -> the reason and the fix."""


@dataclass(frozen=True)
class Problem:
    """One error in a recipe: its key, what is wrong, and the hint."""

    keys: Keys
    what: str
    hint: str | None = None

    def error(self, document: Document) -> UserError:
        """Return the problem as an error that shows its place."""
        return UserError(self.what, where=document.place(self.keys).of(self.keys), hint=self.hint)


def refuse(problems: Sequence[Problem], document: Document, name: str) -> None:
    """Raise one UserError that lists all problems by line; do nothing if there is none."""
    in_order = sorted(problems, key=lambda problem: document.place(problem.keys).line or 0)
    errors = [problem.error(document) for problem in in_order]
    if len(errors) == 1:
        raise errors[0]
    if errors:
        lines = "\n".join(f"  {error}" for error in errors)
        raise UserError(f"{len(errors)} problems\n{lines}", where=name)


def schema_problems(errors: Sequence[ErrorDetails], document: Document) -> list[Problem]:
    """Return one problem for each error that pydantic found in a recipe."""
    adapter = get_adapter(document.value(("adapter", "variant")) or "lora")
    return [_problem(error, adapter) for error in errors]


def _problem(error: ErrorDetails, adapter: type[Adapter] | None) -> Problem:
    keys, kind, given = tuple(error["loc"]), error["type"], error["input"]
    context = error.get("ctx", {})
    if kind == "extra_forbidden":
        return _unknown(keys, given, adapter)
    if kind == "missing":
        return _missing(keys)
    if kind == "literal_error":
        return _not_allowed(keys, given, context["expected"])
    if kind in ("model_type", "dict_type"):
        return Problem(keys, f"expected keys with values, got {_shown(given)}", _mapping_hint(keys, given))
    if kind in _EXPECTED:
        return Problem(keys, f"expected {_EXPECTED[kind]}, got {_shown(given)}", _type_hint(keys, kind, given))
    if kind in _BOUNDS:
        limit = next(iter(context.values()))
        shown = str(limit) if isinstance(limit, int) else f"{limit:g}"
        return Problem(keys, f"must be {_BOUNDS[kind]} {shown}, got {_shown(given)}")
    if kind in ("string_too_short", "too_short"):
        return Problem(keys, "is empty", _example(keys))
    if kind == "string_pattern_mismatch":
        return Problem(keys, f"is not of the right form, got {_shown(given)}", _example(keys))
    return Problem(keys, f"{error['msg']}, got {_shown(given)}")


_EXPECTED = {
    "string_type": "text",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "tuple_type": "a list",
}

_BOUNDS = {
    "greater_than": "greater than",
    "greater_than_equal": "at least",
    "less_than": "less than",
    "less_than_equal": "at most",
}


def _shown(value: object) -> str:
    """Return a value and its type in YAML's terms."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return f"the text `{value if len(value) <= 60 else value[:57] + '...'}`"
    if isinstance(value, Mapping):
        return "keys with values" if value else "an empty mapping"
    if isinstance(value, list | tuple):
        return "a list" if value else "an empty list"
    return "null" if value is None else f"the number {value}"


def _type_hint(keys: Keys, kind: str, given: object) -> str | None:
    if isinstance(given, str) and kind == "bool_type":
        word = {"yes": "true", "on": "true", "true": "true", "no": "false", "off": "false", "false": "false"}
        return f"Write `{word[given.lower()]}`, without quotes." if given.lower() in word else None
    if isinstance(given, str) and kind in ("int_type", "float_type"):
        try:
            float(given)
        except ValueError:
            return None
        return "Remove the quotes."
    if isinstance(given, bool | int | float) and kind == "string_type":
        return "Put it in quotes."
    if isinstance(given, str) and keys in (("data", "train"), ("data", "eval")):
        return f"Write `{keys[-1]}: [{{path: {given}}}]`."
    if kind == "tuple_type":
        return "Write it as a list: `[...]`, or one line a value that begins with `- `."
    return None


def _mapping_hint(keys: Keys, given: object) -> str | None:
    if isinstance(given, str) and keys[-2:-1] in (("train",), ("eval",)):
        return f"Write `{{path: {given}}}`."
    if not keys:
        return "A recipe begins with keys such as `model:` and `method:`."
    return None


def _not_allowed(keys: Keys, given: object, expected: str) -> Problem:
    if (current := FORMER_VALUES.get(keys, {}).get(str(given))) is not None:
        return Problem(keys, f"`{given}` is called `{current}` here")
    allowed = [word.strip("' ") for word in expected.replace(" or ", ",").split(",")]
    near = get_close_matches(str(given), allowed, n=1, cutoff=0.5)
    choices = ", ".join(f"`{word}`" for word in allowed)
    what = f"expected one of {choices}, got {_shown(given)}"
    return Problem(keys, what, f"Did you mean `{near[0]}`?" if near else None)


def _missing(keys: Keys) -> Problem:
    return Problem(keys, "missing", _example(keys))


def _example(keys: Keys) -> str | None:
    info = _field(keys)
    if info is None:
        return None
    if info.examples:
        return f"Add for example `{keys[-1]}: {info.examples[0]}`."
    return f"Add `{keys[-1]}:`. {info.description}"


def _field(keys: Keys) -> FieldInfo | None:
    """Return the field at a path of keys; list indices are skipped."""
    model: type[StrictModel] | None = Recipe
    found: FieldInfo | None = None
    for key in keys:
        if isinstance(key, int):
            continue
        if model is None or key not in model.model_fields:
            return None
        found = model.model_fields[key]
        model = section_of(found.annotation)
    return found


def section_of(annotation: Any) -> type[StrictModel] | None:
    """Return the section class in an annotation such as `Adapter | None` or `tuple[DataEntry, ...]`."""
    if isinstance(annotation, type) and issubclass(annotation, StrictModel):
        return annotation
    for part in get_args(annotation):
        if (found := section_of(part)) is not None:
            return found
    return None


def all_keys() -> dict[str, list[str]]:
    """Return every key's last name -> the sections that have it (`""` for the top level)."""
    homes: dict[str, list[str]] = {}
    for name, info in Recipe.model_fields.items():
        homes.setdefault(name, []).append("")
        section = section_of(info.annotation)
        for key in section.model_fields if section else ():
            homes.setdefault(key, []).append(name)
    for key in _settings_of_variants():
        homes.setdefault(key, []).append("adapter")
    return homes


def _settings_of_variants() -> list[str]:
    """Return the keys of the `adapter` section other than `variant`, of all variants."""
    return list(dict.fromkeys(key for adapter in ADAPTERS.values() for key in adapter.setting_names()))


def _unknown(keys: Keys, given: object, adapter: type[Adapter] | None) -> Problem:
    name, section = str(keys[-1]), dotted(keys[:-1])
    if section == "adapter" and adapter is not None and (new_name := adapter.new_name(name)):
        return Problem(keys, f"`{name}` is called `{new_name}` here")
    if section == "adapter" and adapter is not None and name in _settings_of_variants():
        return _of_another_variant(keys, adapter)
    inside = _field(keys[:-1])
    known = section_of(inside.annotation) if inside else Recipe
    if section == "adapter":
        known = adapter
    valid = list(known.model_fields) if known else []
    homes = [home for home in all_keys().get(name, []) if home != section]
    if name in UNSUPPORTED_KEYS:
        what = f"`{name}` is a known setting that peftchat does not pass on"
        return Problem(keys, what, UNSUPPORTED_KEYS[name])
    current = RENAMED.get(name) or (FORMER_SOURCE_KEYS.get(name) if isinstance(keys[-2:][0], int) else None)
    if current:
        return Problem(keys, f"`{name}` is called `{current}` here")
    if homes:
        return Problem(keys, "unknown key", _belongs(name, homes[0], keys))
    near = get_close_matches(name, valid, n=1)
    if near:
        return Problem(keys, "unknown key", f"Did you mean `{near[0]}`?")
    elsewhere = get_close_matches(name, list(all_keys()), n=1)
    if elsewhere:
        home = all_keys()[elsewhere[0]][0]
        return Problem(keys, "unknown key", f"Did you mean `{f'{home}.' if home else ''}{elsewhere[0]}`?")
    listed = ", ".join(f"`{key}`" for key in valid)
    return Problem(keys, "unknown key", f"Here can stand: {listed}.")


def _of_another_variant(keys: Keys, adapter: type[Adapter]) -> Problem:
    variant = adapter.name
    taken = ", ".join(f"`{key}`" for key in adapter.setting_names())
    others = [other.name for other in ADAPTERS.values() if keys[-1] in other.setting_names()]
    shown = ", ".join(others[:4]) + (", …" if len(others) > 4 else "")
    what = f"`{variant}` has no such setting; it belongs to {shown}"
    return Problem(keys, what, f"`{variant}` takes {taken}." if taken else f"`{variant}` takes no settings.")


def _belongs(name: str, home: str, keys: Keys) -> str:
    if not home:
        return f"`{name}` belongs at the top level, not in `{dotted(keys[:-1])}`."
    return f"`{name}` belongs in the section `{home}`."
