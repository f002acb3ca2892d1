"""Ollama's Modelfile: template, stop tokens, sampling and system prompt beside a GGUF file."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from peftchat.errors import UserError
from peftchat.serving.export.format import ChatFrames

if TYPE_CHECKING:
    from transformers import GenerationConfig

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
        InputError: a text that Ollama's format cannot hold.
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
