"""The conversation of one terminal session."""

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from peftchat.console import stderr
from peftchat.conversation import Conversation, Message
from peftchat.errors import UserError
from peftchat.files import write_text
from peftchat.serving.chat_model import ChatModel
from peftchat.serving.generate import ChatAnswer, generate_answer

if TYPE_CHECKING:
    from transformers import GenerationConfig


@dataclass(slots=True)
class ChatHistory:
    """What was said so far.

    Attributes:
        system: the system prompt; None leaves it to the model's template.
        turns: the messages after it.
    """

    system: str | None = None
    turns: list[Message] = field(default_factory=list)

    def asked(self, question: str) -> tuple[Message, ...]:
        """The messages with one more question behind them, which is not kept."""
        return (*self.messages(), Message("user", question))

    def add(self, question: str, answer: str) -> None:
        """Keep an exchange."""
        self.turns += [Message("user", question), Message("assistant", answer)]

    def undo(self) -> str | None:
        """Take the last exchange back and return its question; None where there is none."""
        if not self.turns:
            return None
        question = self.turns[-2].content
        del self.turns[-2:]
        return question

    def messages(self) -> tuple[Message, ...]:
        """The whole conversation, the system message first."""
        first = () if self.system is None else (Message("system", self.system),)
        return (*first, *self.turns)

    def as_row(self) -> dict[str, list[dict[str, str]]]:
        """The conversation as a row of the `messages` form, which `peftchat train` reads."""
        return {"messages": Conversation(self.messages()).as_dicts()}


HELP = """\
/undo         take the last question and answer back
/clear        forget the conversation, keep the system prompt
/system TEXT  set the system prompt; without TEXT, leave it to the model's template
/tokens       how much of the context is used
/save FILE    write the conversation as a row of the messages form
/help         this list
/quit         leave; so does the end of input (Ctrl-D)
Text between two lines of \"\"\" is one message. A space before a slash makes it ordinary text.\
"""


class SlashCommands:
    """Carries out the commands on one conversation.

    Args:
        chat: the model, for counting tokens.
        conversation: is changed in place.
    """

    def __init__(self, chat: ChatModel, conversation: ChatHistory) -> None:
        self._chat = chat
        self._conversation = conversation
        self._table: dict[str, Callable[[str], None]] = {
            "/undo": self._undo,
            "/clear": self._clear,
            "/system": self._system,
            "/tokens": self._tokens,
            "/save": self._save,
            "/help": lambda rest: _say(HELP),
        }

    @property
    def names(self) -> list[str]:
        """Every command, for completion."""
        return [*self._table, "/quit"]

    def run(self, line: str) -> bool:
        """Carry out a line that begins with a slash; returns whether the chat goes on."""
        name, _, rest = line.partition(" ")
        if name in ("/quit", "/exit"):
            return False
        action = self._table.get(name)
        if action is None:
            _say(f"There is no command {name}. /help lists them; a space before the slash makes it ordinary text.")
        else:
            action(rest.strip())
        return True

    def _undo(self, rest: str) -> None:
        question = self._conversation.undo()
        _say("There is nothing to take back." if question is None else f"Taken back: {_shortened(question)}")

    def _clear(self, rest: str) -> None:
        self._conversation.turns.clear()
        _say("The conversation is forgotten.")

    def _system(self, rest: str) -> None:
        self._conversation.system = rest or None
        _say(f"System prompt: {rest}" if rest else "The system prompt is left to the model's template.")

    def _tokens(self, rest: str) -> None:
        context = self._chat.context_length
        # The frame of the next question counts: it is what the model will read.
        used = len(self._chat.prompts.encode(self._conversation.asked("")).ids)
        exchanges = sum(message.role == "user" for message in self._conversation.turns)
        _say(f"{used:,} of {context:,} tokens in {exchanges} exchange{'' if exchanges == 1 else 's'}.")

    def _save(self, rest: str) -> None:
        if not rest:
            _say("/save needs the name of a file.")
            return
        path = Path(rest).expanduser()
        if path.exists():
            _say(f"{path} is already there; name another file.")
            return
        try:
            write_text(path, json.dumps(self._conversation.as_row(), ensure_ascii=False) + "\n")
        except OSError as error:
            _say(f"{path} cannot be written: {error.strerror}.")
            return
        _say(f"Saved to {path}.")


def system_refusal(chat: ChatModel, system: str) -> str | None:
    """Why the model's template cannot take a system prompt; None where it can."""
    try:
        chat.prompts.encode((Message("system", system), Message("user", "question")))
    except UserError as error:
        return str(error)
    return None


def _shortened(text: str) -> str:
    first = text.strip().splitlines()[0] if text.strip() else ""
    return first if len(first) <= 60 else f"{first[:59]}…"


def _say(text: str) -> None:
    stderr.print(text, style="dim", markup=False)


_FENCE = '"""'
_CUT = {
    "length": "[the answer was cut at its longest; --max-new-tokens allows more]",
    "turn": "[the model went on to another speaker's turn and was stopped]",
    "interrupted": "[interrupted]",
}


@dataclass(frozen=True, slots=True)
class Chat:
    """A conversation with a model, shown on standard output.

    Attributes:
        as_json: print one JSON object an answer instead of the answer's text.
    """

    model: ChatModel
    settings: "GenerationConfig"
    conversation: ChatHistory
    as_json: bool = False

    def ask(self, question: str) -> ChatAnswer:
        """Put a question, print the answer, and keep both.

        Raises:
            UserError: the question does not fit into the model's context.
        """
        said = generate_answer(self.model, self.conversation.asked(question), self.settings, self._show)
        self.conversation.add(question, said.text)
        if self.as_json:
            print(json.dumps(as_record(question, said), ensure_ascii=False), flush=True)
        else:
            print(flush=True)
        return said

    def loop(self) -> None:
        """Answer questions and obey commands until the input ends."""
        commands = SlashCommands(self.model, self.conversation)
        is_terminal = sys.stdin.isatty()
        if is_terminal:
            _prepare_line_editing(commands.names)
            stderr.print(f"{self.model.name}  (/help lists the commands)", style="bold", markup=False)
        told = 0
        for entry in read_turns(_terminal_line if is_terminal else _piped_line):
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
            sys.stdout.write(_escape_control_chars(text) if sys.stdout.isatty() else text)
            sys.stdout.flush()


def as_record(question: str, said: ChatAnswer) -> dict[str, object]:
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
class ChatTurn:
    """What the user put in: a message or a command."""

    text: str
    is_command: bool = False


def read_turns(read: Callable[[bool], str | None]) -> Iterator[ChatTurn]:
    r"""The user's messages and commands: a line each, or the lines between two fences of `\"\"\"`.

    Empty ones are skipped. What stands in fences is never a command.

    Args:
        read: returns a line, None at the end; told whether the line goes on with a message.
    """
    while (line := read(False)) is not None:
        if line.startswith(_FENCE):
            entry = ChatTurn(_fenced(line[len(_FENCE) :], read))
        else:
            entry = ChatTurn(line.strip(), is_command=line.startswith("/"))
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


def _escape_control_chars(text: str) -> str:
    """The text without control characters, which a terminal would obey."""
    return "".join(char for char in text if char in "\n\t" or char.isprintable())
