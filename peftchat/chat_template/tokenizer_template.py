"""`chat.template: model`: the tokenizer's own template, whatever it does to a conversation.

Every trained answer stands behind the prompt that the model gets for it, token for token. A template that rewrites
earlier turns, such as one that takes reasoning out of them, makes an example for each answer that it affects.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import date
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from peftchat.chat_template.answer_rendering import AnswerRenderer, RenderedAnswer
from peftchat.chat_template.answer_spans import ExampleBuilder
from peftchat.chat_template.content_conditions import check_syntax, content_conditions, source_of, variables_of
from peftchat.chat_template.template_probes import (
    find_end_tokens,
    has_place_for_reasoning,
    missing_roles,
    turn_headers,
    wants_reasoning_parts,
    wants_text_arguments,
    with_text_arguments,
)
from peftchat.chat_template.template_renderer import TemplateRenderer, Tools
from peftchat.chat_template.template_settings import TemplateSettings, check_variables, with_date, with_settings
from peftchat.chat_template.template_shapes import (
    FilledText,
    Marks,
    NoShapeError,
    Shape,
    ShapeCache,
    shape_key,
    texts_of,
)
from peftchat.chat_template.templates import CHAT_TEMPLATES, TOKENIZER_TEMPLATE, TemplateSpan, last_answer_index
from peftchat.chat_template.text_encoder import TextEncoder
from peftchat.chat_template.written_check import WrittenCheck
from peftchat.conversation import Conversation, Role
from peftchat.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_OTHERS = f"Set `chat.template` to {' or '.join(f'`{name}`' for name in CHAT_TEMPLATES)}."

_KNOWN_TOOLS = 256
"""The most lists of tools that are kept."""

_BOUNDARY_CHARACTERS = 48
"""Characters on each side of a border in which tokens could merge across it."""


class TokenizerTemplate:
    """The template that a tokenizer brings.

    Args:
        tokenizer: with a `chat_template`.
        system: the system message of conversations that have none. None leaves that to the template.
        settings: what the recipe says about the template. They are written into `jinja`.
        name: the value of `chat.template`.
        today: the date for templates that write one; None for the clock's.
        text: the tokenizer's encoder of text; None to make one, which copies the tokenizer.

    Attributes:
        missing_roles: the roles that the template cannot write, where the settings say what to do with them.
        end_token: the token that ends an answer without calls.
        end_tokens: every token that ends an answer; generation stops at each of them.
        written_date: the date that the template writes; None for templates that write none.
        reads_documents: whether the template reads the `documents` of a record.

    Raises:
        UserError: the tokenizer has no template, or nothing in the template ends an answer.
    """

    special_tokens: Mapping[str, str] = MappingProxyType({})

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        system: str | None = None,
        *,
        settings: TemplateSettings | None = None,
        name: str = TOKENIZER_TEMPLATE,
        today: date | None = None,
        text: TextEncoder | None = None,
    ) -> None:
        if not tokenizer.chat_template:
            raise UserError("the model's tokenizer has no chat template", where="chat.template: model", hint=_OTHERS)
        self.name = name
        self._settings = settings = settings or TemplateSettings()
        self._end_token = end_token = settings.end_token
        self._text = text or TextEncoder(tokenizer)
        if end_token is not None and end_token not in self._text.special:
            raise UserError(
                f"{end_token!r} is not a special token of the tokenizer",
                where="chat.end_token",
                hint="Name a special token, such as the tokenizer's `eos_token`.",
            )
        today = today or date.today()
        special, variables = list(self._text.special), settings.variables
        self.missing_roles: frozenset[Role] = frozenset()
        own = TemplateRenderer(tokenizer, with_date(tokenizer.chat_template, today), special, variables)
        if settings.unsupported_roles != "error":
            self.missing_roles = missing_roles(own)
        if settings.reasoning_format == "inline" and has_place_for_reasoning(own):
            raise UserError(
                "the chat template has a place for reasoning, so it must not stand in the content",
                where="chat.reasoning_format: inline",
                hint="Remove the key: the template writes `reasoning_content` where the model expects it.",
            )
        dropped = settings.unsupported_roles == "drop" and "system" in self.missing_roles
        self._system = None if dropped else system
        self.jinja = with_settings(tokenizer.chat_template, settings, self._system, self.missing_roles)
        check_syntax(source_of(self.jinja))
        check_variables(variables, _all_variables(tokenizer.chat_template))
        written = with_date(self.jinja, today)
        self.reads_documents = "documents" in variables_of(source_of(tokenizer.chat_template))
        self.written_date = None if written == self.jinja else today.isoformat()
        self._renderer = TemplateRenderer(tokenizer, written, special, variables)
        self._arguments_as_text = wants_text_arguments(self._renderer)
        self._renderer.reasoning_in_parts = wants_reasoning_parts(self._renderer)
        self.end_tokens = find_end_tokens(self._renderer, tokenizer, end_token)
        self._headers = turn_headers(self._renderer, self.end_tokens)
        # Settings that change messages look into their contents.
        changes = bool(self.missing_roles) or settings.reasoning_history != "template"
        self._conditions = None if changes else content_conditions(source_of(written))
        self._shapes = ShapeCache()
        self._marks = Marks()
        self._known_tools: dict[str, Tools] = {}
        self.end_token = self.end_tokens[0]

    def examples(self, conversation: Conversation) -> list[list[TemplateSpan]]:
        """Return the conversation's examples, each as spans: as many as the template's rewriting needs.

        Raises:
            UserError: the template refuses the conversation, loses a part of it, or writes an answer that does not
                follow from its prompt.
        """
        return self._examples([conversation])[0]

    def _hint(self, error: UserError, conversation: Conversation) -> str:
        """Return what mends an error, with the setting for messages that the template cannot write."""
        hint = error.hint or _OTHERS
        if self._settings.unsupported_roles != "error" or "needs the variable" in error.message:
            return hint
        missing = missing_roles(self._renderer) & {message.role for message in conversation.messages}
        if not missing:
            return hint
        roles = " and ".join(f"`{role}`" for role in sorted(missing))
        return f"The template cannot write {roles}: set `chat.unsupported_roles: merge_into_user` or `drop`. {hint}"

    def _adapted(self, conversation: Conversation) -> Conversation:
        """Return the conversation without the messages that `chat.unsupported_roles: drop` leaves out."""
        if self._settings.unsupported_roles != "drop" or not self.missing_roles:
            return conversation
        calls = "tool" in self.missing_roles
        kept = tuple(
            message
            for message in conversation.messages
            if message.role not in self.missing_roles and not (calls and message.tool_calls)
        )
        return replace(conversation, messages=kept, tools=None if calls else conversation.tools)

    def prompt(self, conversation: Conversation) -> list[TemplateSpan]:
        """Return the prompt of the next answer as spans.

        Raises:
            UserError: the template refuses the conversation.
        """
        messages, tools, _ = self._inputs(self._adapted(conversation))
        rendered = self._renderer_of(conversation).render(messages, tools, generation_prompt=True)
        builder = ExampleBuilder(self._renderer, messages, frozenset(), -1)
        return list(builder.context_only(rendered))

    def _inputs(self, conversation: Conversation) -> tuple[list[Mapping[str, Any]], Tools, int]:
        """Return messages and tools for the template, protected, and how many messages were put in front."""
        dicts = conversation.as_dicts()
        if self._arguments_as_text:
            dicts = [with_text_arguments(message) for message in dicts]
        added = self._system is not None and not (dicts and dicts[0]["role"] == "system")
        if added:
            dicts.insert(0, {"role": "system", "content": self._system})
        protect = self._renderer.protect
        return [protect(message) for message in dicts], self._tools(conversation), int(added)

    def _tools(self, conversation: Conversation) -> Tools:
        """Return the tools for the template, protected. Their JSON is written once for all conversations with them."""
        text = conversation.tools
        if text is None:
            return None
        found = self._known_tools.get(text)
        if found is None:
            if len(self._known_tools) >= _KNOWN_TOOLS:
                self._known_tools.clear()
            self._known_tools[text] = found = self._renderer.protect(conversation.tool_schemas())
        return found

    def _renderer_of(self, conversation: Conversation) -> TemplateRenderer:
        """Return what renders a conversation: with its documents, if the template reads them."""
        documents = conversation.documents() if self.reads_documents else None
        if documents is None:
            return self._renderer
        return self._renderer.with_variables({"documents": self._renderer.protect(documents)})

    def examples_of(self, conversations: Sequence[Conversation]) -> list[list[list[TemplateSpan]]]:
        """Return the examples of each conversation, which are those of `examples`, at a part of the cost.

        Raises:
            UserError: see `examples`.
        """
        found: dict[int, list[list[TemplateSpan]]] = {}
        if self._conditions is not None:
            shapes: dict[int, Shape] = {}
            for number, conversation in enumerate(conversations):
                key = shape_key(conversation, self._conditions, self._renderer.special)
                if key and not (self.reads_documents and conversation.documents()):
                    shape = self._shapes.get(key, lambda twin=conversation: self._make_shape(twin))
                    if shape is not None:
                        shapes[number] = shape
            found = self._fill(conversations, shapes)
        others = iter(self._examples([one for number, one in enumerate(conversations) if number not in found]))
        return [found[number] if number in found else next(others) for number in range(len(conversations))]

    def _make_shape(self, conversation: Conversation) -> Shape | None:
        """Return the shape of a conversation; None if the template refuses it, or it has no answer to train."""
        marks = self._marks
        twin = marks.conversation(conversation)
        messages, tools, _ = self._inputs(twin)
        try:
            builder, answers = self._answers(twin)
            whole = self._renderer.render(messages, tools, generation_prompt=False)
            if not answers:
                return None
            borders: list[tuple[FilledText, FilledText] | None] = []
            for before, answer in itertools.pairwise(answers):
                follows = answer.prompt.startswith(before.prompt + before.text)
                tail, head = self._border(before)
                borders.append((marks.text(tail), marks.text(head)) if follows else None)
            for answer in answers:
                # Each answer's own text is put together from marks, or there is no shape.
                marks.text(answer.prompt)
                marks.text(answer.text + answer.trailer)
            return Shape(marks.text(whole), answers, borders, builder)
        except (UserError, NoShapeError):
            return None

    def _fill(
        self, conversations: Sequence[Conversation], shapes: Mapping[int, Shape]
    ) -> dict[int, list[list[TemplateSpan]]]:
        """Return the examples of conversations that the template writes as their shapes say."""
        if not shapes:
            return {}
        contents = {number: texts_of(conversations[number]) for number in shapes}
        rendered = self._renderer.render_all([self._inputs(conversations[number])[:2] for number in shapes])
        right = [
            number
            for (number, shape), text in zip(shapes.items(), rendered, strict=True)
            if shape.whole.fill(contents[number]) == text
        ]
        sides = [
            tuple(side.fill(contents[number]) for side in border)
            for number in right
            for border in shapes[number].borders
            if border is not None
        ]
        kept = iter(
            self._keep_borders([(tail[-_BOUNDARY_CHARACTERS:], head[:_BOUNDARY_CHARACTERS]) for tail, head in sides])
        )
        found = {}
        for number in right:
            shape = shapes[number]
            begins = tuple(border is None or not next(kept) for border in shape.borders)
            if begins not in shape.examples:
                shape.examples[begins] = self._shape_examples(shape, begins)
            found[number] = [
                [
                    span
                    if text is None
                    else TemplateSpan(text.fill(contents[number]), span.tag, span.special, span.opens)
                    for span, text in example
                ]
                for example in shape.examples[begins]
            ]
        return found

    def _shape_examples(
        self, shape: Shape, begins: Sequence[bool]
    ) -> list[list[tuple[TemplateSpan, FilledText | None]]]:
        """Return the spans of a shape's examples, with their texts where those hold contents."""
        groups = [[shape.answers[0]]]
        for answer, begin in zip(shape.answers[1:], begins, strict=True):
            if begin:
                groups.append([answer])
            else:
                groups[-1].append(answer)
        found = []
        for number, group in enumerate(groups):
            spans = []
            for span in shape.builder.spans(group, repeated=number > 0):
                text = self._marks.text(span.text)
                spans.append((span, text if text.numbers else None))
            found.append(spans)
        return found

    def _examples(self, conversations: Sequence[Conversation]) -> list[list[list[TemplateSpan]]]:
        """Return the examples of conversations that are rendered answer by answer.

        Raises:
            UserError: see `examples`.
        """
        answered = [self._answered(conversation) for conversation in conversations]
        pairs = [pair for _, _, answers in answered for pair in itertools.pairwise(answers)]
        following = [after.prompt.startswith(before.prompt + before.text) for before, after in pairs]
        borders = [self._border(before) for (before, _), follows in zip(pairs, following, strict=True) if follows]
        # The tokenizer gets the borders of all conversations as one batch.
        kept = iter(
            self._keep_borders([(tail[-_BOUNDARY_CHARACTERS:], head[:_BOUNDARY_CHARACTERS]) for tail, head in borders])
        )
        continues = iter([follows and next(kept) for follows in following])
        examples = []
        for adapted, builder, answers in answered:
            if not answers:
                messages, tools, _ = self._inputs(adapted)
                rendered = self._renderer_of(adapted).render(messages, tools, generation_prompt=False)
                examples.append([list(builder.context_only(rendered))])
                continue
            groups = [[answers[0]]]
            for answer in answers[1:]:
                if next(continues):
                    groups[-1].append(answer)
                else:
                    groups.append([answer])
            examples.append([list(builder.spans(group, repeated=number > 0)) for number, group in enumerate(groups)])
        return examples

    def _answered(self, conversation: Conversation) -> tuple[Conversation, ExampleBuilder, list[RenderedAnswer]]:
        """Return a conversation as it is written, and its trained answers with what builds spans from them.

        Raises:
            UserError: see `examples`.
        """
        try:
            adapted = self._adapted(conversation)
            builder, answers = self._answers(adapted)
            if not answers:
                messages, tools, _ = self._inputs(adapted)
                self._renderer_of(adapted).render(messages, tools, generation_prompt=False)
        except UserError as error:
            where = conversation.source or error.where
            raise UserError(error.message, where=where, hint=self._hint(error, conversation)) from error
        return adapted, builder, answers

    def _answers(self, conversation: Conversation) -> tuple[ExampleBuilder, list[RenderedAnswer]]:
        """Return the trained answers, checked, with what builds spans from them."""
        messages, tools, added = self._inputs(conversation)
        untrained = frozenset(
            index + added for index, message in enumerate(conversation.messages) if message.train is False
        )
        last = last_answer_index(conversation)
        last = last + added if last >= 0 else -1
        builder = ExampleBuilder(self._renderer, messages, untrained, last, self._headers, bool(tools))
        rendering = self._renderer_of(conversation)
        renderer = AnswerRenderer(rendering, messages, tools, self._end_token)
        trained = [
            index
            for index, message in enumerate(messages)
            # Nothing asks for an answer that begins a conversation: it is context.
            if index and message["role"] == "assistant" and index not in untrained
        ]
        check = WrittenCheck(rendering, messages, tools, self._end_token)
        answers: list[RenderedAnswer] = []
        for index in trained:
            answer = renderer.answer(index)
            goes_on = bool(answers) and answer.prompt.startswith(answers[-1].prompt + answers[-1].text)
            check.check(answer, answers[-1].index + 1 if goes_on else 0)
            if self._settings.reasoning_history == "keep":
                renderer.check_reasoning_kept(answer)
            answers.append(answer)
        return builder, answers

    def _border(self, answer: RenderedAnswer) -> tuple[str, str]:
        """Return the text before and behind the border of a prompt and its answer, up to special tokens."""
        special = self._renderer.special
        return special.split(answer.prompt)[-1], special.split(answer.text, maxsplit=1)[0]

    def _keep_borders(self, borders: Sequence[tuple[str, str]]) -> list[bool]:
        """Return for each pair of texts whether they have the same tokens apart and as one text.

        Only text that no special token separates could be encoded otherwise once it is one text.
        """
        restore = self._renderer.restore
        pairs = dict.fromkeys(borders, True)
        asked = [(restore(tail), restore(head)) for tail, head in pairs if tail and head]
        if asked:
            joined = self._text.encode([tail + head for tail, head in asked])
            first = self._text.encode([tail for tail, _ in asked])
            second = self._text.encode_behind([head for _, head in asked])
            keys = [pair for pair in pairs if pair[0] and pair[1]]
            for key, whole, before, behind in zip(keys, joined, first, second, strict=True):
                pairs[key] = whole == before + behind
        return [pairs[pair] for pair in borders]


def _all_variables(jinja: str | Mapping[str, str]) -> frozenset[str]:
    """Return the variables that a template, or one of several, reads."""
    sources = [jinja] if isinstance(jinja, str) else list(jinja.values())
    return frozenset[str]().union(*map(variables_of, sources))
