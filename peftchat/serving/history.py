"""The conversation of a terminal chat: its turns, the tools it defines, and the calls that wait for a result."""

import itertools
from dataclasses import dataclass, field
from typing import Any

from peftchat.conversation import Conversation, Message, ToolCall
from peftchat.serving.reasoning import split_reasoning
from peftchat.serving.tool_calls import split_calls


@dataclass(slots=True)
class ChatHistory:
    """The conversation so far.

    Attributes:
        system: the system prompt; None keeps the template's own.
        tools: definitions of tools, JSON text of a list; None without any.
        turns: the messages after it.
    """

    system: str | None = None
    tools: str | None = None
    turns: list[Message] = field(default_factory=list)

    def with_question(self, question: str) -> tuple[Message, ...]:
        """Return the messages with a further question, which is not added to the history."""
        return (*self.messages(), Message("user", question))

    def undo(self) -> str | None:
        """Remove the last question with everything behind it, and return it.

        It is None if there is none.
        """
        asked = [index for index, turn in enumerate(self.turns) if turn.role == "user"]
        if not asked:
            return None
        question = self.turns[asked[-1]].content
        del self.turns[asked[-1] :]
        return question

    def open_calls(self) -> list[ToolCall]:
        """Return the calls of the last answer that have no result yet."""
        answers = [index for index, turn in enumerate(self.turns) if turn.role == "assistant"]
        if not answers:
            return []
        behind = self.turns[answers[-1] + 1 :]
        calls = self.turns[answers[-1]].tool_calls if all(turn.role == "tool" for turn in behind) else ()
        return list(calls[len(behind) :])

    def answer(self, text: str, *, opened: bool) -> Message:
        """Return an answer as a message: where tools are defined, its calls are told apart.

        Args:
            text: the model's.
            opened: whether the prompt opened a reasoning.
        """
        if self.tools is None:
            return Message("assistant", text)
        reasoning, content = split_reasoning(text, opened=opened)
        given = sum(len(turn.tool_calls) for turn in self.turns)
        content, calls = split_calls(content, self.tools, itertools.count(given + 1))
        if not calls:
            return Message("assistant", text)
        return Message("assistant", content, calls, reasoning=reasoning)

    def messages(self) -> tuple[Message, ...]:
        """Return all messages, the system message first."""
        first = () if self.system is None else (Message("system", self.system),)
        return (*first, *self.turns)

    def as_record(self) -> dict[str, Any]:
        """Return the conversation as a record of the `messages` format."""
        record: dict[str, Any] = {"messages": Conversation(self.messages()).as_dicts()}
        # As text, which keeps numbers as they were typed.
        return record if self.tools is None else {**record, "tools": self.tools}
