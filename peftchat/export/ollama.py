"""A chat template as the frame that it puts around each role's messages, found by rendering it."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from peftchat.errors import UserError

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedTokenizerBase


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
        default_system: the system prompt of conversations without one; None where there is none.
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
    """Find the frames of a tokenizer's chat template and prove them on further conversations.

    Raises:
        UserError: there is no template, or its turns are not frames around messages.
    """
    if not tokenizer.chat_template:
        raise UserError("the tokenizer has no chat template", where=where)
    found = _found(tokenizer)
    if found is None or not _agrees(tokenizer, found):
        raise UserError(
            "the chat template does more than put a frame around each message, so it has no plain form for Ollama",
            where=where,
            hint="Export with `--to gguf`, which carries the template itself, and write the Modelfile by hand.",
        )
    return found


def _found(tokenizer: "PreTrainedTokenizerBase") -> ChatFrames | None:
    question, conversation = [("user", _FIRST)], [("user", _FIRST), ("assistant", _SECOND), ("user", _THIRD)]
    asked, opened = _render(tokenizer, question), _render(tokenizer, question, opening=True)
    whole = _render(tokenizer, conversation)
    answered = _render(tokenizer, conversation[:2])
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


_QUOTES = '"""'


def modelfile(
    gguf_name: str, frames: ChatFrames, stops: list[str], generation: "GenerationConfig", *, writes_start: bool
) -> str:
    """The Modelfile's text.

    Args:
        gguf_name: the GGUF file beside it.
        frames: the chat format.
        stops: tokens that end an answer.
        generation: its sampling settings are taken over.
        writes_start: whether the template must write what begins the text; llama.cpp does where the GGUF file says so.

    Raises:
        UserError: a text that Ollama's format cannot hold.
    """
    lines = [f"FROM ./{gguf_name}", f"TEMPLATE {_quoted(go_template(frames, writes_start=writes_start))}"]
    if frames.default_system:
        lines.append(f"SYSTEM {_quoted(frames.default_system)}")
    lines += [f'PARAMETER stop "{stop}"' for stop in stops]
    lines += [f"PARAMETER {name} {value}" for name, value in _sampling(generation)]
    return "\n".join(lines) + "\n"


def go_template(frames: ChatFrames, *, writes_start: bool) -> str:
    """The chat format in Go's template language, as Ollama fills it.

    A last message of the assistant stays open, which is how Ollama lets a caller begin the answer.
    """
    start = frames.start if writes_start else ""
    user, assistant = frames.user, frames.assistant
    branches = [
        f'{{{{ if eq .Role "user" }}}}{user.before}{{{{ .Content }}}}{user.after}',
        f'{{{{ else if eq .Role "assistant" }}}}{assistant.before}{{{{ .Content }}}}'
        f"{{{{ if not $last }}}}{assistant.after}{{{{ end }}}}",
    ]
    empty_system = ""
    if frames.system is not None:
        branches.append(
            f'{{{{ else if eq .Role "system" }}}}{frames.system.before}{{{{ .Content }}}}{frames.system.after}'
        )
        if frames.default_system == "":
            # Ollama takes an empty SYSTEM for none, so the empty block is written by the template itself.
            block = f"{frames.system.before}{frames.system.after}"
            empty_system = f"{{{{ if not .System }}}}{block}{{{{ end }}}}"
    return (
        f"{start}{empty_system}{{{{ range $i, $_ := .Messages }}}}"
        "{{ $last := eq (len (slice $.Messages $i)) 1 }}"
        f"{''.join(branches)}{{{{ end }}}}"
        f'{{{{ if and $last (ne .Role "assistant") }}}}{frames.opening}{{{{ end }}}}{{{{ end }}}}'
    )


def _sampling(generation: "GenerationConfig") -> Iterator[tuple[str, float | int]]:
    if not generation.do_sample:
        # Ollama samples unless it is told not to.
        yield "temperature", 0
        return
    for name in ("temperature", "top_p", "top_k", "repetition_penalty"):
        value = getattr(generation, name)
        if value is not None:
            yield ("repeat_penalty" if name == "repetition_penalty" else name), value


def _quoted(text: str) -> str:
    if _QUOTES in text:
        raise UserError(f'the text holds {_QUOTES}, which a Modelfile cannot quote: "{text[:60]}"')
    return f"{_QUOTES}{text}{_QUOTES}"
