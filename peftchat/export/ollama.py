"""Ollama's Modelfile, with the chat template translated to Go's language.

The template is rendered to find the text around each role's messages.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from peftchat.errors import UserError

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedTokenizerBase


_SYSTEM, _FIRST, _SECOND, _THIRD = "s7Q1x", "u4K2y", "a9M3z", "u5T6w"


@dataclass(frozen=True, slots=True)
class Frame:
    """The text before and after a role's message."""

    before: str
    after: str


@dataclass(frozen=True, slots=True)
class ChatFrames:
    """A chat format that puts a frame around each message.

    Attributes:
        bos: the BOS token if the text begins with it, else empty.
        system: None if the template supports no system message.
        default_system: the system prompt of conversations without one; None if there is none.
        generation_prompt: the text that opens an answer.
    """

    bos: str
    system: Frame | None
    default_system: str | None
    user: Frame
    assistant: Frame
    generation_prompt: str

    def render(self, messages: Sequence[tuple[str, str]], *, generation_prompt: bool) -> str:
        """Render a conversation from the frames."""
        frames = {"system": self.system, "user": self.user, "assistant": self.assistant}
        if self.system and self.default_system is not None and messages[0][0] != "system":
            messages = [("system", self.default_system), *messages]
        parts = [self.bos]
        for role, content in messages:
            frame = frames[role]
            assert frame is not None
            parts += [frame.before, content, frame.after]
        return "".join(parts) + (self.generation_prompt if generation_prompt else "")


def read_frames(tokenizer: "PreTrainedTokenizerBase", where: str) -> ChatFrames:
    """Find the frames of a chat template and verify them by rendering.

    Raises:
        UserError: there is no template, or it does more than put a frame around each message.
    """
    if not tokenizer.chat_template:
        raise UserError("the tokenizer has no chat template", where=where)
    frames = _find_frames(tokenizer)
    if frames is None or not _verified(tokenizer, frames):
        raise UserError(
            "the chat template does more than put a frame around each message, so it has no equivalent for Ollama",
            where=where,
            hint="Export with `--to gguf`, which stores the template itself, and write the Modelfile by hand.",
        )
    return frames


def _find_frames(tokenizer: "PreTrainedTokenizerBase") -> ChatFrames | None:
    question, conversation = [("user", _FIRST)], [("user", _FIRST), ("assistant", _SECOND), ("user", _THIRD)]
    asked, opened = _render(tokenizer, question), _render(tokenizer, question, generation_prompt=True)
    complete = _render(tokenizer, conversation)
    answered = _render(tokenizer, conversation[:2])
    if asked is None or opened is None or complete is None or answered is None:
        return None
    head, _, user_after = asked.partition(_FIRST)
    after_answer = answered.partition(_SECOND)[2]
    between, _, rest = complete.partition(_FIRST)[2].partition(_SECOND)
    before_user = rest.partition(_THIRD)[0].removeprefix(after_answer)
    lead = head.removesuffix(before_user)
    bos = str(tokenizer.bos_token or "")
    if lead != bos:
        bos = ""
    system, default = None, None
    instructed = _render(tokenizer, [("system", _SYSTEM), *question])
    if instructed is not None and _SYSTEM in instructed:
        before, _, after = instructed.partition(_SYSTEM)
        system = Frame(before.removeprefix(bos), after.partition(_FIRST)[0].removesuffix(before_user))
        if lead != bos:
            default = lead.removeprefix(system.before).removesuffix(system.after)
    return ChatFrames(
        bos,
        system,
        default,
        Frame(before_user, user_after),
        Frame(between.removeprefix(user_after), after_answer),
        opened.removeprefix(asked),
    )


def _verified(tokenizer: "PreTrainedTokenizerBase", frames: ChatFrames) -> bool:
    turns = [("user", "one"), ("assistant", "two\n\nthree"), ("user", "four"), ("assistant", "five"), ("user", "six")]
    probes = [turns[:1], turns[:2], turns[:3], turns]
    if frames.system is not None:
        probes += [[("system", "be brief"), *probe] for probe in probes]
    return all(
        _render(tokenizer, probe, generation_prompt=opens) == frames.render(probe, generation_prompt=opens)
        for probe in probes
        for opens in (probe[-1][0] == "user", False)
    )


def _render(
    tokenizer: "PreTrainedTokenizerBase", messages: Sequence[tuple[str, str]], *, generation_prompt: bool = False
) -> str | None:
    from jinja2.exceptions import TemplateError

    dicts = [{"role": role, "content": content} for role, content in messages]
    try:
        return str(tokenizer.apply_chat_template(dicts, tokenize=False, add_generation_prompt=generation_prompt))
    except TemplateError:
        return None


_QUOTES = '"""'


MODELFILE = "Modelfile"

_MARK = "# Written by peftchat export."


def is_own_modelfile(path: Path) -> bool:
    """Return whether an export wrote a Modelfile."""
    return path.read_bytes().rstrip().endswith(_MARK.encode())


def modelfile(
    gguf_name: str, frames: ChatFrames, stops: list[str], generation: "GenerationConfig", *, writes_bos: bool
) -> str:
    """Return the text of the Modelfile.

    Args:
        gguf_name: the GGUF file beside it.
        frames: the chat format.
        stops: tokens that end an answer.
        generation: the generation settings; those of sampling are used.
        writes_bos: whether the template must write the BOS token, because llama.cpp does not add it.

    Raises:
        UserError: a text contains triple quotes, which a Modelfile cannot quote.
    """
    lines = [f"FROM ./{gguf_name}", f"TEMPLATE {_quoted(go_template(frames, writes_bos=writes_bos))}"]
    if frames.default_system:
        lines.append(f"SYSTEM {_quoted(frames.default_system)}")
    lines += [f'PARAMETER stop "{stop}"' for stop in stops]
    lines += [f"PARAMETER {name} {value}" for name, value in _sampling(generation)]
    return "\n".join([*lines, _MARK]) + "\n"


def go_template(frames: ChatFrames, *, writes_bos: bool) -> str:
    """Return the chat format in Go's template language, for Ollama.

    A last message of the assistant stays open, so that a caller of Ollama can begin the answer.
    """
    bos = frames.bos if writes_bos else ""
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
            # Ollama treats an empty SYSTEM as none, so the template itself writes the empty block.
            block = f"{frames.system.before}{frames.system.after}"
            empty_system = f"{{{{ if not .System }}}}{block}{{{{ end }}}}"
    return (
        f"{bos}{empty_system}{{{{ range $i, $_ := .Messages }}}}"
        "{{ $last := eq (len (slice $.Messages $i)) 1 }}"
        f"{''.join(branches)}{{{{ end }}}}"
        f'{{{{ if and $last (ne .Role "assistant") }}}}{frames.generation_prompt}{{{{ end }}}}{{{{ end }}}}'
    )


def _sampling(generation: "GenerationConfig") -> Iterator[tuple[str, float | int]]:
    if not generation.do_sample:
        # Ollama samples by default.
        yield "temperature", 0
        return
    for name in ("temperature", "top_p", "top_k", "repetition_penalty"):
        value = getattr(generation, name)
        if value is not None:
            yield ("repeat_penalty" if name == "repetition_penalty" else name), value


def _quoted(text: str) -> str:
    if _QUOTES in text:
        raise UserError(f'the text contains {_QUOTES}, which a Modelfile cannot quote: "{text[:60]}"')
    return f"{_QUOTES}{text}{_QUOTES}"
