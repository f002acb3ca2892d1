"""Which tool a file belongs to, by its keys."""

from collections.abc import Mapping

from peftchat.errors import UserError
from peftchat.importing.axolotl import AXOLOTL
from peftchat.importing.llamafactory import LLAMAFACTORY
from peftchat.importing.llamafactory_v1 import LLAMAFACTORY_V1, is_second_form
from peftchat.importing.source_file import SourceFile
from peftchat.importing.tool import Tool
from peftchat.importing.torchtune import TORCHTUNE, has_components
from peftchat.importing.trl import TRL

TOOLS: Mapping[str, Tool] = {tool.name: tool for tool in (AXOLOTL, LLAMAFACTORY, LLAMAFACTORY_V1, TRL, TORCHTUNE)}
"""The tools by their names."""

_FROM = f"Say which tool it belongs to with `--from`: {', '.join(TOOLS)}."


_START = "Write a recipe with `peftchat init`, and carry the values over by hand."

_OTHER_TOOLS = {"swift": "ms-swift", "megatron": "ms-swift", "autotrain": "AutoTrain"}
"""Programs of tools that are not read, though their flags are spelled like those of others."""

_OTHER_KEYS = {"train_type": "ms-swift", "tuner_type": "ms-swift", "swift_version": "ms-swift"}
"""Keys of such tools."""


def detect(source: SourceFile) -> Tool:
    """Return the tool whose keys a file has.

    Raises:
        UserError: it is a recipe already, a file that trains nothing by itself, of no known tool, or of several.
    """
    values, where = source.document.values, str(source.path)
    _refuse_other_files(source)
    if has_components(values):
        return TORCHTUNE
    if is_second_form(values):
        return LLAMAFACTORY_V1
    known = {tool.name: sum(_is_known(str(key), tool) for key in values) for tool in TOOLS.values()}
    marked = {name: count for name, count in known.items() if TOOLS[name].marks & set(map(str, values))}
    if not marked:
        keys = ", ".join(list(map(str, values))[:5])
        raise UserError(f"no file of {_titles()}; its keys are: {keys}", where=where, hint=_FROM)
    best = max(marked.values())
    found = [name for name, count in marked.items() if count == best]
    if len(found) > 1:
        titles = " and ".join(TOOLS[name].title for name in found)
        raise UserError(f"could be a file of {titles}", where=where, hint=_FROM)
    return TOOLS[found[0]]


def _is_known(key: str, tool: Tool) -> bool:
    return any(pattern == key or pattern.startswith(f"{key}.") for pattern in tool.table)


def _titles() -> str:
    titles = [tool.title for tool in TOOLS.values()]
    return ", ".join(titles[:-1]) + f" or {titles[-1]}" if len(titles) > 1 else titles[0]


def _refuse_other_files(source: SourceFile) -> None:
    """Refuse files that stand beside configurations of a training."""
    values, where = source.document.values, str(source.path)
    programs = (_OTHER_TOOLS.get(word.rpartition("/")[2]) for word in source.command)
    keys = (_OTHER_KEYS.get(str(key)) for key in values)
    other = next(filter(None, (*programs, *keys)), None)
    if other is not None:
        raise UserError(f"is a file of {other}, expected one of {_titles()}", where=where, hint=_START)
    if (isinstance(values.get("model"), Mapping) and "method" in values) or "extends" in values:
        hint = f"Train with it: `peftchat train {where}`."
        raise UserError("is a recipe of peftchat already", where=where, hint=hint)
    if "distributed_type" in values and "compute_environment" in values:
        hint = "Import the training's own file; `distributed` in the recipe says how processes start."
        raise UserError("is a configuration of accelerate, which says how processes start", where=where, hint=hint)
    if "zero_optimization" in values:
        hint = "Give it as `distributed.deepspeed_config`, and import the training's own file."
        raise UserError("is a configuration of DeepSpeed, which says how a model is sharded", where=where, hint=hint)
    if "architectures" in values or ("model_type" in values and "hidden_size" in values):
        raise UserError("is the config of a model", where=where, hint="Give it as `model.name`, by its folder.")
    if set(values) == {"config_file"} and any(word.endswith((".yaml", ".yml", ".json")) for word in source.command):
        other = next(word for word in source.command if word.endswith((".yaml", ".yml", ".json")))
        raise UserError("starts a training that another file describes", where=where, hint=f"Import {other}.")
