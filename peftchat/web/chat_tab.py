"""The tab with one conversation: ask, stop, retry, undo, edit, branches, keep, tokens."""

from collections.abc import Iterator
from typing import Any

from markupsafe import Markup

from peftchat.errors import UserError, first_line
from peftchat.web.answer_stream import AnswerStep, stream_answer
from peftchat.web.kept_files import KeptFiles
from peftchat.web.loaded_models import LoadedModels
from peftchat.web.page_state import OpenPages, PageState
from peftchat.web.settings_panel import SettingsPanel, read_settings
from peftchat.web.shown_turns import show_turns, text_of, turn_at
from peftchat.web.token_view import tokens_as_html, view_tokens

ONE_AT_A_TIME = "models"
"""Gradio's queue of what needs a model."""

Updates = dict[Any, Any]
"""Gradio's components with what they become."""


class ChatTab:
    """The components of the tab and what they do.

    Args:
        models: what may be chosen.
        pages: the open pages.
        kept: where examples go.
    """

    def __init__(self, models: LoadedModels, pages: OpenPages, kept: KeptFiles) -> None:
        import gradio as gr

        self._models, self._pages, self._kept = models, pages, kept
        several = len(models.names) > 1
        with gr.Row(elem_classes="pc-bar"):
            self.model = gr.Dropdown(
                models.names, value=models.names[0], label="Model", visible=several, scale=3, elem_id="model"
            )
            self.branch = gr.Dropdown(
                [], label="Branch", visible=False, scale=3, type="index", interactive=True, elem_id="branch"
            )
        self.chatbot = gr.Chatbot(
            label="Conversation",
            show_label=False,
            height="max(260px, 100vh - 400px)",
            editable="all",
            buttons=["copy"],
            feedback_options=None,
            placeholder="Ask something below.",
            elem_id="chat",
        )
        self.status = gr.HTML(status_line(""), elem_id="status", padding=False)
        with gr.Row(elem_classes="pc-ask"):
            self.question = gr.Textbox(
                label="Message",
                show_label=False,
                placeholder="Message (Enter sends, Shift+Enter breaks the line)",
                lines=1,
                max_lines=8,
                scale=6,
                autofocus=True,
                elem_id="question",
                html_attributes=gr.InputHTMLAttributes(autocomplete="off"),
            )
            self.send = gr.Button("Send", variant="primary", scale=1, min_width=80, elem_id="send")
            self.stop = gr.Button("Stop", variant="stop", scale=1, min_width=80, interactive=False, elem_id="stop")
        with gr.Row(elem_classes="pc-bar"):
            self.keep = gr.Button("Keep as training example", size="sm", min_width=120, elem_id="keep")
            self.show_tokens = gr.Button("Show tokens", size="sm", min_width=120, elem_id="show-tokens")
            self.clear = gr.Button("New chat", size="sm", min_width=120, elem_id="clear")
        self.tokens = gr.HTML("", elem_id="token-view", visible=False)

    def connect(self, settings: SettingsPanel) -> None:
        """Have the components do their work.

        Args:
            settings: of the page.
        """
        import gradio as gr

        fields = [self.model, *settings.fields]
        shown = [self.chatbot, self.question, self.status, self.send, self.stop, self.branch, self.tokens]
        answers: dict[str, Any] = {
            "outputs": shown,
            "show_progress": "hidden",
            "concurrency_id": ONE_AT_A_TIME,
            "concurrency_limit": 1,
            "api_visibility": "private",
        }
        quick: dict[str, Any] = {
            "outputs": shown,
            "show_progress": "hidden",
            "queue": False,
            "api_visibility": "private",
        }

        def ask(request: gr.Request, question: str, model: str, *values: Any) -> Iterator[Updates]:
            state = self._state(request)
            yield from self._answer(state, model, values, lambda: state.chat.ask(question))

        def retry(request: gr.Request, event: gr.RetryData, model: str, *values: Any) -> Iterator[Updates]:
            state = self._state(request)
            index, _ = turn_at(state.chat.turns, _first(event.index))
            yield from self._answer(state, model, values, lambda: state.chat.retry(index))

        def edit(request: gr.Request, event: gr.EditData, model: str, *values: Any) -> Iterator[Updates]:
            state = self._state(request)
            index, is_reasoning = turn_at(state.chat.turns, _first(event.index))
            if is_reasoning:
                yield self._updates(state, note="The reasoning stays as the model wrote it.")
                return
            questions: list[bool] = []
            yield from self._answer(
                state,
                model,
                values,
                lambda: questions.append(state.chat.edit(index, text_of(event.value))),
                is_wanted=lambda: questions[-1],
            )

        def undo(request: gr.Request) -> Updates:
            state = self._state(request)
            return {**self._updates(state, note=""), self.question: state.chat.undo(), **self._turns(state)}

        def clear(request: gr.Request) -> Updates:
            state = self._state(request)
            state.stop.set()
            state.chat.clear()
            return self._updates(state, note="")

        def choose_branch(request: gr.Request, index: int | None) -> Updates:
            state = self._state(request)
            if index is not None and 0 <= index < len(state.chat.branches):
                state.chat.current = index
            return self._updates(state, note="")

        def stop(request: gr.Request) -> None:
            self._state(request).stop.set()

        def keep(request: gr.Request) -> str:
            try:
                return status_line(self._kept.keep_example(self._state(request).chat.as_record()))
            except (UserError, OSError) as error:
                return status_line(first_line(error), bad=True)

        def show_tokens(request: gr.Request, model: str) -> Updates:
            return self._token_updates(self._state(request), model)

        gr.on([self.send.click, self.question.submit], ask, [self.question, *fields], **answers)
        self.chatbot.retry(retry, fields, **answers)
        self.chatbot.edit(edit, fields, **answers)
        self.chatbot.undo(undo, None, **quick)
        gr.on([self.clear.click, self.chatbot.clear], clear, None, **quick)
        self.branch.input(choose_branch, self.branch, **quick)
        self.stop.click(stop, None, None, queue=False, api_visibility="private")
        self.keep.click(keep, None, self.status, show_progress="hidden", api_visibility="private")
        self.show_tokens.click(show_tokens, self.model, **answers).then(
            None, None, None, js="() => document.getElementById('token-view')?.scrollIntoView({block: 'nearest'})"
        )

    def _state(self, request: Any) -> PageState:
        return self._pages.of(request.session_hash, request.username)

    def _answer(
        self, state: PageState, model: str, values: tuple[Any, ...], change: Any, *, is_wanted: Any = lambda: True
    ) -> Iterator[Updates]:
        """Change the conversation, and stream the answer to its last question."""
        session = state.chat
        try:
            session.system, session.tools, sampling = read_settings(values)
            change()
            if not is_wanted():
                yield self._updates(state, note="Changed. The former answer is in the branch before.")
                return
            question = {self.question: ""}
            yield {**self._updates(state, note="…", busy=True), **question}
            step, branch = AnswerStep(None, ""), session.turns
            stop = state.begin_answer()
            steps = stream_answer(self._models, model, session.messages(), sampling, tools=session.tools, stop=stop)
            for step in steps:
                if step.answer is None:
                    yield {self.chatbot: show_turns(session.turns, step)}
        except UserError as error:
            yield {**self._updates(state, str(error), bad=True), **self._withdrawn(state)}
            return
        except Exception as error:
            yield {**self._updates(state, f"The model failed: {first_line(error)}", bad=True), **self._withdrawn(state)}
            return
        if session.turns is not branch:
            # A new chat, or another branch, was begun meanwhile.
            yield self._updates(state, "")
        elif step.content or step.reasoning:
            session.answer(step.answer.text if step.answer else "", opened=step.opened)
            yield self._updates(state, step.note())
        else:
            yield {**self._updates(state, f"The answer is empty. {step.note()}"), **self._withdrawn(state)}

    def _withdrawn(self, state: PageState) -> Updates:
        """Take a question back that got no answer, and put it where it can be sent again."""
        if not state.chat.waits:
            return {}
        question = state.chat.withdraw()
        return {self.question: question, **self._turns(state)}

    def _turns(self, state: PageState) -> Updates:
        import gradio as gr

        names = state.chat.branch_names()
        return {
            self.chatbot: show_turns(state.chat.turns),
            self.branch: gr.update(choices=names, value=names[state.chat.current], visible=len(names) > 1),
        }

    def _updates(self, state: PageState, note: str, *, busy: bool = False, bad: bool = False) -> Updates:
        import gradio as gr

        return {
            **self._turns(state),
            self.status: status_line(note, bad=bad),
            self.send: gr.update(interactive=not busy),
            self.stop: gr.update(interactive=busy),
            self.tokens: gr.update(value="", visible=False),
        }

    def _token_updates(self, state: PageState, model: str) -> Updates:
        import gradio as gr

        session = state.chat
        answers = [number for number, turn in enumerate(session.turns, start=1) if turn.role == "assistant"]
        if not answers:
            return {self.status: status_line("There is no answer yet.", bad=True)}
        try:
            with self._models.using(model) as chat:
                views = view_tokens(chat, session.conversation(answers[-1]))
        except UserError as error:
            return {self.status: status_line(str(error), bad=True)}
        return {self.tokens: gr.update(value=tokens_as_html(views), visible=True), self.status: status_line("")}


def status_line(text: str, *, bad: bool = False) -> str:
    """Return the line below a conversation, which screen readers read out when it changes."""
    css = "pc-status pc-bad" if bad else "pc-status"
    return str(Markup('<p class="{css}" role="{role}">{text}</p>').format(
        css=css, role="alert" if bad else "status", text=text or "\N{NO-BREAK SPACE}"))  # fmt: skip


def _first(index: Any) -> int:
    return int(index[0] if isinstance(index, list | tuple) else index)
