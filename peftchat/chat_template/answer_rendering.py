"""Rendering answer by answer: the prompt that a model gets before each answer, and the text it must then write.

The prompt of an answer is what the tokenizer's template makes of the messages before it, with the generation prompt.
The answer's text is what the template writes behind that prompt once the answer is there, through the token that ends
the turn. Nothing is searched for, and a template may rewrite earlier turns: the next answer then has another prompt.
"""

import contextlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from peftchat.chat_template.template_renderer import TemplateMessage, TemplateRenderer, Tools, probe_turn
from peftchat.errors import UserError

# Reasoning that a generation prompt opens and closes, so that the answer follows at once.
_CLOSED_REASONING = re.compile(
    r"\s*(?:<(?P<tag>[\w:]*think\w*)>\s*</(?P=tag)>"
    r"|<\|START_THINKING\|>\s*<\|END_THINKING\|>"
    r"|\[THINK\]\s*\[/THINK\]"
    r"|<\|channel>thought\s*<channel\|>)\s*"
)
_REASONING_BLOCK = re.compile(r"\s*<(?P<tag>[\w:]*think\w*)>(?P<text>.*?)</(?P=tag)>", re.DOTALL)
_OPENED = re.compile(r"(?:<[\w:]*think\w*>|\[THINK\]|<\|START_THINKING\|>)\s*\Z")
_OPEN_TAG = re.compile(r"\s*<(?P<tag>[\w:]*think\w*)>\s*")

_WITHOUT_REASONING: tuple[dict[str, Any], ...] = ({"enable_thinking": False}, {"thinking": False}, {"reasoning": False})
"""Variables by which templates turn reasoning off."""

_KEEPS_REASONING: tuple[dict[str, Any], ...] = (
    {"clear_thinking": False},
    {"preserve_thinking": True},
    {"truncate_history_thinking": False},
    {"keep_past_reasoning": True},
    {"keep_thinking": True},
)
"""Variables by which templates keep the reasoning of earlier answers."""

MARK = "peftchat answer"
_SHOWN = 60
"""Characters of a rendering in an error message."""

_OPEN_REASONING = re.compile(r"<[\w:]*think\w*>|START_THINKING|\[THINK\]|<\|channel>thought|reasoning", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class RenderedAnswer:
    """An answer and its prompt, as text.

    Attributes:
        index: which message it is.
        prompt: the messages before it, with the generation prompt.
        opening: the number of characters at the end of `prompt` that are the generation prompt.
        text: what the model must write, through the token that ends the turn.
        trailer: what the template writes behind that token at the end of a conversation.
    """

    index: int
    prompt: str
    opening: int
    text: str
    trailer: str


class AnswerRenderer:
    """Renders the answers of one conversation, each behind its prompt.

    Args:
        renderer: renders messages.
        messages: the conversation, protected by the renderer.
        tools: its tools, protected too.
        end_token: ends an answer where the template writes no token behind it; None refuses such templates.
    """

    def __init__(
        self,
        renderer: TemplateRenderer,
        messages: Sequence[TemplateMessage],
        tools: Tools = None,
        end_token: str | None = None,
    ) -> None:
        self._renderer = renderer
        self._messages = messages
        self._tools = tools
        self._end_token = end_token
        self._rendered: dict[tuple[int, bool], str | UserError] = {}

    def _render(self, count: int, *, generation_prompt: bool) -> str:
        """Return the rendering of the first messages, each of which is made once.

        Raises:
            UserError: the template refuses them.
        """
        key = (count, generation_prompt)
        if key not in self._rendered and generation_prompt:
            both = self._renderer.render_both(self._messages[:count], self._tools)
            if both is not None:
                self._rendered[count, True], self._rendered[count, False] = both
        if key not in self._rendered:
            try:
                self._rendered[key] = self._renderer.render(
                    self._messages[:count], self._tools, generation_prompt=generation_prompt
                )
            except UserError as error:
                self._rendered[key] = error
        found = self._rendered[key]
        if isinstance(found, UserError):
            raise found
        return found

    def _closed(self, count: int) -> str:
        """Return the rendering of the first messages without a generation prompt, which comes with the one that has it.

        Raises:
            UserError: the template refuses them.
        """
        if count < len(self._messages) and self._messages[count]["role"] == "assistant":
            # Its prompt is asked for next. What refuses the prompt need not refuse this.
            with contextlib.suppress(UserError):
                self._render(count, generation_prompt=True)
        return self._render(count, generation_prompt=False)

    def agrees(self, index: int) -> bool:
        """Return whether the rendering that ends with an answer begins with the answer's prompt."""
        try:
            prompt, opening = self.prompt(index)
            full = self._render(index + 1, generation_prompt=False)
        except UserError:
            return False
        return self._find_behind(prompt, opening, full, index) is not None

    def prompt(self, index: int) -> tuple[str, int]:
        """Return the prompt of an answer, and the length of the generation prompt at its end.

        Raises:
            UserError: the template refuses the messages before the answer.
        """
        prompt = self._render(index, generation_prompt=True)
        try:
            closed = self._render(index, generation_prompt=False)
        except UserError:
            return prompt, 0
        shared = shared_length(prompt, closed)
        for match in self._renderer.special.finditer(prompt):
            if match.start() < shared < match.end():
                shared = match.start()
        return prompt, len(prompt) - shared

    def answer(self, index: int) -> RenderedAnswer:
        """Return one answer.

        Raises:
            UserError: the template refuses the conversation, or the answer does not follow from its prompt.
        """
        prompt, opening = self.prompt(index)
        full = self._render(index + 1, generation_prompt=False)
        behind = self._find_behind(prompt, opening, full, index)
        if behind is None:
            raise self._not_a_beginning(prompt, opening, full, index)
        text, trailer = self._split_end(full.removesuffix(behind), behind, index)
        return RenderedAnswer(index, prompt, opening, text, trailer)

    def check_reasoning_kept(self, answer: RenderedAnswer) -> None:
        """Check that the prompt of an answer has the reasoning of all answers before it.

        Raises:
            UserError: names the first message whose reasoning is not there, and the setting that keeps it, if any.
        """
        for index, message in enumerate(self._messages[: answer.index]):
            reasoning = reasoning_of(message)
            if reasoning and not _holds(answer.prompt, reasoning):
                raise UserError(
                    f"the chat template leaves the reasoning of message {index + 1} out of the prompt of message "
                    f"{answer.index + 1}, and chat.reasoning_history is `keep`",
                    hint=self._keeping(answer.index, reasoning),
                )

    def _keeping(self, index: int, reasoning: str) -> str:
        for variables in _KEEPS_REASONING:
            other = self._renderer.with_variables(variables)
            try:
                prompt = other.render(self._messages[:index], self._tools, generation_prompt=True)
            except UserError:
                continue
            if _holds(prompt, reasoning):
                ((name, value),) = variables.items()
                return f"Set `chat.template_kwargs: {{{name}: {str(value).lower()}}}`, which keeps it."
        return "Set `chat.reasoning_history: template`, or choose a template that keeps it, such as `chatml`."

    def _find_behind(self, prompt: str, opening: int, full: str, index: int) -> str | None:
        """Return the text that the template writes behind the prompt; None if the two differ."""
        if full.startswith(prompt):
            return full[len(prompt) :]
        shared = shared_length(prompt, full)
        if not prompt[shared:].strip() and _OPENED.search(prompt, 0, shared):
            # The prompt opens a reasoning and breaks the line, where the conversation goes on at once.
            return full[shared:]
        for start in range(shared, len(prompt) - opening - 1, -1):
            behind = _behind_reasoning(prompt[start:], full[start:])
            if behind is not None:
                return behind
        # The template writes something else for the messages before, and the same for the answer.
        simple = self._simple_answer(index)
        return simple if simple and full.endswith(simple) else None

    def _simple_answer(self, index: int) -> str | None:
        """Return what the template writes for the answer behind one short question; None if that has no prompt."""
        messages = [probe_turn("user"), self._messages[index]]
        try:
            prompt = self._renderer.render(messages[:1], self._tools, generation_prompt=True)
            full = self._renderer.render(messages, self._tools, generation_prompt=False)
        except UserError:
            return None
        return full[len(prompt) :] if full.startswith(prompt) else None

    def _split_end(self, before: str, behind: str, index: int) -> tuple[str, str]:
        """Split a rendering behind the prompt at the end of the turn; `before` is what precedes.

        Special tokens behind the last visible text end the turn as far as the template writes them in front of a next
        turn too. If there is none, the template's own next token ends it, such as the role token of that turn.

        Raises:
            UserError: no token ends the answer.
        """
        special = self._renderer.special
        trailing = re.search(rf"(?:{special.pattern}|\s)*\Z", behind)
        assert trailing is not None
        start = trailing.start()
        following = self._continued(before, index)
        if following is not None and not following.startswith(behind[:start]):
            following = None
        ends = [match.end() for match in special.finditer(behind, start)]
        if ends:
            if following is None:
                # The template rewrites this answer; a plain one may tell what stands before a next turn.
                following = behind[:start] + self._behind_plain_answer()
            shared = shared_length(behind, following)
            continued = [end for end in ends if end <= shared]
            end = continued[-1] if continued else _end_of_run(special, behind, start)
            return behind[:end], behind[end:]
        if following is not None:
            match = re.compile(rf"\s*{special.pattern}").match(following, start)
            if match is not None:
                return following[: match.end()], ""
        usual = self._usual_end()
        if usual is not None:
            return behind[:start] + usual, ""
        if self._end_token is not None:
            return behind[:start] + self._end_token, ""
        raise UserError(
            "the chat template writes no special token behind an answer, so nothing would end it",
            where="chat.template: model",
            hint="Set `chat.end_token` to the token that ends an answer, or choose another template.",
        )

    def _continued(self, before: str, index: int) -> str | None:
        """Return what stands behind `before` if another turn follows; None if the template rewrites that text."""
        followed = index + 1 < len(self._messages) and self._messages[index + 1]["role"] != "assistant"
        messages = list(self._messages[: index + 1])
        if not followed:
            calls = messages[index].get("tool_calls")
            probe = probe_turn("tool", calls[0]) if calls else probe_turn("user")
            messages.append(probe)
        try:
            full = (
                self._closed(index + 2)
                if followed
                else self._renderer.render(messages, self._tools, generation_prompt=False)
            )
        except UserError:
            return None
        return full[len(before) :] if full.startswith(before) else None

    def _usual_end(self) -> str | None:
        """Return the white space and the token behind a plain answer that another turn follows."""
        match = re.compile(rf"\s*{self._renderer.special.pattern}").match(self._behind_plain_answer())
        return None if match is None else match.group()

    def _behind_plain_answer(self) -> str:
        """Return what stands behind a plain answer before another turn; "" if the template refuses these turns."""
        return self._renderer.remember("behind a plain answer", self._render_plain_answer)

    def _render_plain_answer(self) -> str:
        messages = [probe_turn("user"), {"role": "assistant", "content": MARK}, probe_turn("user")]
        try:
            return self._renderer.render(messages, None, generation_prompt=False).partition(MARK)[2]
        except UserError:
            return ""

    def _not_a_beginning(self, prompt: str, opening: int, full: str, index: int) -> UserError:
        """Return the error for an answer that does not stand behind its prompt, with the setting that mends it."""
        shared = shared_length(prompt, full)
        # From the last special token on, so that no token is shown in part.
        cut = max((match.start() for match in self._renderer.special.finditer(prompt[:shared])), default=0)
        cut = max(cut, shared - _SHOWN)
        restore = self._renderer.restore
        message = (
            "the chat template writes the conversation otherwise than the prompt of the answer in message "
            f"{index + 1}: the prompt has {restore(prompt[cut:])[:_SHOWN]!r}, "
            f"the conversation {restore(full[cut:])[:_SHOWN]!r}"
        )
        for variables in _WITHOUT_REASONING:
            other = AnswerRenderer(self._renderer.with_variables(variables), self._messages, self._tools)
            if other.agrees(index):
                (name,) = variables
                return UserError(
                    message, hint=f"Set `chat.template_kwargs: {{{name}: false}}`, which makes them agree."
                )
        if _OPEN_REASONING.search(prompt[len(prompt) - opening :]):
            hint = (
                "The prompt opens a reasoning: add it to the data as `reasoning_content`, or choose another template."
            )
            return UserError(message, hint=hint)
        return UserError(message, hint="Choose another `chat.template`, or remove such conversations.")


def _behind_reasoning(opened: str, written: str) -> str | None:
    """Return what follows an empty reasoning of the prompt that the conversation lacks; None if it is not one.

    Args:
        opened: the end of the prompt.
        written: the conversation from the same place on.
    """
    open_tag = _OPEN_TAG.fullmatch(opened)
    if open_tag and written.startswith(f"</{open_tag['tag']}>"):
        return written
    closed = _CLOSED_REASONING.fullmatch(opened)
    if closed is None:
        return None
    # Some templates leave out only the start of an empty reasoning.
    behind = written.removeprefix(f"</{closed['tag']}>")
    # A reasoning of its own would be a second one.
    return None if behind.lstrip().startswith(f"<{closed['tag']}>") else behind


def reasoning_of(message: TemplateMessage) -> str:
    """Return the reasoning of a message: that of its own field, or the one in front of its content."""
    if message["role"] != "assistant":
        return ""
    own = str(message.get("reasoning_content") or "").strip()
    block = _REASONING_BLOCK.match(str(message.get("content") or ""))
    return own or (block["text"].strip() if block else "")


def _holds(text: str, value: str) -> bool:
    """Return whether a text has a value, white space aside."""
    return "".join(value.split()) in "".join(text.split())


def shared_length(one: str, other: str) -> int:
    """Return how many characters two texts have in common at the start."""
    low, high = 0, min(len(one), len(other))
    if one[:high] == other[:high]:
        return high
    while high - low > 1:
        middle = (low + high) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle
    return low


def _end_of_run(special: re.Pattern[str], text: str, start: int) -> int:
    """Return where the first special tokens behind `start` end, which follow each other without a gap."""
    match = re.compile(rf"\s*{special.pattern}+").match(text, start)
    assert match is not None
    return match.end()
