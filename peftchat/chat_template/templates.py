"""Chat templates: a conversation as pieces of text, each with the code that says what it is.

A template states its format twice: `pieces` for encoding, `jinja` for the tokenizer that is saved with the model.
The tests hold the two against each other, byte for byte.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Protocol

from peftchat.chat_template.loss_mask import TurnPart, token_tag
from peftchat.conversation import Conversation, Role
from peftchat.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class TemplateSpan:
    """A stretch of a rendered conversation.

    Attributes:
        text: the characters.
        code: what its tokens are (`peftchat.chat_template.loss_mask.token_tag`).
        special: whether the text is one special token. All other text is ordinary, whatever it looks like.
    """

    text: str
    code: int
    special: bool = False


class Template(Protocol):
    """One chat format.

    Attributes:
        name: the recipe's word for it.
        tokens: the special tokens it writes, in the order in which they are added to a tokenizer.
        end_token: the token that ends a turn; generation stops there.
        jinja: the `chat_template` to save with the tokenizer.
    """

    @property
    def name(self) -> str: ...  # noqa: D102
    @property
    def tokens(self) -> tuple[str, ...]: ...  # noqa: D102
    @property
    def end_token(self) -> str: ...  # noqa: D102
    @property
    def jinja(self) -> str: ...  # noqa: D102

    def pieces(self, conversation: Conversation) -> Iterator[TemplateSpan]:
        """The conversation as pieces; joined, they are what `jinja` renders."""
        ...


Header = tuple[tuple[str, bool], ...]
"""What a format writes before a content: stretches as (text, is special)."""


def last_answer_index(conversation: Conversation) -> int:
    """The position of the last assistant message, -1 where there is none."""
    for index in range(len(conversation.messages) - 1, -1, -1):
        if conversation.messages[index].role == "assistant":
            return index
    return -1


@dataclass(frozen=True, slots=True)
class BlockTemplate:
    """A format in which every turn is `header, content, end token, newline`.

    Attributes:
        system: the system prompt of conversations that have none of their own; None writes no block.
        header: for each role it knows, the stretches before the content as (text, is special).
    """

    name: str
    tokens: tuple[str, ...]
    end_token: str
    header: dict[Role, Header]
    system: str | None = None

    def pieces(self, conversation: Conversation) -> Iterator[TemplateSpan]:
        """The default system block if it applies, then one block a message.

        Raises:
            UserError: a message has a role that the format cannot write.
        """
        for role, content, last_answer in self.turns(conversation):
            before, value, after = _frame(self.header[role], self.end_token, role, last_answer)
            yield from before
            if content:
                yield TemplateSpan(content, value)
            yield from after

    def turns(self, conversation: Conversation) -> Iterator[tuple[Role, str, bool]]:
        """The turns that are written, as (role, content, whether it is the last answer).

        Raises:
            UserError: a message has a role that the format cannot write.
        """
        messages = conversation.messages
        if self.system is not None and not (messages and messages[0].role == "system"):
            yield "system", self.system, False
        last = last_answer_index(conversation)
        for index, message in enumerate(messages):
            if message.role not in self.header:
                raise UserError(
                    f"message {index + 1} has the role `{message.role}`, which the template `{self.name}` cannot write",
                    where=conversation.source or None,
                    hint="Use `chat.template: chatml` or `model`, or take these messages out.",
                )
            yield message.role, message.content, index == last

    @property
    def jinja(self) -> str:
        """The same format for `apply_chat_template`, with generation marks around each answer and its end."""
        role = "message['role']"
        start = _literal(self._header_text("assistant"))
        default = ""
        if self.system is not None:
            block = f"{self._header_text('system')}{self.system}{self.end_token}\n"
            own = "messages and messages[0]['role'] == 'system'"
            default = f"{{% if not ({own}) %}}{{{{ {_literal(block)} }}}}{{% endif %}}"
        answer = (
            f"{{{{ {start} }}}}{{% generation %}}{{{{ message['content'] + {_literal(self.end_token)} }}}}"
            "{% endgeneration %}{{ '\\n' }}"
        )
        others = "".join(
            f"{{% elif {role} == '{other}' %}}"
            f"{{{{ {_literal(self._header_text(other))} + message['content']"
            f" + {_literal(self.end_token)} + '\\n' }}}}"
            for other in self.header
            if other != "assistant"
        )
        refusal = f"{{{{ raise_exception('the template {self.name} cannot write the role ' + {role}) }}}}"
        return (
            f"{default}{{% for message in messages %}}"
            f"{{% if {role} == 'assistant' %}}{answer}{others}{{% else %}}{refusal}{{% endif %}}"
            f"{{% endfor %}}{{% if add_generation_prompt %}}{{{{ {start} }}}}{{% endif %}}"
        )

    def _header_text(self, role: Role) -> str:
        return "".join(text for text, _ in self.header[role])


_Frame = tuple[tuple[TemplateSpan, ...], int, tuple[TemplateSpan, ...]]


@cache
def _frame(header: Header, end_token: str, role: Role, last_answer: bool) -> _Frame:
    """The pieces before a content, the content's code, and the pieces after it."""
    codes = {part: token_tag(part, role, last_answer=last_answer) for part in TurnPart}
    before = tuple(TemplateSpan(text, codes[TurnPart.HEADER], special) for text, special in header)
    after = (TemplateSpan(end_token, codes[TurnPart.END], special=True), TemplateSpan("\n", codes[TurnPart.TRAILER]))
    return before, codes[TurnPart.CONTENT], after


def _literal(text: str) -> str:
    """The text as a Jinja string literal: JSON's escapes are a subset of the ones Jinja reads."""
    return json.dumps(text, ensure_ascii=False)


def starchat(system: str | None) -> BlockTemplate:
    """StarChat's format: a special token for each role, `<|end|>` after every turn."""
    return BlockTemplate(
        name="starchat",
        # The order fixes the ids: on StarCoderBase these are 49152 to 49155.
        tokens=("<|system|>", "<|assistant|>", "<|user|>", "<|end|>"),
        end_token="<|end|>",
        header={
            "system": (("<|system|>", True), ("\n", False)),
            "user": (("<|user|>", True), ("\n", False)),
            "assistant": (("<|assistant|>", True), ("\n", False)),
        },
        system=system,
    )


def chatml(system: str | None) -> BlockTemplate:
    """ChatML: `<|im_start|>`, the role as a word, and `<|im_end|>` after every turn."""
    roles: tuple[Role, ...] = ("system", "user", "assistant", "tool")
    return BlockTemplate(
        name="chatml",
        tokens=("<|im_start|>", "<|im_end|>"),
        end_token="<|im_end|>",
        header={role: (("<|im_start|>", True), (f"{role}\n", False)) for role in roles},
        system=system,
    )


@dataclass(frozen=True, slots=True)
class NewToken:
    """A token that the template brought and the tokenizer did not have."""

    token: str
    id: int


def special_tokens(tokenizer: "PreTrainedTokenizerBase") -> dict[str, int]:
    """Every special token of the tokenizer with its id: the named ones and all that were added as special."""
    found = {
        str(token.content): int(token_id) for token_id, token in tokenizer.added_tokens_decoder.items() if token.special
    }
    for token in tokenizer.all_special_tokens:
        found.setdefault(str(token), int(tokenizer.convert_tokens_to_ids(str(token))))
    return found


def add_template_tokens(tokenizer: "PreTrainedTokenizerBase", template: Template) -> list[NewToken]:
    """Add the template's missing tokens, in its order, and make its end token the tokenizer's end of text.

    A token that is already there keeps its id; one that is there as ordinary text becomes special. The padding
    token stays apart from the end token wherever the tokenizer has another candidate.

    Returns:
        The tokens that were not in the vocabulary before.

    Raises:
        UserError: the tokenizer does not turn one of the tokens into exactly one id.
    """
    from transformers import AddedToken

    before = set(tokenizer.get_vocab())
    marked = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    # A token that is special by name only (an end token, say) must stay special when the name moves on.
    wanted = [str(token) for token in (*tokenizer.all_special_tokens, *template.tokens)]
    missing = [AddedToken(token, special=True, normalized=False) for token in wanted if token not in marked]
    tokenizer.add_tokens(missing, special_tokens=True)
    known = special_tokens(tokenizer)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token or template.end_token
    tokenizer.eos_token = template.end_token
    tokenizer.chat_template = template.jinja
    for token in template.tokens:
        ids = tokenizer.encode(token, add_special_tokens=False)
        if ids != [known.get(token)]:
            raise UserError(
                f"the tokenizer turns the special token {token} into {ids} instead of one id",
                where="chat.template",
                hint="Choose another template, or a tokenizer that can take added tokens.",
            )
    return [NewToken(token, known[token]) for token in template.tokens if token not in before]
