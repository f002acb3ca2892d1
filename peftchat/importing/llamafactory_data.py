"""LLaMA-Factory's data sets: names that its `dataset_info.json` explains, as sources of a recipe."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peftchat.importing.draft import EMPTY, Draft, SourceLine, as_number
from peftchat.importing.shared_rules import beside

_INFO = "dataset_info.json"

_ALPACA = {
    "prompt": "prompt",
    "query": "context",
    "response": "completion",
    "history": "history",
    "system": "system",
    "tools": "tools",
    "chosen": "chosen",
    "rejected": "rejected",
}
_SHAREGPT = {name: name for name in ("messages", "system", "tools", "chosen", "rejected")}
_DEFAULTS = {"prompt": "instruction", "query": "input", "response": "output", "messages": "conversations"}

_ROLES = {
    "user_tag": ("user", "human"),
    "assistant_tag": ("assistant", "gpt"),
    "observation_tag": ("tool", "observation"),
    "system_tag": ("system", "system"),
}
"""Their key of a role's name -> our role, and the name without that key."""


def take_datasets(draft: Draft) -> None:
    """Turn the lines that name data into sources, with the fields that `dataset_info.json` gives them."""
    count = 0
    for line in draft.take("dataset", "eval_dataset"):
        kind = "train" if line.key == "dataset" else "eval"
        if line.value is None:
            draft.leave(line, EMPTY)
            continue
        names = line.value if isinstance(line.value, list) else str(line.value).split(",")
        names = [str(name).strip() for name in names if str(name).strip()]
        count = len(names) if kind == "train" else count
        _take(draft, line, kind, names)
    for line in draft.take("max_samples"):
        limit = as_number(line.value)
        if limit is None:
            draft.leave(line, EMPTY)
        elif count <= 1:
            draft.keep(line, "data.max_train_samples", limit)
        else:
            why = f"at most {limit} of each of {count} sources; here the first {count * limit} of all together"
            draft.change(line, {"data.max_train_samples": count * limit}, why)


def _take(draft: Draft, line: SourceLine, kind: str, names: list[str]) -> None:
    known, folder = _information(draft)
    becomes: dict[str, Any] = {}
    unknown = []
    for at, name in enumerate(names):
        to = f"data.{kind}.{at}"
        entry = known.get(name)
        if not isinstance(entry, Mapping):
            becomes[f"{to}.path"] = name
            unknown.append(to)
            continue
        found = entry.get("columns")
        columns: Mapping[str, Any] = found if isinstance(found, Mapping) else {}
        if any(columns.get(key) for key in ("images", "videos", "audios")):
            draft.refuse(line, f"`{name}` has images, sound or video, which peftchat does not read", blocks=True)
            return
        becomes |= {f"{to}.{key}": value for key, value in source_keys(entry, columns, folder).items()}
    if unknown:
        for to in unknown:
            name = becomes[f"{to}.path"]
            draft.ask(f"{to}.path", f"the file behind LLaMA-Factory's name `{name}`: no {_INFO} here explains it")
        draft.change(line, becomes, f"names of {_INFO}, which is not here, stand for files")
    else:
        draft.change(line, becomes, f"the files and fields that {_INFO} gives these names")


def source_keys(entry: Mapping[str, Any], columns: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Return the keys of a source for one entry of `dataset_info.json`.

    Args:
        entry: the entry.
        columns: its `columns`.
        folder: where its file lies.
    """
    keys: dict[str, Any] = {}
    for name in ("hf_hub_url", "ms_hub_url", "script_url", "cloud_file_name"):
        if entry.get(name):
            keys["path"] = entry[name]
            break
    else:
        keys["path"] = str(folder / str(entry.get("file_name", "")))
    if entry.get("subset"):
        keys["subset"] = entry["subset"]
    if entry.get("split") and "file_name" not in entry:
        keys["split"] = entry["split"]
    is_talk = entry.get("formatting") in ("sharegpt", "openai")
    names = _SHAREGPT if is_talk else _ALPACA
    for theirs, ours in names.items():
        given = columns.get(theirs)
        if given and given != _DEFAULTS.get(theirs) and given != ours:
            keys[f"columns.{ours}"] = given
    if columns.get("kto_tag", "label") != "label":
        keys["columns.label"] = columns["kto_tag"]
    found = entry.get("tags")
    tags: Mapping[str, Any] = found if isinstance(found, Mapping) else {}
    for theirs, (ours, usual) in _ROLES.items():
        given = tags.get(theirs)
        if given and given not in (usual, ours):
            keys[f"roles.{given}"] = ours
    for theirs, ours, usual in (("role_tag", "role", "from"), ("content_tag", "content", "value")):
        given = tags.get(theirs)
        if given and given not in (usual, ours):
            keys[f"columns.{ours}"] = given
    return keys


def _information(draft: Draft) -> tuple[Mapping[str, Any], Path]:
    """Return what `dataset_info.json` holds, and the folder of the files that it names."""
    folder = str(draft.get("dataset_dir") or "data")
    found = beside(draft.path, str(Path(folder) / _INFO))
    if found is None:
        return {}, Path(folder)
    try:
        held = json.loads(found.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}, Path(folder)
    return (held if isinstance(held, Mapping) else {}), found.parent
