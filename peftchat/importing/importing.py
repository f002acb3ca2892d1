"""From another tool's file to a recipe: every line is looked up, and what comes of it is checked as a recipe."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from peftchat.access_keys import find_access_key
from peftchat.errors import UserError
from peftchat.importing.checking import check_draft
from peftchat.importing.detection import TOOLS, detect
from peftchat.importing.draft import Assumed, Draft, ImportedLine, SourceLine, Status
from peftchat.importing.rules import Rule, apply, inert
from peftchat.importing.source_file import SourceFile, read_source
from peftchat.importing.tool import Tool
from peftchat.paths import exists
from peftchat.recipe.document import LOCAL_MARKS, Keys

_ACCESS_KEY = inert("looks like a key of a service: keep it in the environment, where no recipe shows it")


@dataclass(frozen=True)
class Imported:
    """A configuration that was read.

    Attributes:
        path: the other tool's file.
        tool: the tool.
        lines: what has become of each line, in the order of the file.
        assumed: the tool's own defaults that are written down, because peftchat's differ.
        values: the recipe's keys as text, with their values.
        origins: where each of them comes from.
        to_give: keys that the user has to give or to look at, and why.
    """

    path: Path
    tool: Tool
    lines: tuple[ImportedLine, ...]
    assumed: tuple[Assumed, ...]
    values: dict[str, Any]
    origins: dict[str, ImportedLine | Assumed]
    to_give: dict[str, str]

    def count(self, status: Status) -> int:
        """Return how many lines have a status."""
        return sum(line.status == status for line in self.lines)

    @property
    def refused(self) -> list[ImportedLine]:
        """The lines that change what is learned, and that no recipe can say."""
        return [line for line in self.lines if line.status == "refused"]

    @property
    def blocking(self) -> list[ImportedLine]:
        """Those of them without which the file asks for something else altogether."""
        return [line for line in self.lines if line.blocks]


def import_file(path: Path, tool_name: str | None = None) -> Imported:
    """Read another tool's configuration as a recipe.

    Args:
        path: the file.
        tool_name: the tool; without it the keys tell.

    Raises:
        UserError: the file cannot be read, or it is no configuration of a training.
    """
    source = read_source(path)
    tool = detect(source) if tool_name is None else TOOLS[tool_name]
    why_not = tool.not_a_training(source)
    if why_not is not None:
        raise UserError(f"is a file of {tool.title} that trains nothing: {why_not}", where=str(path))
    source = tool.prepare(source)
    draft = Draft(path, source.document.values, tool.title)
    for line, rule in _lines_and_rules(source, tool):
        if rule is None:
            _refuse_unknown(draft, line, tool)
        else:
            apply(rule, draft, line)
    tool.finish(draft)
    if draft.pending:
        raise AssertionError(f"lines without an outcome: {', '.join(draft.pending)}")
    draft.assume("method", "full", "no adapter is named")
    draft.assume("output_dir", f"runs/{path.stem}", "the file names no folder")
    _ask(draft)
    check_draft(draft)
    lines = sorted(draft.lines, key=lambda line: line.source.line or 0)
    return Imported(path, tool, tuple(lines), tuple(draft.assumed), draft.values, draft.origins, draft.to_give)


def _lines_and_rules(source: SourceFile, tool: Tool) -> Iterator[tuple[SourceLine, Rule | None]]:
    """Yield each line with its rule; a rule that reads all below its key gets it in one."""
    patterns = {tuple(pattern.split(".")): rule for pattern, rule in tool.table.items()}
    done: set[Keys] = set()
    for line in source.lines():
        key = find_access_key(str(line.value))
        if key is not None:
            yield replace(line, value=key), _ACCESS_KEY
            continue
        found: tuple[int, Rule] | None = None
        for length in range(len(line.keys), 0, -1):
            rule = _match(line.keys[:length], patterns)
            if rule is not None:
                found = (length, rule)
                break
        if found is None:
            yield line, None
            continue
        length, rule = found
        if not rule.takes_whole:
            yield line, rule
            continue
        keys = line.keys[:length]
        if keys not in done:
            done.add(keys)
            yield source.at(keys, _at(source.document.values, keys)), rule


def _match(keys: Keys, patterns: dict[tuple[str, ...], Rule]) -> Rule | None:
    exact = patterns.get(tuple(map(str, keys)))
    if exact is not None:
        return exact
    for pattern, rule in patterns.items():
        if len(pattern) == len(keys) and all(
            step == "*" or step == str(key) for step, key in zip(pattern, keys, strict=True)
        ):
            return rule
    return None


def _at(values: Any, keys: Keys) -> Any:
    for key in keys:
        values = values[key]
    return values


def _refuse_unknown(draft: Draft, line: SourceLine, tool: Tool) -> None:
    if any(pattern.startswith(f"{line.key}.") for pattern in tool.table):
        draft.refuse(line, f"is not of the form that {tool.title} reads: expected keys below it")
        return
    known = sorted({pattern.rpartition(".")[2] for pattern in tool.table} - {"*"})
    name = str(line.keys[-1])
    near = get_close_matches(name, known, n=1, cutoff=0.75)
    hint = f"; did you mean `{near[0]}`?" if near and near[0] != name else ""
    draft.refuse(line, f"no key of {tool.title} that is known here{hint}")


def _ask(draft: Draft) -> None:
    """Note what is missing, and which local files are not here."""
    if "model.name" not in draft.values:
        draft.ask("model.name", "the file names no base model")
    elif not exists(name := str(draft.values["model.name"])) and name.startswith(LOCAL_MARKS):
        draft.ask("model.name", f"{name} is not here")
    sources = sorted({key.rsplit(".", 1)[0] for key in draft.values if key.startswith("data.train.")})
    if not any(f"{source}.path" in draft.values for source in sources):
        draft.ask("data.train.0.path", "the file names no data that peftchat can find")
    for key in [key for key in draft.values if key.startswith("data.") and key.endswith(".path")]:
        path = str(draft.values[key])
        if not exists(path) and (path.startswith(LOCAL_MARKS) or Path(path).suffix in (".json", ".jsonl", ".csv")):
            draft.ask(key, f"{path} is not here")
