"""The conversation of one user in the browser: its turns, and the branches that edits and retries leave."""

from dataclasses import dataclass, field
from typing import Any

from peftchat.conversation import Conversation, Message
from peftchat.errors import UserError
from peftchat.serving.reasoning import split_reasoning


@dataclass(slots=True)
class ChatSession:
    """A conversation that can be edited anywhere. What an edit replaces stays as a branch.

    Attributes:
        system: the system prompt; None leaves it to the model's template.
        tools: definitions of tools, JSON text of a list.
        branches: the conversations, each without its system message; the user is in one of them.
        current: the number of that one.
    """

    system: str | None = None
    tools: str | None = None
    branches: list[list[Message]] = field(default_factory=lambda: [[]])
    current: int = 0

    @property
    def turns(self) -> list[Message]:
        """The turns of the current branch."""
        return self.branches[self.current]

    @property
    def waits(self) -> bool:
        """Whether the last turn is a question without an answer."""
        return bool(self.turns) and self.turns[-1].role == "user"

    def ask(self, question: str) -> None:
        """Add a question.

        Raises:
            UserError: it is empty, or the last one has no answer yet.
        """
        if not question.strip():
            raise UserError("the question is empty")
        if self.waits:
            raise UserError("the last question has no answer yet", hint="Retry it, or edit it.")
        self.turns.append(Message("user", question))

    def answer(self, text: str, *, opened: bool = False) -> None:
        """Add the model's answer to the last question.

        Args:
            text: the answer, with its reasoning.
            opened: whether the prompt opened a reasoning.
        """
        reasoning, content = split_reasoning(text, opened=opened)
        self.turns.append(Message("assistant", content, reasoning=reasoning or None))

    def withdraw(self) -> str:
        """Remove the last question, which got no answer, and return it."""
        return self.turns.pop().content if self.waits else ""

    def retry(self, index: int | None = None) -> None:
        """Go back to a question to have it answered again; the former answer stays as a branch.

        Args:
            index: of the question among the turns; None for the last.
        """
        questions = [at for at, turn in enumerate(self.turns) if turn.role == "user"]
        if index is None or index not in questions:
            index = questions[-1] if questions else None
        if index is None:
            raise UserError("there is no question yet")
        self._fork(self.turns[: index + 1])

    def undo(self) -> str:
        """Go back to before the last question, and return it; what it removes stays as a branch."""
        questions = [at for at, turn in enumerate(self.turns) if turn.role == "user"]
        if not questions:
            return ""
        question = self.turns[questions[-1]].content
        self._fork(self.turns[: questions[-1]])
        return question

    def edit(self, index: int, text: str) -> bool:
        """Change a turn. A changed question has to be answered again, and loses what follows; an answer does not.

        Args:
            index: of the turn among the turns.
            text: its new content.

        Returns:
            Whether an answer is to be generated.

        Raises:
            UserError: the text is empty, or there is no such turn.
        """
        if not text.strip():
            raise UserError("the message would be empty")
        if not 0 <= index < len(self.turns):
            raise UserError("there is no such message any more")
        turn = self.turns[index]
        if text == turn.content:
            return False
        is_question = turn.role == "user"
        self._fork(
            [*self.turns[:index], turn._replace(content=text), *([] if is_question else self.turns[index + 1 :])]
        )
        return is_question

    def clear(self) -> None:
        """Begin a new conversation; system prompt and tools stay."""
        self.branches, self.current = [[]], 0

    def branch_names(self) -> list[str]:
        """Return a name for each branch, by its last turn."""
        return [f"{number}: {_last_words(turns)}" for number, turns in enumerate(self.branches, start=1)]

    def messages(self) -> tuple[Message, ...]:
        """Return what the model is asked, the system message first; earlier reasoning is left out."""
        first = () if self.system is None else (Message("system", self.system),)
        return (*first, *(turn._replace(reasoning=None) for turn in self.turns))

    def conversation(self, turns: int | None = None) -> Conversation:
        """Return the conversation with its reasoning, as it would be trained.

        Args:
            turns: only the first so many; None for all.
        """
        first = () if self.system is None else (Message("system", self.system),)
        return Conversation((*first, *self.turns[:turns]), tools=self.tools)

    def as_record(self) -> dict[str, Any]:
        """Return the conversation as a record of the `messages` format, which `data prepare` reads.

        Raises:
            UserError: it does not end with an answer.
        """
        if not self.turns or self.turns[-1].role != "assistant":
            raise UserError("the conversation does not end with an answer", hint="Have the question answered first.")
        record: dict[str, Any] = {"messages": self.conversation().as_dicts()}
        if self.tools is not None:
            # As text, which keeps numbers as they were typed.
            record["tools"] = self.tools
        return record

    def _fork(self, turns: list[Message]) -> None:
        """Go on with other turns. The former ones stay, unless they are the beginning of the new ones."""
        if self.turns == turns[: len(self.turns)]:
            self.branches[self.current] = turns
            return
        self.branches.append(turns)
        self.current = len(self.branches) - 1


def _last_words(turns: list[Message]) -> str:
    if not turns:
        return "empty"
    text = " ".join(turns[-1].content.split())
    return text if len(text) <= 40 else f"{text[:39]}…"
