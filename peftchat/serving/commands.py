"""The commands of the terminal chat: lines that begin with a slash."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

from peftchat.console import stderr
from peftchat.conversation import Message
from peftchat.errors import UserError
from peftchat.files import write_text
from peftchat.serving.dialogue import Dialogue
from peftchat.serving.load import ChatModel

if TYPE_CHECKING:
    from collections.abc import Callable

HELP = """\
/undo         take the last question and answer back
/clear        forget the dialogue, keep the system prompt
/system TEXT  set the system prompt; without TEXT, leave it to the model's template
/tokens       how much of the context is used
/save FILE    write the dialogue as a row of the messages form
/help         this list
/quit         leave; so does the end of input (Ctrl-D)
Text between two lines of \"\"\" is one message. A space before a slash makes it ordinary text.\
"""


class Commands:
    """Carries out the commands on one dialogue.

    Args:
        chat: the model, for counting tokens.
        dialogue: is changed in place.
    """

    def __init__(self, chat: ChatModel, dialogue: Dialogue) -> None:
        self._chat = chat
        self._dialogue = dialogue
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
        question = self._dialogue.undo()
        _say("There is nothing to take back." if question is None else f"Taken back: {_shortened(question)}")

    def _clear(self, rest: str) -> None:
        self._dialogue.turns.clear()
        _say("The dialogue is forgotten.")

    def _system(self, rest: str) -> None:
        self._dialogue.system = rest or None
        _say(f"System prompt: {rest}" if rest else "The system prompt is left to the model's template.")

    def _tokens(self, rest: str) -> None:
        context = self._chat.context
        # The frame of the next question counts: it is what the model will read.
        used = len(self._chat.prompts.encode(self._dialogue.asked("")).ids)
        exchanges = sum(message.role == "user" for message in self._dialogue.turns)
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
            write_text(path, json.dumps(self._dialogue.as_row(), ensure_ascii=False) + "\n")
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
