"""Terminal chat: history, slash commands, input and output."""

import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from peftchat.console import stderr
from peftchat.conversation import Conversation, Message
from peftchat.errors import UserError
from peftchat.files import write_text
from peftchat.output_paths import check_output
from peftchat.paths import expand_path
from peftchat.serving.chat_model import ChatModel
from peftchat.serving.generate import ChatAnswer, generate_answer
from peftchat.serving.reasoning import ReasoningStream, split_reasoning

if TYPE_CHECKING:
    from transformers import GenerationConfig


@dataclass(slots=True)
class ChatHistory:
    """The conversation so far.

    Attributes:
        system: the system prompt; None keeps the template's own.
        turns: the messages after it.
    """

    system: str | None = None
    turns: list[Message] = field(default_factory=list)

    def with_question(self, question: str) -> tuple[Message, ...]:
        """Return the messages with a further question, which is not added to the history."""
        return (*self.messages(), Message("user", question))

    def add(self, question: str, answer: str) -> None:
        """Add a question and its answer."""
        self.turns += [Message("user", question), Message("assistant", answer)]

    def undo(self) -> str | None:
        """Remove the last question and answer and return the question.

        It is None if there is none.
        """
        if not self.turns:
            return None
        question = self.turns[-2].content
        del self.turns[-2:]
        return question

    def messages(self) -> tuple[Message, ...]:
        """Return all messages, the system message first."""
        first = () if self.system is None else (Message("system", self.system),)
        return (*first, *self.turns)

    def as_record(self) -> dict[str, list[dict[str, str]]]:
        """Return the conversation as a record of the `messages` format."""
        return {"messages": Conversation(self.messages()).as_dicts()}


HELP = """\
/undo         remove the last question and answer
/clear        remove all questions and answers, keep the system prompt
/system TEXT  set the system prompt; without TEXT, use the template's own
/tokens       show how much of the context is used
/save FILE    write the conversation as a record of the messages format
/help         show this list
/quit         leave; so does the end of input (Ctrl-D)
Text between two lines of \"\"\" is one message. A space before a slash makes it ordinary text.\
"""


class SlashCommands:
    """Runs slash commands on one conversation.

    Args:
        chat: the model, for counting tokens.
        conversation: the history, which the commands change.
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
            "/help": lambda rest: _note(HELP),
        }

    @property
    def names(self) -> list[str]:
        """Every command, for completion."""
        return [*self._table, "/quit"]

    def run(self, line: str) -> bool:
        """Run a line that begins with a slash and return whether the chat continues."""
        name, _, rest = line.partition(" ")
        if name in ("/quit", "/exit"):
            return False
        action = self._table.get(name)
        if action is None:
            _note(f"There is no command {name}. /help lists them; a space before the slash makes it ordinary text.")
        else:
            action(rest.strip())
        return True

    def _undo(self, rest: str) -> None:
        question = self._conversation.undo()
        _note("There is nothing to remove." if question is None else f"Removed: {_first_words(question)}")

    def _clear(self, rest: str) -> None:
        self._conversation.turns.clear()
        _note("The conversation is cleared.")

    def _system(self, rest: str) -> None:
        self._conversation.system = rest or None
        _note(f"System prompt: {rest}" if rest else "The system prompt is the one of the model's template.")

    def _tokens(self, rest: str) -> None:
        context = self._chat.context_length
        # The template's text around the next question counts too.
        used = len(self._chat.prompts.encode(self._conversation.with_question("")).ids)
        rounds = sum(message.role == "user" for message in self._conversation.turns)
        _note(f"{used:,} of {context:,} tokens in {rounds} round{'' if rounds == 1 else 's'}.")

    def _save(self, rest: str) -> None:
        if not rest:
            _note("/save needs a file name.")
            return
        try:
            path = Path(expand_path(rest, "/save"))
            check_output(path, (), "/save")
        except UserError as error:
            _note(str(error))
            return
        if path.exists():
            _note(f"{path} already exists; choose another name.")
            return
        try:
            write_text(path, json.dumps(self._conversation.as_record(), ensure_ascii=False) + "\n")
        except OSError as error:
            _note(f"{path} cannot be written: {error.strerror}.")
            return
        _note(f"Saved to {path}.")


def system_prompt_error(chat: ChatModel, system: str) -> str | None:
    """Return why the model's template does not support a system prompt.

    It is None if the template does.
    """
    try:
        chat.prompts.encode((Message("system", system), Message("user", "question")))
    except UserError as error:
        return str(error)
    return None


def _first_words(text: str) -> str:
    first = text.strip().splitlines()[0] if text.strip() else ""
    return first if len(first) <= 60 else f"{first[:59]}…"


def _note(text: str) -> None:
    stderr.print(text, style="dim", markup=False)


_FENCE = '"""'
_UNFINISHED = {
    "length": "[the answer reached the token limit; raise it with --max-new-tokens]",
    "turn": "[the model started another turn and was stopped]",
    "interrupted": "[interrupted]",
}


@dataclass(frozen=True, slots=True)
class Chat:
    """A conversation with a model, shown on standard output.

    Attributes:
        as_json: print one JSON object per answer instead of the answer's text.
    """

    model: ChatModel
    settings: "GenerationConfig"
    conversation: ChatHistory
    as_json: bool = False

    def ask(self, question: str) -> ChatAnswer:
        """Generate and print the answer to a question, and add both to the history.

        Raises:
            UserError: the question does not fit into the model's context.
        """
        show = _Shown(self.model.prompts.opens_reasoning)
        on_text = (lambda text: None) if self.as_json else show.write
        answer = generate_answer(self.model, self.conversation.with_question(question), self.settings, on_text)
        show.end()
        self.conversation.add(question, answer.text)
        if self.as_json:
            record = as_record(question, answer, opened=self.model.prompts.opens_reasoning)
            print(json.dumps(record, ensure_ascii=False), flush=True)
        else:
            print(flush=True)
        return answer

    def loop(self) -> None:
        """Answer questions and run commands until the input ends."""
        commands = SlashCommands(self.model, self.conversation)
        is_terminal = sys.stdin.isatty()
        if is_terminal:
            _prepare_line_editing(commands.names)
            stderr.print(f"{self.model.name}  (/help lists the commands)", style="bold", markup=False)
        reported_drops = 0
        for entry in read_turns(_terminal_line if is_terminal else _piped_line):
            if entry.is_command:
                if not commands.run(entry.text):
                    return
                continue
            try:
                answer = self.ask(entry.text)
            except UserError as error:
                stderr.print(str(error), style="red", markup=False)
                continue
            if answer.finish in _UNFINISHED:
                stderr.print(_UNFINISHED[answer.finish], style="dim", markup=False)
            if answer.dropped > reported_drops:
                stderr.print(f"[the first {answer.dropped} rounds no longer fit into the context]", style="dim")
            reported_drops = answer.dropped


class _Shown:
    """Writes an answer to standard output as it comes; on a terminal its reasoning is dim.

    Args:
        opened: whether the prompt opened a reasoning.
    """

    def __init__(self, opened: bool) -> None:
        self._stream = ReasoningStream(opened)
        self._color = sys.stdout.isatty() and "NO_COLOR" not in os.environ

    def write(self, text: str) -> None:
        if sys.stdout.isatty():
            self._write(self._stream.feed(text))
        else:
            sys.stdout.write(text)
            sys.stdout.flush()

    def end(self) -> None:
        self._write(self._stream.end())

    def _write(self, pieces: Iterator[tuple[str, bool]]) -> None:
        for piece, is_reasoning in pieces:
            shown = _escape_control_chars(piece)
            sys.stdout.write(f"\x1b[2m{shown}\x1b[0m" if is_reasoning and self._color else shown)
            sys.stdout.flush()


def as_record(question: str, answer: ChatAnswer, *, opened: bool = False) -> dict[str, object]:
    """Return an answer as the JSON object that `--json` prints.

    Args:
        question: the user's.
        answer: the model's.
        opened: whether the prompt opened a reasoning.
    """
    reasoning, content = split_reasoning(answer.text, opened=opened)
    return {
        "prompt": question,
        "answer": content,
        "reasoning": reasoning,
        "stopped": answer.stopped,
        "finish": answer.finish,
        "tokens": answer.tokens,
        "prompt_tokens": answer.prompt_tokens,
        "dropped_exchanges": answer.dropped,
        "special_token_text": answer.special_token_text,
        "seconds": round(answer.seconds, 3),
        "tokens_per_second": round(answer.tokens / answer.seconds, 2) if answer.seconds else None,
    }


@dataclass(frozen=True, slots=True)
class ChatTurn:
    """One input of the user: a message or a command."""

    text: str
    is_command: bool = False


def read_turns(read: Callable[[bool], str | None]) -> Iterator[ChatTurn]:
    r"""Yield the user's messages and commands.

    Each is one line, or the lines between two fences of `\"\"\"`. Empty ones are skipped. Text in fences is never a
    command.

    Args:
        read: returns a line, None at the end; its argument is True if the line continues a message.
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
            # At the prompt Ctrl-C discards the line, as a shell does.
            print(file=sys.stderr)


def _piped_line(continued: bool) -> str | None:
    line = sys.stdin.readline()
    return line.rstrip("\n") if line else None


def _prepare_line_editing(names: list[str]) -> None:
    """Enable arrow keys, history and completion of commands, if Python has readline."""
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
    """Return the text without control characters, which a terminal would interpret."""
    return "".join(char for char in text if char in "\n\t" or char.isprintable())
