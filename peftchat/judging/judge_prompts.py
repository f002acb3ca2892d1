"""Judge prompts: our own for answers in general and for code, and those of FastChat's files."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from peftchat.errors import UserError, first_line
from peftchat.judging.replies import Preference, Scores, read_scores, read_verdict

Form = Literal["scores", "verdict"]

_LAYOUT = """[Question]
{question}

[Answer of assistant 1]
{answer_a}
[End of the answer of assistant 1]

[Answer of assistant 2]
{answer_b}
[End of the answer of assistant 2]

"""

_SYSTEM = "You compare the answers of two assistants. You are careful, and the order of the answers does not sway you."

_GENERAL = (
    "Compare the two answers to the question: are they right, do they help, do they cover what was asked, and are they "
    "clear? Length is no merit of its own. Give each assistant a score from {low} to {high}; a higher one is better. "
    "Write the two scores on the first line, that of assistant 1 first, with a space between them and nothing else. "
    "Explain them on the lines below."
)
_CODE = (
    "Compare the two answers to the programming question: does the code do what was asked, does it run, does it handle "
    "the unusual cases, and can it be read? Prose around the code counts little. Give each assistant a score from "
    "{low} (no code, or code without sense) to {high} (right in all respects). Write the two scores on the first line, "
    "that of assistant 1 first, with a space between them and nothing else. Explain them on the lines below."
)
_VERDICT = (
    "Compare the two answers to the question: are they right, do they help, do they cover what was asked, and are they "
    "clear? Length is no merit of its own. Explain your comparison in a few sentences. End with [[A]] if assistant 1 "
    "is better, [[B]] if assistant 2 is better, or [[C]] if neither is."
)

_SCALES = {"general": (1, 10), "code": (1, 8)}
"""The scale of each of our prompts; the one for code is that of the post that this follows."""


@dataclass(frozen=True)
class JudgePrompt:
    """What a judge is asked.

    Attributes:
        name: of the prompt.
        system: the system message; empty for none.
        template: the user message, with `{question}`, `{answer_a}` and `{answer_b}`.
        form: what it asks for.
        low: the lowest score.
        high: the highest score.
    """

    name: str
    system: str
    template: str
    form: Form
    low: float
    high: float

    def fill(self, question: str, first: str, second: str) -> list[dict[str, str]]:
        """Return the messages for a pair; braces in the texts stay as they are."""
        texts = {"{question}": question, "{answer_a}": first, "{answer_b}": second}
        text = _replaced(self.template, texts)
        system = [{"role": "system", "content": self.system}] if self.system else []
        return [*system, {"role": "user", "content": text}]

    def read(self, reply: str) -> tuple[Preference | None, Scores | None]:
        """Return which answer a reply prefers, with its scores; None for what cannot be read."""
        if self.form == "verdict":
            return read_verdict(reply), None
        scores = read_scores(reply, self.low, self.high)
        return (None if scores is None else scores.preference), scores


def _replaced(template: str, texts: Mapping[str, str]) -> str:
    """Replace each name once, in one pass: an answer may hold a name too."""
    return re.sub("|".join(map(re.escape, texts)), lambda found: texts[found[0]], template)


def own_prompt(name: str, scale: tuple[float, float] | None = None) -> JudgePrompt:
    """Return one of our prompts.

    Args:
        name: `general`, `code` or `verdict`.
        scale: the lowest and the highest score; None for the prompt's own.

    Raises:
        UserError: the name is unknown, or a verdict is to have a scale.
    """
    if name == "verdict":
        if scale is not None:
            raise UserError("a verdict has no scores", where="--scale", hint="Leave it out, or use `--prompt general`.")
        return JudgePrompt(name, _SYSTEM, _LAYOUT + _VERDICT, "verdict", 0, 0)
    if name not in _SCALES:
        raise UserError(
            f"there is no prompt `{name}`", where="--prompt", hint="Use general, code, verdict, or a file of prompts."
        )
    low, high = scale or _SCALES[name]
    texts = {"{low}": f"{low:g}", "{high}": f"{high:g}"}
    text = _replaced(_CODE if name == "code" else _GENERAL, texts)
    return JudgePrompt(name, _SYSTEM, _LAYOUT + text, "scores", low, high)


def read_prompt_file(path: Path, name: str | None, scale: tuple[float, float] | None) -> JudgePrompt:
    """Return a prompt of a file in one of FastChat's two forms.

    Args:
        path: JSON lines.
        name: `name`, `prompt_id` or `category` of the prompt; None for the first that compares two answers.
        scale: the lowest and the highest score; None for 1 to 10.

    Raises:
        UserError: the file or the prompt cannot be used.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
        records = [json.loads(line) for line in lines if line.strip()]
    except (OSError, UnicodeDecodeError, ValueError) as error:
        what = f"the file of prompts cannot be read: {first_line(error)}"
        raise UserError(what, where=str(path), hint="Give JSON lines as FastChat's.") from error
    usable = [record for record in records if isinstance(record, dict) and _compares_one_turn(record)]
    known = {str(record.get(key)) for record in usable for key in ("name", "prompt_id", "category") if key in record}
    found = [record for record in usable if name is None or name in _names(record)]
    if not found:
        what = f"no prompt of the file is named `{name}`" if usable else "no prompt of the file compares two answers"
        raise UserError(what, where=str(path), hint=f"It has: {', '.join(sorted(known))}." if known else None)
    return _prompt(found[0], scale)


def _names(record: Mapping[str, Any]) -> set[str]:
    return {str(record[key]) for key in ("name", "prompt_id", "category") if key in record}


def _compares_one_turn(record: Mapping[str, Any]) -> bool:
    template = record.get("prompt_template")
    if not isinstance(template, str) or "{question}" not in template or "{ref_answer" in template:
        return False
    return ("{answer_a}" in template and "{answer_b}" in template) or (
        "{answer_1}" in template and "{answer_2}" in template
    )


def _prompt(record: Mapping[str, Any], scale: tuple[float, float] | None) -> JudgePrompt:
    texts = {"{answer_1}": "{answer_a}", "{answer_2}": "{answer_b}"}
    defaults = record.get("defaults")
    if isinstance(defaults, dict):
        texts |= {f"{{{key}}}": str(value) for key, value in defaults.items()}
    template = _replaced(record["prompt_template"], texts)
    form: Form = "verdict" if "[[A]]" in str(record.get("output_format", "")) + template else "scores"
    low, high = scale or (1, 10)
    name = next(iter(sorted(_names(record))), "prompt")
    return JudgePrompt(str(record.get("name", name)), str(record.get("system_prompt") or ""), template, form, low, high)
