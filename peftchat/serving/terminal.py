"""The terminal chat: reads lines, prints answers as they are written."""

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from peftchat.console import stderr
from peftchat.errors import UserError
from peftchat.serving.answer import Answer, answer
from peftchat.serving.commands import Commands
from peftchat.serving.dialogue import Dialogue
from peftchat.serving.load import ChatModel

if TYPE_CHECKING:
    from transformers import GenerationConfig

_FENCE = '"""'
_CUT = {
    "length": "[the answer was cut at its longest; --max-new-tokens allows more]",
    "turn": "[the model went on to another speaker's turn and was stopped]",
    "interrupted": "[interrupted]",
}


@dataclass(frozen=True, slots=True)
class Chat:
    """A dialogue with a model, shown on standard output.

    Attributes:
        as_json: print one JSON object an answer instead of the answer's text.
    """

    model: ChatModel
    settings: "GenerationConfig"
    dialogue: Dialogue
    as_json: bool = False

    def ask(self, question: str) -> Answer:
        """Put a question, print the answer, and keep both.

        Raises:
            InputError: the question does not fit into the model's context.
        """
        said = answer(self.model, self.dialogue.asked(question), self.settings, self._show)
        self.dialogue.add(question, said.text)
        if self.as_json:
            print(json.dumps(as_record(question, said), ensure_ascii=False), flush=True)
        else:
            print(flush=True)
        return said

    def loop(self) -> None:
        """Answer questions and obey commands until the input ends."""
        commands = Commands(self.model, self.dialogue)
        is_terminal = sys.stdin.isatty()
        if is_terminal:
            _prepare_line_editing(commands.names)
            stderr.print(f"{self.model.name}  (/help lists the commands)", style="bold", markup=False)
        told = 0
        for entry in read_entries(_terminal_line if is_terminal else _piped_line):
            if entry.is_command:
                if not commands.run(entry.text):
                    return
                continue
            try:
                said = self.ask(entry.text)
            except UserError as error:
                stderr.print(str(error), style="red", markup=False)
                continue
            if said.finish in _CUT:
                stderr.print(_CUT[said.finish], style="dim", markup=False)
            if said.dropped > told:
                stderr.print(f"[the first {said.dropped} exchanges no longer fit into the context]", style="dim")
            told = said.dropped

    def _show(self, text: str) -> None:
        if not self.as_json:
            sys.stdout.write(_harmless(text) if sys.stdout.isatty() else text)
            sys.stdout.flush()


def as_record(question: str, said: Answer) -> dict[str, object]:
    """An answer as the JSON object that `--json` prints."""
    return {
        "prompt": question,
        "answer": said.text,
        "stopped": said.stopped,
        "finish": said.finish,
        "tokens": said.tokens,
        "prompt_tokens": said.prompt_tokens,
        "dropped_exchanges": said.dropped,
        "special_text": said.lookalikes,
        "seconds": round(said.seconds, 3),
        "tokens_per_second": round(said.tokens / said.seconds, 2) if said.seconds else None,
    }


@dataclass(frozen=True, slots=True)
class Entry:
    """What the user put in: a message or a command."""

    text: str
    is_command: bool = False


def read_entries(read: Callable[[bool], str | None]) -> Iterator[Entry]:
    r"""The user's messages and commands: a line each, or the lines between two fences of `\"\"\"`.

    Empty ones are skipped. What stands in fences is never a command.

    Args:
        read: returns a line, None at the end; told whether the line goes on with a message.
    """
    while (line := read(False)) is not None:
        if line.startswith(_FENCE):
            entry = Entry(_fenced(line[len(_FENCE) :], read))
        else:
            entry = Entry(line.strip(), is_command=line.startswith("/"))
        if entry.text.strip():
            yield entry


def _fenced(first: str, read: Callable[[bool], str | None]) -> str:
    lines = []
    line: str | None = first
    while line is not None and not line.rstrip().endswith(_FENCE):
        lines.append(line)
        line = read(True)
    if line is not None:
        lines.append(line.rstrip()[: -len(_FENCE)])
    return "\n".join(lines).strip("\n")


def _terminal_line(continued: bool) -> str | None:
    while True:
        try:
            return input("… " if continued else "> ")
        except EOFError:
            print(file=sys.stderr)
            return None
        except KeyboardInterrupt:
            # At the prompt Ctrl-C throws the line away, as a shell does.
            print(file=sys.stderr)


def _piped_line(continued: bool) -> str | None:
    line = sys.stdin.readline()
    return line.rstrip("\n") if line else None


def _prepare_line_editing(names: list[str]) -> None:
    """Arrow keys, history and completion of commands, where Python was built with them."""
    try:
        import readline
    except ImportError:
        return

    def complete(text: str, state: int) -> str | None:
        found = [name for name in names if text and name.startswith(text)]
        return found[state] if state < len(found) else None

    readline.set_completer(complete)
    readline.set_completer_delims(" ")
    readline.parse_and_bind("tab: complete")


def _harmless(text: str) -> str:
    """The text without control characters, which a terminal would obey."""
    return "".join(char for char in text if char in "\n\t" or char.isprintable())
