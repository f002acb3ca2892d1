"""The dialogue of one terminal session."""

from dataclasses import dataclass, field

from peftchat.conversation import Conversation, Message


@dataclass(slots=True)
class Dialogue:
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
        """The whole dialogue, the system message first."""
        first = () if self.system is None else (Message("system", self.system),)
        return (*first, *self.turns)

    def as_row(self) -> dict[str, list[dict[str, str]]]:
        """The dialogue as a row of the `messages` form, which `peftchat train` reads."""
        return {"messages": Conversation(self.messages()).as_dicts()}
