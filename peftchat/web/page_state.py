"""What the server remembers of each open page: its conversation, its blind round, and what stops its answer."""

import threading
from dataclasses import dataclass, field

from peftchat.web.chat_session import ChatSession
from peftchat.web.votes import BlindRound

HUMAN = "human"
"""The judge of a vote where nobody had to give a name."""


@dataclass(slots=True)
class PageState:
    """One open page.

    Attributes:
        chat: its conversation.
        blind: its round with two hidden models; None before the first question.
        stop: ends the answer that is being written for it.
        judge: the user's name.
    """

    chat: ChatSession = field(default_factory=ChatSession)
    blind: BlindRound | None = None
    stop: threading.Event = field(default_factory=threading.Event)
    judge: str = HUMAN

    def begin_answer(self) -> threading.Event:
        """Return what stops the answer that begins now; one that is still being written is stopped."""
        self.stop.set()
        self.stop = threading.Event()
        return self.stop


class OpenPages:
    """The open pages, by the name that Gradio gives each."""

    def __init__(self) -> None:
        self._pages: dict[str, PageState] = {}

    def of(self, key: str | None, judge: str | None = None) -> PageState:
        """Return the state of a page, a new one for a new page."""
        state = self._pages.setdefault(key or "", PageState())
        state.judge = judge or HUMAN
        return state

    def close(self, key: str | None) -> None:
        """Forget a page that was closed, and stop its answer."""
        state = self._pages.pop(key or "", None)
        if state is not None:
            state.stop.set()

    def close_all(self) -> None:
        """Stop all answers."""
        for state in self._pages.values():
            state.stop.set()
