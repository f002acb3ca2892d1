"""The words of the tables: what becomes of one key of another tool, said by one call."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from peftchat.importing.draft import EMPTY, IS_OFF, Draft, SourceLine, as_bool, shown

OFF = (None, False, 0, "", "no", "none", "None", "off", "null")
"""Values with which a setting of another tool does nothing."""

PATHS = ("model.name", "output_dir", "path")
"""Ends of our keys in which variables of the environment are replaced."""


@dataclass(frozen=True)
class Rule:
    """What becomes of one key.

    Attributes:
        act: writes it into the draft.
        takes_empty: the key means something even where nothing stands behind it.
        takes_whole: the rule reads the keys below it by itself.
    """

    act: Callable[[Draft, SourceLine], None]
    takes_empty: bool = False
    takes_whole: bool = False


Table = dict[str, Rule]
"""Paths of keys, `*` standing for any one step, and what becomes of each. A longer path wins over a shorter one."""


def apply(rule: Rule, draft: Draft, line: SourceLine) -> None:
    """Let a rule say what becomes of a line."""
    if (line.value is None or line.value in ([], {})) and not rule.takes_empty:
        draft.leave(line, EMPTY)
    else:
        rule.act(draft, line)


def same(to: str, why: str = "") -> Rule:
    """Return the rule of a key that we have too, under the name `to`; a reason makes it a change."""

    def act(draft: Draft, line: SourceLine) -> None:
        key = place(to, line)
        if is_templated(line.value) and not key.endswith(PATHS):
            draft.refuse(line, "its value is filled in elsewhere; give the value itself")
        elif why:
            draft.change(line, {key: line.value}, why)
        else:
            draft.keep(line, key, line.value)

    return Rule(act)


def words(to: str, meanings: Mapping[Any, Any], why: str, *, otherwise: str = "has no counterpart") -> Rule:
    """Return the rule of a key whose values have other names here.

    Args:
        to: our key.
        meanings: their value -> ours. Values with the same name in both are kept, others changed.
        why: what holds of the changed ones.
        otherwise: why any other value is refused.
    """

    def act(draft: Draft, line: SourceLine) -> None:
        value = as_bool(line.value)
        if isinstance(value, str) and value.lower() in meanings:
            value = value.lower()
        if isinstance(value, list | dict) or value not in meanings:
            draft.refuse(line, f"`{shown(line.value)}` {otherwise}")
        elif meanings[value] == value:
            draft.keep(line, place(to, line), value)
        else:
            draft.change(line, {place(to, line): meanings[value]}, why)

    return Rule(act)


def inert(why: str) -> Rule:
    """Return the rule of a key that has no bearing on what is learned."""
    return Rule(lambda draft, line: draft.leave(line, why))


def refused(why: str, *, unless: tuple[Any, ...] = OFF, blocks: bool = False) -> Rule:
    """Return the rule of a key that changes what is learned, and that no recipe can say.

    Args:
        why: the reason, and what to do instead.
        unless: values with which it does nothing.
        blocks: without it the file asks for something else altogether.
    """

    def act(draft: Draft, line: SourceLine) -> None:
        value = as_bool(line.value)
        if any(value == one and type(value) is not list for one in unless):
            draft.leave(line, IS_OFF)
        else:
            draft.refuse(line, why, blocks=blocks)

    return Rule(act)


def by(act: Callable[[Draft, SourceLine], None]) -> Rule:
    """Return a rule that depends on other keys too."""
    return Rule(act)


def whole(act: Callable[[Draft, SourceLine], None]) -> Rule:
    """Return a rule that reads a key with all that is below it."""
    return Rule(act, takes_whole=True)


def deferred() -> Rule:
    """Return the rule of a key that makes sense only beside others; the tool's `finish` takes it."""

    def act(draft: Draft, line: SourceLine) -> None:
        draft.pending[line.key] = line

    return Rule(act, takes_empty=True)


def group(rule: Rule, names: str) -> Table:
    """Return a table with one rule for several keys, named in one text."""
    return dict.fromkeys(names.split(), rule)


def place(to: str, line: SourceLine) -> str:
    """Return our key, with the steps of the other tool's key that have no fixed name put in for each `*`."""
    steps = iter([str(step) for step in line.keys if isinstance(step, int)] + [str(line.keys[-1])])
    return ".".join(next(steps) if step == "*" else step for step in to.split("."))


def is_templated(value: Any) -> bool:
    """Return whether a text holds a variable or a field that something else fills in."""
    return isinstance(value, str) and ("${" in value or value.startswith("$") or "{{" in value)
