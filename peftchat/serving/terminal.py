"""Terminal chat: slash commands, calls of tools, input and output."""

import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from peftchat.console import stderr
from peftchat.conversation import Message, ToolCall
from peftchat.errors import UserError
from peftchat.files import write_text
from peftchat.output_paths import check_output
from peftchat.paths import expand_path
from peftchat.serving.chat_model import ChatModel
from peftchat.serving.generate import ChatAnswer, generate_answer
from peftchat.serving.history import ChatHistory
from peftchat.serving.reasoning import ReasoningStream, split_reasoning
from peftchat.serving.tool_calls import read_tools_file, tool_name

if TYPE_CHECKING:
    from transformers import GenerationConfig


HELP = """\
/undo         remove the last question and what followed
/clear        remove all questions and answers, keep the system prompt
/system TEXT  set the system prompt; without TEXT, use the template's own
/tools FILE   define the tools of a JSON list; without FILE, none
/result TEXT  give what the next call of the last answer returns; behind the last one, the model goes on
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
        go_on: has the model answer once every call has its result.
    """

    def __init__(self, chat: ChatModel, conversation: ChatHistory, go_on: Callable[[], None]) -> None:
        self._chat = chat
        self._conversation = conversation
        self._go_on = go_on
        self._table: dict[str, Callable[[str], None]] = {
            "/undo": self._undo,
            "/clear": self._clear,
            "/system": self._system,
            "/tools": self._tools,
            "/result": self._result,
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

    def _tools(self, rest: str) -> None:
        try:
            tools = read_tools_file(rest, "/tools") if rest else None
            check_tools(self._chat, tools, f"/tools {rest}")
        except UserError as error:
            _note(str(error))
            return
        self._conversation.tools = tools
        names = [] if tools is None else [str(tool_name(one)) for one in json.loads(tools)]
        _note(f"Tools: {', '.join(names)}." if names else "No tools are defined.")

    def _result(self, rest: str) -> None:
        calls = self._conversation.open_calls()
        if not calls:
            _note("No call waits for a result.")
            return
        self._conversation.turns.append(Message("tool", rest, (), calls[0].id, calls[0].name))
        if len(calls) == 1:
            self._go_on()
        else:
            _note(f"Next: {_shown_call(calls[1])}")

    def _tokens(self, rest: str) -> None:
        context = self._chat.context_length
        # The template's text around the next question counts too.
        used = len(self._chat.prompts.encode(self._conversation.with_question(""), self._conversation.tools).ids)
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


def check_tools(chat: ChatModel, tools: str | None, where: str) -> None:
    """Check that the model's template writes definitions of tools.

    Raises:
        UserError: it refuses them, or writes the same prompt with and without.
    """
    if tools is None:
        return
    question = (Message("user", "question"),)
    try:
        written = chat.prompts.encode(question, tools).ids != chat.prompts.encode(question).ids
    except UserError as error:
        raise UserError(f"the model's template cannot write these tools: {error}", where=where) from error
    if not written:
        raise UserError(
            "the model's template does not write tools, so the model would not see them",
            where=where,
            hint="Choose a model whose template has tools; `peftchat template MODEL` tells.",
        )


def _shown_call(call: ToolCall) -> str:
    return _escape_control_chars(f"{call.name}({call.arguments})")


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
        return self._answer(question, (Message("user", question),))

    def go_on(self) -> ChatAnswer:
        """Generate and print the answer to the results of calls, and add it to the history.

        Raises:
            UserError: the conversation does not fit into the model's context.
        """
        return self._answer(self.conversation.turns[-1].content, ())

    def _answer(self, asked: str, messages: tuple[Message, ...]) -> ChatAnswer:
        history, opened = self.conversation, self.model.prompts.opens_reasoning
        show = _Shown(opened)
        on_text = (lambda text: None) if self.as_json else show.write
        given = (*history.messages(), *messages)
        answer = generate_answer(self.model, given, self.settings, on_text, tools=history.tools)
        show.end()
        written = history.answer(answer.text, opened=opened)
        history.turns += [*messages, written]
        if self.as_json:
            record = as_record(asked, answer, opened=opened)
            if history.tools is not None:
                record["tool_calls"] = [{"name": call.name, "arguments": call.parsed()} for call in written.tool_calls]
                record["answer"] = written.content if written.tool_calls else record["answer"]
            print(json.dumps(record, ensure_ascii=False), flush=True)
        else:
            print(flush=True)
        return answer

    def loop(self) -> None:
        """Answer questions and run commands until the input ends."""
        reported_drops = 0

        def show(ask: Callable[[], ChatAnswer]) -> None:
            nonlocal reported_drops
            try:
                answer = ask()
            except UserError as error:
                stderr.print(str(error), style="red", markup=False)
                return
            if answer.finish in _UNFINISHED:
                _note(_UNFINISHED[answer.finish])
            if answer.dropped > reported_drops:
                stderr.print(f"[the first {answer.dropped} rounds no longer fit into the context]", style="dim")
            reported_drops = answer.dropped
            for call in self.conversation.open_calls()[:1]:
                _note(f"[{_shown_call(call)} waits for /result TEXT]")

        commands = SlashCommands(self.model, self.conversation, lambda: show(self.go_on))
        is_terminal = sys.stdin.isatty()
        if is_terminal:
            _prepare_line_editing(commands.names)
            stderr.print(f"{self.model.name}  (/help lists the commands)", style="bold", markup=False)
        for entry in read_turns(_terminal_line if is_terminal else _piped_line):
            if not entry.is_command:
                show(partial(self.ask, entry.text))
            elif not commands.run(entry.text):
                return


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
