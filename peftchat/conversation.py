"""The one type between the input forms (`sources`) and the encoding (`chatml`)."""

from dataclasses import dataclass
from typing import Literal, get_args

Role = Literal["system", "user", "assistant", "tool"]
ROLES: tuple[Role, ...] = get_args(Role)


@dataclass(frozen=True, slots=True)
class Message:
    """One turn: who speaks, and what they say as plain text."""

    role: Role
    content: str


@dataclass(frozen=True, slots=True)
class Conversation:
    """One conversation, in order.

    Attributes:
        messages: the turns, system message first where there is one.
        source: where the conversation came from, as `file:line` (lines count from 1; for files that are one JSON array,
            the number of the element, from 1).
    """

    messages: tuple[Message, ...]
    source: str = ""

    def as_dicts(self) -> list[dict[str, str]]:
        """The messages in the form that chat templates and `messages` files use."""
        return [{"role": message.role, "content": message.content} for message in self.messages]
