"""The tab with two hidden models side by side, and the vote."""

from collections.abc import Iterator
from typing import Any

from markupsafe import Markup

from peftchat.conversation import Message
from peftchat.errors import UserError, first_line
from peftchat.formatting import format_percent
from peftchat.serving.reasoning import split_reasoning
from peftchat.web.answer_stream import AnswerStep, stream_answer
from peftchat.web.chat_tab import ONE_AT_A_TIME, Updates, status_line
from peftchat.web.kept_files import KeptFiles
from peftchat.web.loaded_models import LoadedModels
from peftchat.web.page_state import OpenPages, PageState
from peftchat.web.settings_panel import SettingsPanel, read_settings, sampling_as_dict
from peftchat.web.shown_turns import show_turns
from peftchat.web.votes import WINNERS, BlindRound, PairTally, Winner, new_round, tally

_BUTTONS: dict[Winner, str] = {
    "model_a": "Left is better",
    "tie": "Tie",
    "tie (bothbad)": "Both are bad",
    "model_b": "Right is better",
}
_HIDDEN = ("Left", "Right")


class CompareTab:
    """The components of the tab and what they do.

    Args:
        models: at least two.
        pages: the open pages.
        kept: where votes and pairs go.
    """

    def __init__(self, models: LoadedModels, pages: OpenPages, kept: KeptFiles) -> None:
        import gradio as gr

        self._models, self._pages, self._kept = models, pages, kept
        with gr.Row(elem_classes="pc-sides"):
            self.sides = [
                gr.Chatbot(
                    label=name,
                    height="max(220px, 100vh - 430px)",
                    min_width=280,
                    buttons=["copy"],
                    feedback_options=None,
                    placeholder="The same question goes to two models.",
                    elem_id=f"side-{name.lower()}",
                )
                for name in _HIDDEN
            ]
        self.status = gr.HTML(status_line(""), elem_id="compare-status", padding=False)
        with gr.Row(elem_classes="pc-votes"):
            self.votes = {
                winner: gr.Button(text, size="sm", min_width=120, interactive=False, elem_id=f"vote-{number}")
                for number, (winner, text) in enumerate(_BUTTONS.items())
            }
        with gr.Row(elem_classes="pc-ask"):
            self.question = gr.Textbox(
                label="Question to both",
                show_label=False,
                placeholder="Question to both (Enter sends)",
                lines=1,
                max_lines=8,
                scale=6,
                elem_id="compare-question",
                html_attributes=gr.InputHTMLAttributes(autocomplete="off"),
            )
            self.send = gr.Button("Send", variant="primary", scale=1, min_width=80, elem_id="compare-send")
            self.stop = gr.Button(
                "Stop", variant="stop", scale=1, min_width=80, interactive=False, elem_id="compare-stop"
            )
        with gr.Row(elem_classes="pc-bar"):
            self.keep = gr.Button(
                "Keep as preference pair", size="sm", min_width=120, interactive=False, elem_id="keep-pair"
            )
            self.next = gr.Button("New pair", size="sm", min_width=120, elem_id="next-pair")
        with gr.Accordion("Votes so far", open=False, elem_id="tally"):
            self.tally = gr.HTML(tally_as_html(tally(kept.votes.votes)), elem_id="tally-table")

    def connect(self, settings: SettingsPanel) -> None:
        """Have the components do their work.

        Args:
            settings: of the page.
        """
        import gradio as gr

        shown = [*self.sides, self.question, self.status, self.send, self.stop, *self.votes.values(), self.keep]
        shown.append(self.tally)
        quick: dict[str, Any] = {"outputs": shown, "show_progress": "hidden", "api_visibility": "private"}

        def ask(request: gr.Request, question: str, *values: Any) -> Iterator[Updates]:
            yield from self._answer(self._state(request), question, values)

        def vote_for(winner: Winner) -> Any:
            def vote(request: gr.Request, *values: Any) -> Updates:
                return self._vote(self._state(request), winner, values)

            return vote

        def begin(request: gr.Request) -> Updates:
            state = self._state(request)
            state.stop.set()
            state.blind = None
            return self._updates(state, "")

        def stop(request: gr.Request) -> None:
            self._state(request).stop.set()

        def keep(request: gr.Request, *values: Any) -> Updates:
            state = self._state(request)
            try:
                system, tools, _ = read_settings(values)
                blind = state.blind or BlindRound("", "")
                text = self._kept.keep_pair(blind, system, tools)
            except (UserError, OSError) as error:
                return {self.status: status_line(first_line(error), bad=True)}
            return {self.status: status_line(text)}

        gr.on(
            [self.send.click, self.question.submit],
            ask,
            [self.question, *settings.fields],
            concurrency_id=ONE_AT_A_TIME,
            concurrency_limit=1,
            **quick,
        )
        for winner in WINNERS:
            self.votes[winner].click(vote_for(winner), settings.fields, **quick)
        self.next.click(begin, None, **quick)
        self.keep.click(keep, settings.fields, **quick)
        self.stop.click(stop, None, None, queue=False, api_visibility="private")

    def _state(self, request: Any) -> PageState:
        return self._pages.of(request.session_hash, request.username)

    def _answer(self, state: PageState, question: str, values: tuple[Any, ...]) -> Iterator[Updates]:
        """Have both models answer, the left one first; nothing stays of a question that one did not answer."""
        try:
            system, tools, sampling = read_settings(values)
            if not question.strip():
                raise UserError("the question is empty")
        except UserError as error:
            yield self._updates(state, str(error), bad=True)
            return
        if state.blind is None or state.blind.vote is not None:
            state.blind = new_round(self._models.names, self._kept.votes.votes)
        blind = state.blind
        for _, turns in blind.sides():
            turns.append(Message("user", question))
        yield {**self._updates(state, "…", busy=True), self.question: ""}
        stop = state.begin_answer()
        first = () if system is None else (Message("system", system),)
        found: list[Message] = []
        try:
            for side, (name, turns) in zip(self.sides, blind.sides(), strict=True):
                asked = (*first, *(turn._replace(reasoning=None) for turn in turns))
                step = AnswerStep(None, "")
                for step in stream_answer(self._models, name, asked, sampling, tools=tools, stop=stop):
                    if step.answer is None:
                        yield {side: show_turns(turns, step)}
                answer = step.answer
                if answer is None or answer.finish == "interrupted":
                    raise UserError("Stopped. An answer that was cut off is not compared.")
                reasoning, content = split_reasoning(answer.text, opened=step.opened)
                found.append(Message("assistant", content, reasoning=reasoning or None))
                yield {side: show_turns([*turns, found[-1]])}
        except Exception as error:
            for _, turns in blind.sides():
                turns.pop()
            # Which of the two failed would tell who is where.
            text = str(error) if isinstance(error, UserError) else f"A model failed: {first_line(error)}"
            yield {**self._updates(state, text, bad=True), self.question: question}
            return
        for (_, turns), message in zip(blind.sides(), found, strict=True):
            turns.append(message)
        yield self._updates(state, "Which answer is better? You may also ask on before you vote.")

    def _vote(self, state: PageState, winner: Winner, values: tuple[Any, ...]) -> Updates:
        blind = state.blind
        if blind is None:
            return {self.status: status_line("Ask a question first.", bad=True)}
        try:
            system, tools, sampling = read_settings(values)
            settings = sampling_as_dict(sampling)
            vote = blind.decide(winner, judge=state.judge, system=system, sampling=settings, tools=tools)
            self._kept.votes.add(vote)
        except (UserError, OSError) as error:
            if isinstance(error, OSError):
                blind.vote = None
            return {self.status: status_line(first_line(error), bad=True)}
        count = len(self._kept.votes.votes)
        return self._updates(
            state,
            f"Left was {blind.model_a}, right was {blind.model_b}. Vote {count} is in {self._kept.votes.path}. "
            "The next question begins a new pair.",
        )

    def _updates(self, state: PageState, note: str, *, busy: bool = False, bad: bool = False) -> Updates:
        import gradio as gr

        blind = state.blind or BlindRound("", "")
        can_vote, decided = blind.can_vote and not busy, blind.vote is not None
        updates: Updates = {
            side: gr.update(value=show_turns(turns), label=f"{hidden}: {name}" if decided else hidden)
            for side, hidden, (name, turns) in zip(self.sides, _HIDDEN, blind.sides(), strict=True)
        }
        buttons = {button: gr.update(interactive=can_vote) for button in self.votes.values()}
        won = blind.vote is not None and blind.vote.preferred is not None
        return {
            **updates,
            **buttons,
            self.status: status_line(note, bad=bad),
            self.send: gr.update(interactive=not busy),
            self.stop: gr.update(interactive=busy),
            self.keep: gr.update(interactive=won),
            self.tally: tally_as_html(tally(self._kept.votes.votes)),
        }


def tally_as_html(pairs: list[PairTally]) -> str:
    """Return the votes of each pair of models as a table."""
    if not pairs:
        return "<p>No votes yet.</p>"
    rows = Markup("").join(
        Markup("<tr><td>{}</td><td>{}</td><td>{}</td><td>{}</td><td>{}</td><td>{} ({} to {})</td></tr>").format(
            pair.first,
            pair.second,
            pair.wins,
            pair.losses,
            pair.ties,
            format_percent(pair.share),
            *map(format_percent, pair.interval),
        )
        for pair in pairs
    )
    heads = ("model", "other model", "won", "lost", "ties", "share of the votes (95 % interval)")
    head = Markup("").join(Markup('<th scope="col">{}</th>').format(name) for name in heads)
    return str(
        Markup(
            '<div class="pc-table" role="region" aria-label="Votes so far" tabindex="0"><table>'
            "<thead><tr>{}</tr></thead><tbody>{}</tbody></table></div>"
        ).format(head, rows)
    )
