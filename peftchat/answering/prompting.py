"""Prompting: how a model is asked, by its chat template or by a text that begins a dialogue."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from peftchat.chat_template.text_encoder import TextEncoder
from peftchat.conversation import Message
from peftchat.errors import UserError, first_line
from peftchat.models.loading import end_ids
from peftchat.serving.prompt import Prompt, PromptEncoder, truncate_prompt

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedTokenizerBase

PromptingKind = Literal["template", "dialogue"]

USER_NAME, ASSISTANT_NAME = "Human", "Assistant"
"""Who speaks in a dialogue: the names of the post that this follows, and of the prompts that people share."""

_LABEL = re.compile(rf"^[ \t]*\**(?:{USER_NAME}|{ASSISTANT_NAME})\**[ \t]*:", re.MULTILINE)
_RULE = re.compile(r"^[ \t]*([-=*_#~])\1{2,}[ \t]*$", re.MULTILINE)


@dataclass(frozen=True)
class TemplatePrompting:
    """A model is asked by its chat template."""

    tokenizer: "PreTrainedTokenizerBase"
    generation_config: "GenerationConfig"
    kind: ClassVar[PromptingKind] = "template"
    stop_text: ClassVar[None] = None
    """Tokens end an answer."""

    @cached_property
    def _encoder(self) -> PromptEncoder:
        return PromptEncoder(self.tokenizer)

    @cached_property
    def end_ids(self) -> frozenset[int]:
        """The model's own end tokens, and the one that its template writes after each turn."""
        return frozenset(end_ids(self.generation_config.eos_token_id)) | {self._encoder.end_id}

    @cached_property
    def turn_ids(self) -> frozenset[int]:
        """The special tokens of the template's headers."""
        return self._encoder.turn_ids

    def encode(self, messages: Sequence[Message], limit: int) -> Prompt:
        """Encode the conversation with the generation prompt; earlier rounds are dropped where it is too long."""
        return self._encoder.truncate_to_fit(messages, limit)


@dataclass(frozen=True)
class DialoguePrompting:
    """A base model is asked by a text that begins a dialogue, to which each turn is added.

    The text is paid again at every turn. An answer ends where the model writes the name of a speaker at the start of a
    line, the rule that separates the dialogues of the text, or a special token.

    Args:
        text: from `dialogue_text`.
    """

    tokenizer: "PreTrainedTokenizerBase"
    generation_config: "GenerationConfig"
    text: str
    kind: ClassVar[PromptingKind] = "dialogue"

    @cached_property
    def _encoder(self) -> TextEncoder:
        return TextEncoder(self.tokenizer)

    @cached_property
    def _start(self) -> list[int]:
        """The ids that the tokenizer puts before every text, such as BOS."""
        ids = self.tokenizer("x")["input_ids"]
        bos = self.tokenizer.bos_token_id
        return [bos] if bos is not None and ids[:1] == [bos] else []

    @cached_property
    def end_ids(self) -> frozenset[int]:
        """The model's end tokens."""
        own = end_ids(self.tokenizer.eos_token_id) if self.tokenizer.eos_token_id is not None else ()
        return frozenset(end_ids(self.generation_config.eos_token_id)) | frozenset(own)

    @cached_property
    def turn_ids(self) -> frozenset[int]:
        """All other special tokens: a dialogue in plain text has none."""
        special = frozenset(self._encoder.special.values())
        return special - self.end_ids - {self.tokenizer.unk_token_id}

    @cached_property
    def stop_text(self) -> re.Pattern[str]:
        """A speaker's name at the start of a line, or the rule between the dialogues of the text."""
        rules = sorted({re.escape(match.group(1) * 3) for match in _RULE.finditer(self.text)})
        names = rf"\**(?:{USER_NAME}|{ASSISTANT_NAME})\**[ \t]*:"
        return re.compile(rf"\n[ \t]*(?:{'|'.join([names, *rules])})")

    def encode(self, messages: Sequence[Message], limit: int) -> Prompt:
        """Encode the text and the conversation; earlier rounds are dropped where it is too long.

        A tokenizer without a mark for the start gets the text behind nothing, as in `tokenizer(text)`.
        """
        return truncate_prompt(messages, limit, self._encode)

    def _encode(self, messages: Sequence[Message]) -> Prompt:
        parts = [self.text.rstrip()]
        names = {"user": USER_NAME, "assistant": ASSISTANT_NAME}
        for message in messages:
            content = message.content.strip()
            parts.append(f"{names[message.role]}: {content}" if message.role in names else content)
        text = "\n\n".join([*parts, f"{ASSISTANT_NAME}:"])
        (ids,) = self._encoder.encode([text], at_start=True)
        found = sum(self._encoder.count_special_token_text([message.content for message in messages]))
        return Prompt([*self._start, *ids], 0, found)


Prompting = TemplatePrompting | DialoguePrompting
"""How one model is asked."""


def dialogue_text(path: Path | None) -> str:
    """Return the text that begins a dialogue: that of a file, or our own.

    Raises:
        UserError: the file cannot be read, or shows no turns of both speakers.
    """
    if path is None:
        return files("peftchat.answering").joinpath("dialogue.txt").read_text(encoding="utf-8")
    where = f"--dialogue-file {path}"
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise UserError(f"the file cannot be read: {first_line(error)}", where=where) from error
    named = {match.group().strip(" \t*:") for match in _LABEL.finditer(text)}
    missing = [name for name in (USER_NAME, ASSISTANT_NAME) if name not in named]
    if missing:
        hint = f"Begin the turns of its dialogues with `{USER_NAME}:` and `{ASSISTANT_NAME}:`."
        raise UserError(f"no line of the text begins with `{missing[0]}:`", where=where, hint=hint)
    return text
