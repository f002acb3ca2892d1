"""Answer file: the answers of one model, one JSON line per question, and the settings that they were made with.

The fields `question_id`, `model_id` and `choices` are those of FastChat's answer files.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from peftchat.answering.questions import Question
from peftchat.answering.records import QuestionId
from peftchat.conversation import Message
from peftchat.errors import UserError
from peftchat.files import write_text
from peftchat.kept_lines import KeptLines

_FREE = ("versions", "batch_size", "questions", "device")
"""Settings that may change between the parts of a file: the answers stay what they are."""


@dataclass(frozen=True, slots=True)
class TurnAnswer:
    """The answer to one turn.

    Attributes:
        text: without special tokens and surrounding white space.
        finish: `end`, `turn` (it began another turn and was stopped) or `length`.
        tokens: generated tokens, without the one that ended the answer.
        prompt_tokens: tokens of the prompt.
        dropped: earlier rounds that did not fit into the prompt.
    """

    text: str
    finish: str
    tokens: int
    prompt_tokens: int
    dropped: int


@dataclass(frozen=True, slots=True)
class Answer:
    """All answers of a model to one question.

    Attributes:
        question: with the system prompt that was used.
        turns: one answer for each turn.
        seconds: the share of the time of its batches.
    """

    question: Question
    model: str
    turns: tuple[TurnAnswer, ...]
    seconds: float

    def as_record(self) -> dict[str, Any]:
        """Return the line of the file."""
        question = self.question
        record: dict[str, Any] = {
            "question_id": question.id,
            "category": question.category,
            "model_id": self.model,
            "turns": list(question.turns),
            "choices": [{"index": 0, "turns": [turn.text for turn in self.turns]}],
        }
        if question.before:
            record["before"] = [message.as_dict() for message in question.before]
        if question.references:
            record["reference"] = list(question.references)
        for name in ("finish", "tokens", "prompt_tokens", "dropped"):
            record[name] = [getattr(turn, name) for turn in self.turns]
        record["seconds"] = round(self.seconds, 3)
        return record

    @classmethod
    def from_record(cls, record: Mapping[str, Any], where: str) -> "Answer":
        """Return the answer that a line holds.

        Raises:
            UserError: the line is not of `peftchat generate`.
        """
        try:
            texts = record["choices"][0]["turns"]
            fields = (record["finish"], record["tokens"], record["prompt_tokens"], record["dropped"])
            turns = tuple(TurnAnswer(*values) for values in zip(texts, *fields, strict=True))
            before = tuple(Message(item["role"], item["content"]) for item in record.get("before", ()))
            question = Question(
                record["question_id"], tuple(record["turns"]), before, record["category"],
                tuple(record.get("reference", ())),
            )  # fmt: skip
            return cls(question, record["model_id"], turns, float(record["seconds"]))
        except (KeyError, IndexError, TypeError, ValueError) as error:
            hint = "Choose another output, or remove the file."
            raise UserError("the line is no answer of `peftchat generate`", where=where, hint=hint) from error


@dataclass(frozen=True)
class AnswerFile:
    """The answers of one model.

    Attributes:
        path: the file; its settings are beside it.
    """

    path: Path

    @cached_property
    def lines(self) -> KeptLines:
        """The lines of the file."""
        return KeptLines(self.path)

    @property
    def settings_path(self) -> Path:
        """Where the settings are."""
        return self.path.with_suffix(".json")

    def begin(self, settings: Mapping[str, Any]) -> None:
        """Write the settings."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_text(self.settings_path, json.dumps(settings, indent=2, ensure_ascii=False) + "\n")

    def kept(self, settings: Mapping[str, Any], questions: Sequence[Question]) -> dict[QuestionId, Answer]:
        """Return the answers that are there already, by question.

        Raises:
            UserError: they were made with other settings or for other questions.
        """
        records = self.lines.read()
        if not records and not self.settings_path.exists():
            return {}
        self._check_settings(settings)
        by_id = {question.id: question for question in questions}
        found: dict[QuestionId, Answer] = {}
        for number, record in enumerate(records, start=1):
            where = f"{self.path}:{number}"
            answer = Answer.from_record(record, where)
            asked = by_id.get(answer.question.id)
            if asked is None or (asked.turns, asked.before) != (answer.question.turns, answer.question.before):
                state = "is not in the file of questions" if asked is None else "was another one then"
                what = f"question {answer.question.id!r} {state}"
                raise UserError(what, where=where, hint="Choose another output folder.")
            found[answer.question.id] = answer
        return found

    def _check_settings(self, settings: Mapping[str, Any]) -> None:
        try:
            before = json.loads(self.settings_path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            what = f"there are answers, but their settings ({self.settings_path.name}) cannot be read"
            raise UserError(what, where=str(self.path), hint="Choose another output folder.") from error
        for name, value in settings.items():
            if name not in _FREE and before.get(name) != value:
                what = f"the answers there were made with {name} {_shown(before.get(name))}, now it is {_shown(value)}"
                raise UserError(what, where=str(self.path), hint="Choose another output folder, or remove the file.")


def _shown(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else f"{text[:79]}…"
