"""A chat template as the frame that it puts around each role's messages, found by rendering it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from peftchat.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SYSTEM, _FIRST, _SECOND, _THIRD = "s7Q1x", "u4K2y", "a9M3z", "u5T6w"


@dataclass(frozen=True, slots=True)
class Frame:
    """What stands before and after a role's message."""

    before: str
    after: str


@dataclass(frozen=True, slots=True)
class ChatFrames:
    """A chat format whose every turn is a frame around a message.

    Attributes:
        start: what begins the text: the token for its beginning, or nothing.
        system: None where the template takes no system message.
        default_system: the system prompt of dialogues without one; None where there is none.
        opening: what opens an answer.
    """

    start: str
    system: Frame | None
    default_system: str | None
    user: Frame
    assistant: Frame
    opening: str

    def render(self, messages: Sequence[tuple[str, str]], *, opening: bool) -> str:
        """The format's own rendering, for comparison with the template's."""
        frames = {"system": self.system, "user": self.user, "assistant": self.assistant}
        if self.system and self.default_system is not None and messages[0][0] != "system":
            messages = [("system", self.default_system), *messages]
        parts = [self.start]
        for role, content in messages:
            frame = frames[role]
            assert frame is not None
            parts += [frame.before, content, frame.after]
        return "".join(parts) + (self.opening if opening else "")


def read_frames(tokenizer: "PreTrainedTokenizerBase", where: str) -> ChatFrames:
    """Find the frames of a tokenizer's chat template and prove them on further dialogues.

    Raises:
        InputError: there is no template, or its turns are not frames around messages.
    """
    if not tokenizer.chat_template:
        raise UserError("the tokenizer has no chat template", where=where)
    found = _found(tokenizer)
    if found is None or not _agrees(tokenizer, found):
        raise UserError(
            "the chat template does more than put a frame around each message, so it has no plain form for Ollama",
            where=where,
            cure="Export with `--to gguf`, which carries the template itself, and write the Modelfile by hand.",
        )
    return found


def _found(tokenizer: "PreTrainedTokenizerBase") -> ChatFrames | None:
    question, dialogue = [("user", _FIRST)], [("user", _FIRST), ("assistant", _SECOND), ("user", _THIRD)]
    asked, opened = _render(tokenizer, question), _render(tokenizer, question, opening=True)
    whole = _render(tokenizer, dialogue)
    answered = _render(tokenizer, dialogue[:2])
    if asked is None or opened is None or whole is None or answered is None:
        return None
    head, _, user_after = asked.partition(_FIRST)
    after_answer = answered.partition(_SECOND)[2]
    between, _, rest = whole.partition(_FIRST)[2].partition(_SECOND)
    before_user = rest.partition(_THIRD)[0].removeprefix(after_answer)
    lead = head.removesuffix(before_user)
    start = str(tokenizer.bos_token or "")
    if lead != start:
        start = ""
    system, default = None, None
    told = _render(tokenizer, [("system", _SYSTEM), *question])
    if told is not None and _SYSTEM in told:
        before, _, after = told.partition(_SYSTEM)
        system = Frame(before.removeprefix(start), after.partition(_FIRST)[0].removesuffix(before_user))
        if lead != start:
            default = lead.removeprefix(system.before).removesuffix(system.after)
    return ChatFrames(
        start,
        system,
        default,
        Frame(before_user, user_after),
        Frame(between.removeprefix(user_after), after_answer),
        opened.removeprefix(asked),
    )


def _agrees(tokenizer: "PreTrainedTokenizerBase", frames: ChatFrames) -> bool:
    turns = [("user", "one"), ("assistant", "two\n\nthree"), ("user", "four"), ("assistant", "five"), ("user", "six")]
    probes = [turns[:1], turns[:2], turns[:3], turns]
    if frames.system is not None:
        probes += [[("system", "be brief"), *probe] for probe in probes]
    return all(
        _render(tokenizer, probe, opening=opening) == frames.render(probe, opening=opening)
        for probe in probes
        for opening in (probe[-1][0] == "user", False)
    )


def _render(
    tokenizer: "PreTrainedTokenizerBase", messages: Sequence[tuple[str, str]], *, opening: bool = False
) -> str | None:
    from jinja2.exceptions import TemplateError

    dicts = [{"role": role, "content": content} for role, content in messages]
    try:
        return str(tokenizer.apply_chat_template(dicts, tokenize=False, add_generation_prompt=opening))
    except TemplateError:
        return None
