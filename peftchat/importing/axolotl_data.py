"""Axolotl's data sets: their paths, types and fields as sources of a recipe."""

import re

from peftchat.importing.draft import IS_OFF, Draft, SourceLine, as_bool, shown
from peftchat.importing.rules import Rule, Table, by, inert, place, refused, same

RAW_TEXT = "plain text without turns; peftchat trains turns of a chat"

_ALPACA = "the same question and answer as turns of a chat, without the headings `### Instruction:` of Axolotl"

_TYPES = {
    "sharegpt": ("sharegpt", ""),
    "chat_template": ("auto", ""),
    "chat_template.default": ("auto", ""),
    "chat_template.argilla": ("auto", ""),
    "chat_template.default_no_rejected": ("auto", ""),
    "alpaca": ("alpaca", _ALPACA),
    "alpaca:chat": ("alpaca", _ALPACA),
    "alpaca_chat.load_qa": ("prompt_completion", _ALPACA),
    "alpaca_w_system.load_open_orca": ("prompt_completion", _ALPACA),
    "gpteacher": ("alpaca", _ALPACA),
    "oasst": ("guanaco", "the same talk as turns of a chat"),
    "summarizetldr": ("auto", _ALPACA),
}

_PAIRS = {
    "intel": {"prompt": "question"},
    "argilla": {"prompt": "instruction", "chosen": "chosen_response", "rejected": "rejected_response"},
    "icr": {"prompt": "input"},
    "ultra": {},
    "argilla_chat": {},
    "prompt_pairs": {},
    "default": {},
}
"""Kinds of preference data -> the fields that have another name there."""

_COLUMNS = {
    "field_messages": "messages",
    "message_field_role": "role",
    "message_field_content": "content",
    "field_thinking": "reasoning_content",
    "field_tools": "tools",
    "field_chosen": "chosen",
    "field_rejected": "rejected",
    "field_system": "system",
    "field_instruction": "prompt",
    "field_prompt": "prompt",
    "field_input": "context",
    "field_output": "completion",
    "field_completion": "completion",
    "field_human": "prompt",
    "field_model": "completion",
    "message_field_training": "train",
    "message_property_mappings.role": "role",
    "message_property_mappings.content": "content",
    "message_property_mappings.thinking": "reasoning_content",
    "message_property_mappings.reasoning_content": "reasoning_content",
    "message_property_mappings.tool_calls": "tool_calls",
    "type.field_system": "system",
    "type.field_instruction": "prompt",
    "type.field_prompt": "prompt",
    "type.field_input": "context",
    "type.field_output": "completion",
    "type.field_chosen": "chosen",
    "type.field_rejected": "rejected",
}

_SLICE = re.compile(r"([\w.-]+)\[:(\d+)(%?)\]")


def _type(draft: Draft, line: SourceLine) -> None:
    entry = f"{line.keys[0]}.{line.keys[1]}"
    name = str(line.value)
    to = place("data.train.*.format", line) if line.keys[0] == "datasets" else place("data.eval.*.format", line)
    family, _, kind = name.rpartition(".")
    if name in _TYPES:
        form, why = _TYPES[name]
        becomes = {} if form == "auto" else {to: form}
        if why:
            draft.change(line, becomes, why)
        else:
            draft.keep_all(line, becomes)
    elif name in ("completion", "pretrain", "text"):
        draft.refuse(line, RAW_TEXT, blocks=True)
    elif name.startswith("bradley_terry"):
        draft.refuse(line, "data of a reward model; peftchat learns from answers and pairs", blocks=True)
    elif draft.get("rl") is not None and family.split(".")[0] in ("chatml", "llama3", "zephyr") and kind in _PAIRS:
        base = to.removesuffix(".format")
        columns = {f"{base}.columns.{ours}": theirs for ours, theirs in _PAIRS[kind].items()}
        draft.change(line, columns, "the pairs as turns; `chat.template` says how turns are written")
    else:
        draft.refuse(line, f"`{name}` is code of Axolotl or of your own; name the fields in `columns` of {entry}")


def _split(draft: Draft, line: SourceLine) -> None:
    to = place("data.train.*" if line.keys[0] == "datasets" else "data.eval.*", line)
    take_split(draft, line, to)


def take_split(draft: Draft, line: SourceLine, to: str) -> None:
    """Take the name of a split, which may be followed by the part of it that is used.

    Args:
        draft: is written to.
        line: the split.
        to: our key of the source.
    """
    text = str(line.value)
    part = _SLICE.fullmatch(text)
    if "[" not in text:
        draft.keep(line, f"{to}.split", text)
    elif part is None or not int(part[2]):
        draft.refuse(line, f"`{text}` is a part that no recipe can name; write that part to a file")
    elif part[3]:
        why = "a share of this size, drawn at random instead of from the beginning"
        draft.change(line, {f"{to}.split": part[1], f"{to}.weight": int(part[2]) / 100}, why)
    elif to == "data.train.0" and len(draft.get("datasets") or [0]) == 1:
        draft.keep_all(line, {f"{to}.split": part[1], "data.max_train_samples": int(part[2])})
    else:
        draft.refuse(line, f"`{text}`: a number of examples of one source among several; give its `weight`")


def _roles(draft: Draft, line: SourceLine) -> None:
    names = line.value if isinstance(line.value, list) else [line.value]
    ours = str(line.keys[-1])
    base = place("data.train.*" if line.keys[0] == "datasets" else "data.eval.*", line)
    if ours not in ("system", "user", "assistant", "tool"):
        draft.refuse(line, f"`{ours}` is no role; expected system, user, assistant or tool")
        return
    draft.keep_all(line, {f"{base}.roles.{name}": ours for name in map(str, names) if name != ours})


def _roles_to_train(draft: Draft, line: SourceLine) -> None:
    names = line.value if isinstance(line.value, list) else [line.value]
    if names in (["assistant"], ["gpt"], ["model"]):
        draft.leave(line, "answers are trained, as they are here")
    else:
        draft.refuse(line, "`chat.loss_on` trains answers, the last one, or everything")


def _train_on_end(draft: Draft, line: SourceLine) -> None:
    if line.value == "turn":
        draft.leave(line, "each answer's end token is trained, as it is here")
    else:
        draft.refuse(line, f"`{shown(line.value)}`: peftchat trains the end token of each trained answer")


def _data_files(draft: Draft, line: SourceLine) -> None:
    names = line.value if isinstance(line.value, list) else [line.value]
    place_of = draft.get("datasets")
    path = place_of[line.keys[1]].get("path") if isinstance(place_of, list) and isinstance(line.keys[1], int) else None
    to = place("data.train.*.path" if line.keys[0] == "datasets" else "data.eval.*.path", line)
    if len(names) == 1 and path in ("json", "csv", "parquet", "text", "arrow"):
        draft.drop(to)
        draft.change(line, {to: names[0]}, "the file itself is the source")
    else:
        draft.refuse(line, "files within a data set; download those that you want and give each as a source")


def _path(draft: Draft, line: SourceLine) -> None:
    to = place("data.train.*.path" if line.keys[0] == "datasets" else "data.eval.*.path", line)
    if to in draft.values:
        draft.leave(line, "a kind of file; `data_files` names it")
    elif line.value == "synthetic":
        draft.refuse(line, "made-up tokens for measuring speed; `peftchat plan --probe` measures it", blocks=True)
    else:
        draft.keep(line, to, line.value)


def _thinking_key(draft: Draft, line: SourceLine) -> None:
    draft.leave(line, "the model's template reads the reasoning of an answer under its own name")


def _drop_system(draft: Draft, line: SourceLine) -> None:
    if as_bool(line.value) is True:
        draft.refuse(line, "peftchat keeps system messages; take them out of the data")
    else:
        draft.leave(line, IS_OFF)


_STEPWISE = "data of a model that judges steps; peftchat learns from answers and pairs"
_RAW = ("shards", "shards_idx", "preprocess_shards", "ds_type", "trust_remote_code", "conversation", "input_format")


def _column(name: str) -> Rule:
    def act(draft: Draft, line: SourceLine) -> None:
        base = place("data.train.*" if line.keys[0] == "datasets" else "data.eval.*", line)
        draft.keep(line, f"{base}.columns.{name}", line.value)

    return by(act)


def _table(start: str, ours: str) -> Table:
    """Return the rules of one list of data sets."""
    rules: Table = {
        "path": by(_path),
        "name": same(f"{ours}.*.subset"),
        "revision": same(f"{ours}.*.revision"),
        "type": by(_type),
        "split": by(_split),
        "data_files": by(_data_files),
        "roles.*": by(_roles),
        "roles_to_train": by(_roles_to_train),
        "train_on_eos": by(_train_on_end),
        "train_on_eot": by(_train_on_end),
        "template_thinking_key": by(_thinking_key),
        "drop_system_message": by(_drop_system),
        "chat_template": inert("one template for all sources: `chat.template`"),
        "field": refused(RAW_TEXT, blocks=True),
        "text_column": refused(RAW_TEXT, blocks=True),
        "split_thinking": inert("reasoning inside an answer is found by its tags"),
        "type.format": inert("the text is turns of a chat here, written by `chat.template`"),
        "type.no_input_format": inert("the text is turns of a chat here, written by `chat.template`"),
        "type.prompt_format": inert("the text is turns of a chat here, written by `chat.template`"),
        "type.chosen_format": inert("the text is turns of a chat here, written by `chat.template`"),
        "type.rejected_format": inert("the text is turns of a chat here, written by `chat.template`"),
        "type.system_prompt": refused("give it as `chat.system`"),
        "type.system_format": inert("the text is turns of a chat here, written by `chat.template`"),
        "input_transform": refused("code that changes each record; apply it before"),
        "message_field_training_detail": refused("parts of a turn; a turn is trained or not here"),
        "skip": refused("peftchat leaves out no first examples"),
        **{key: refused(_STEPWISE, blocks=True) for key in ("step_separator", "train_on_last_step_only")},
        "max_completion_length": refused("answers are cut by `data.max_length` alone"),
        **{key: inert("concerns how Axolotl reads the files") for key in _RAW},
        **{key: _column(name) for key, name in _COLUMNS.items()},
    }
    return {f"{start}.*.{key}": rule for key, rule in rules.items()}


DATASETS: Table = {
    **_table("datasets", "data.train"),
    **_table("test_datasets", "data.eval"),
    **{"pretraining_dataset": refused(RAW_TEXT, blocks=True)},
}
"""What becomes of the keys of Axolotl's data sets."""


def finish_data(draft: Draft) -> None:
    """Choose the template that Axolotl takes where the file names none, by the type of the data."""
    sources = draft.get("datasets")
    given = [source for source in sources if isinstance(source, dict)] if isinstance(sources, list) else []
    if any(str(source.get("type")).startswith("chat_template") for source in given):
        draft.assume("chat.template", "model", "Axolotl's default for `type: chat_template`")
    elif "chat.template" not in draft.values:
        draft.ask("chat.template", "the file has none, so peftchat's default is taken; `model` is that of a chat model")
