"""torchtune's data sets: functions with a source of their own, as sources of a recipe."""

import re

from peftchat.importing.draft import Draft, SourceLine, as_bool, shown
from peftchat.importing.rules import Table, by, deferred, inert, refused
from peftchat.importing.shared_rules import NOT_TEXT

_RAW_TEXT = "plain text without turns; peftchat trains turns of a chat"
_ALPACA = "the same question and answer as turns of a chat, without the headings `### Instruction:` of torchtune"

_BUILDERS = {
    "alpaca_dataset": ("tatsu-lab/alpaca", "alpaca", _ALPACA),
    "alpaca_cleaned_dataset": ("yahma/alpaca-cleaned", "alpaca", _ALPACA),
    "slimorca_dataset": ("Open-Orca/SlimOrca-Dedup", "sharegpt", ""),
    "chat_dataset": (None, "auto", ""),
    "instruct_dataset": (None, "auto", ""),
    "preference_dataset": (None, "preference", ""),
    "hh_rlhf_helpful_dataset": ("RLHFlow/HH-RLHF-Helpful-standard", "preference", ""),
    "stack_exchange_paired_dataset": ("lvwerra/stack-exchange-paired", "preference", ""),
    "grammar_dataset": ("liweili/c4_200m", "prompt_completion", ""),
    "samsum_dataset": ("Samsung/samsum", "prompt_completion", ""),
}
"""Function -> its source, our format, and why it is a change."""

_OWN_COLUMNS = {
    "stack_exchange_paired_dataset": {"prompt": "question", "chosen": "response_j", "rejected": "response_k"},
    "grammar_dataset": {"prompt": "input", "completion": "output"},
    "samsum_dataset": {"prompt": "dialogue", "completion": "summary"},
}
_COLUMNS = {
    "input": "prompt",
    "output": "completion",
    "prompt": "prompt",
    "chosen": "chosen",
    "rejected": "rejected",
    "instruction": "prompt",
}
_STYLES = {"sharegpt": "sharegpt", "openai": "messages"}
_PART = re.compile(r"([\w.-]+)\[(?::(\d+)%|(\d+)%:)\]")

_DEFERRED = (
    "_component_",
    "source",
    "data_files",
    "split",
    "subset",
    "name",
    "conversation_column",
    "conversation_style",
    "train_on_input",
    "packed",
    "new_system_prompt",
)


def _rules(start: str) -> Table:
    rules: Table = {
        **{f"{start}.{key}": deferred() for key in _DEFERRED},
        f"{start}.column_map.*": by(_column),
        f"{start}.column": refused(_RAW_TEXT, blocks=True),
        f"{start}.add_eos": inert("each answer ends with its end token"),
        f"{start}.partition": refused("a part that no recipe can name; write that part to a file"),
        f"{start}.filter_fn": refused("code that chooses records; apply it before"),
        f"{start}.split_across_pack": inert("packs hold whole conversations"),
        f"{start}.image_tag": refused(NOT_TEXT, blocks=True),
        f"{start}.max_seq_len": inert("`tokenizer.max_seq_len` says it"),
    }
    return rules


def _column(draft: Draft, line: SourceLine) -> None:
    kind = "train" if line.keys[0] == "dataset" else "eval"
    ours = _COLUMNS.get(str(line.keys[-1]))
    if ours is None:
        draft.refuse(line, f"`{line.keys[-1]}` is no field that peftchat reads")
    else:
        draft.keep(line, f"data.{kind}.0.columns.{ours}", line.value)


def _shuffle(draft: Draft, line: SourceLine) -> None:
    if as_bool(line.value) is True:
        draft.leave(line, "examples are drawn at random, as they are here")
    else:
        draft.refuse(line, "examples are drawn at random")


DATASETS: Table = {
    **_rules("dataset"),
    **_rules("dataset_val"),
    "datasets": refused("several data sets; give each as a source of `data.train`", blocks=True),
    "shuffle": by(_shuffle),
}
"""What becomes of the keys of torchtune's data sets."""


def finish_data(draft: Draft) -> None:
    """Turn the functions of data into sources; two parts of one source become a share that is held out."""
    splits = {kind: _split_part(draft, kind) for kind in ("dataset", "dataset_val")}
    train, held_out = splits["dataset"], splits["dataset_val"]
    is_one = (
        train is not None
        and held_out is not None
        and train[1:] == held_out[1:]
        and train[0] == held_out[0]
        and draft.get("dataset._component_") == draft.get("dataset_val._component_")
        and draft.get("dataset.source") == draft.get("dataset_val.source")
    )
    if is_one and train is not None:
        _hold_out(draft, train[1])
    else:
        _source(draft, "dataset_val", "eval")
    _source(draft, "dataset", "train", shares=is_one)


def _split_part(draft: Draft, kind: str) -> tuple[str, int] | None:
    """Return the split and the percent where it is cut, of `train[:95%]` and of `train[95%:]`."""
    part = _PART.fullmatch(str(draft.get(f"{kind}.split")))
    return None if part is None else (part[1], int(part[2] or part[3]))


def _hold_out(draft: Draft, percent: int) -> None:
    fraction = round(1 - percent / 100, 4)
    for line in draft.take(*(f"dataset_val.{key}" for key in _DEFERRED)):
        if line.key.endswith(".split"):
            why = "a share of this size, drawn at random instead of from the end"
            draft.change(line, {"data.eval_fraction": fraction}, why)
        else:
            draft.leave(line, "the share that is held out is of the same data")


def _source(draft: Draft, start: str, kind: str, *, shares: bool = False) -> None:
    to = f"data.{kind}.0"
    lines = {line.keys[-1]: line for line in draft.take(*(f"{start}.{key}" for key in _DEFERRED))}
    builder = lines.pop("_component_", None)
    if builder is None:
        for line in lines.values():
            draft.refuse(line, "no function of data is named beside it")
        return
    name = str(builder.value).rpartition(".")[2]
    if name not in _BUILDERS:
        is_text = "text_completion" in name or name in ("cnn_dailymail_articles_dataset", "wikitext_dataset")
        why = _RAW_TEXT if is_text else NOT_TEXT if "multimodal" in str(builder.value) else ""
        draft.refuse(builder, why or f"`{name}` is code of torchtune or of your own", blocks=True)
        for line in lines.values():
            draft.leave(line, "concerns data that is refused")
        return
    source, form, why = _BUILDERS[name]
    becomes = {f"{to}.columns.{ours}": theirs for ours, theirs in _OWN_COLUMNS.get(name, {}).items()}
    becomes |= {} if form == "auto" else {f"{to}.format": form}
    files, given = lines.pop("data_files", None), lines.get("source")
    if files is not None and given is not None and given.value in ("json", "csv", "parquet", "text"):
        draft.leave(lines.pop("source"), "a kind of file; `data_files` names it")
        draft.keep(files, f"{to}.path", files.value)
    elif files is not None:
        draft.refuse(files, "files within a data set; give each file as a source of `data.train`")
    elif given is None and source is not None:
        becomes[f"{to}.path"] = source
    if why:
        draft.change(builder, becomes, why)
    else:
        draft.keep_all(builder, becomes)
    for key, line in lines.items():
        _setting(draft, str(key), line, to, shares)
    if name.startswith("alpaca") and "train_on_input" not in lines and kind == "train":
        draft.assume("chat.loss_on", "everything", f"torchtune's default for {name}")


def _setting(draft: Draft, key: str, line: SourceLine, to: str, shares: bool) -> None:
    kind = to.split(".")[1]
    value = line.value
    if value is None:
        draft.leave(line, "empty, which stands for the tool's default")
    elif key == "source":
        draft.keep(line, f"{to}.path", value)
    elif key in ("subset", "name"):
        draft.keep(line, f"{to}.subset", value)
    elif key == "split":
        _take_split(draft, line, to, shares)
    elif key == "conversation_column":
        draft.keep(line, f"{to}.columns.messages", value)
    elif key == "conversation_style":
        if value in _STYLES:
            draft.keep(line, f"{to}.format", _STYLES[value])
        else:
            draft.refuse(line, f"`{shown(value)}` is not among: {', '.join(_STYLES)}")
    elif kind == "eval":
        draft.leave(line, "the settings of the training data hold for both")
    elif key == "train_on_input":
        draft.keep(line, "chat.loss_on", "everything" if as_bool(value) is True else "answers")
    elif key == "packed":
        draft.keep(line, "data.packing", value)
    else:
        draft.keep(line, "chat.system", value)


def _take_split(draft: Draft, line: SourceLine, to: str, shares: bool) -> None:
    part = _PART.fullmatch(str(line.value))
    if part is None and "[" not in str(line.value):
        draft.keep(line, f"{to}.split", line.value)
    elif part is not None and shares:
        draft.change(line, {f"{to}.split": part[1]}, "the rest is held out: `data.eval_fraction`")
    elif part is not None and part[2]:
        why = "a share of this size, drawn at random instead of from the beginning"
        draft.change(line, {f"{to}.split": part[1], f"{to}.weight": int(part[2]) / 100}, why)
    else:
        draft.refuse(line, "a part that no recipe can name; write that part to a file")
