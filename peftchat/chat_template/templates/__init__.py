"""Chat templates: how each writes a conversation, and the registry of those that a recipe can name.

A new template is one TOML file in this folder, with the fields of `ChatTemplate`, and its name in the registry below.
Everything that depends on a template derives from that entry: the values of `chat.template`, the tokens that are added,
the token that ends an answer, the saved Jinja source and the lists that users see. Importing this loads no library.

A template writes a conversation in two ways: as spans for encoding (`ChatTemplate.spans`), and as the Jinja source that
is saved with the tokenizer (`ChatTemplate.jinja`). The tests compare the two byte for byte.
"""

import json
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from peftchat.chat_template.loss_mask import TurnPart, token_tag
from peftchat.chat_template.message_text import (
    ANSWER_JINJA,
    TOOLS_JINJA,
    TextParts,
    message_parts,
    message_text,
    tools_text,
    with_tools,
)
from peftchat.conversation import Conversation, Role
from peftchat.errors import UserError

_GAP = "\n\n"
"""What stands between a system message and the definitions of the tools."""

HeaderSpans = tuple[tuple[str, bool], ...]
"""The text in front of a content as spans of (text, whether it is one special token)."""


@dataclass(frozen=True, slots=True)
class TemplateSpan:
    """A span of a rendered conversation whose tokens all have one tag.

    Attributes:
        text: the characters.
        tag: the tag of its tokens (`peftchat.chat_template.loss_mask.token_tag`).
        special: whether the text is one special token. All other text is ordinary, even if it is spelled like one.
        opens: whether no token may span its start: the model sees the tokens before it, and writes those behind it.
    """

    text: str
    tag: int
    special: bool = False
    opens: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatTemplate:
    r"""A chat template in which every turn is `header, content, end token, trailer`.

    Attributes:
        name: the value of `chat.template` in a recipe.
        summary: one line for lists of templates.
        special_tokens: every special token that it writes, in the order in which they are added to a tokenizer, each
            with a few words that describe it (`chat.new_token_init: description`).
        end_token: the special token that ends a turn. Generation stops there.
        headers: for each role that it can write, the text in front of the content.
        trailer: the text behind the end token of each turn.
        bos_token: a special token in front of the first turn. A tokenizer that lacks it does not get it: it marks the
            start of text for models that were pretrained with it, and means nothing to others.
        system: the system message of conversations that have none. None writes no system turn.
    """

    name: str
    summary: str
    special_tokens: Mapping[str, str]
    end_token: str
    headers: Mapping[Role, str]
    trailer: str = "\n"
    bos_token: str | None = None
    system: str | None = None

    def examples(self, conversation: Conversation) -> list[Iterator[TemplateSpan]]:
        """Return the spans of the conversation's examples; it is always one.

        Raises:
            UserError: a message has a role that the template cannot write.
        """
        return [self.spans(conversation)]

    def examples_of(self, conversations: Sequence[Conversation]) -> list[list[Iterator[TemplateSpan]]]:
        """Return the examples of each conversation.

        Raises:
            UserError: a message has a role that the template cannot write.
        """
        return [self.examples(conversation) for conversation in conversations]

    def spans(self, conversation: Conversation) -> Iterator[TemplateSpan]:
        """Yield the conversation as spans. Joined, they are the text that `jinja` renders.

        Raises:
            UserError: a message has a role that the template cannot write.
        """
        if self.bos_token is not None:
            yield TemplateSpan(self.bos_token, token_tag(TurnPart.OUTSIDE), special=True)
        for role, content, last_answer, context, parts in self.turns(conversation):
            tags = {part: token_tag(part, role, last_answer=last_answer, context=context) for part in TurnPart}
            for text, special in self.header_spans(role):
                yield TemplateSpan(text, tags[TurnPart.HEADER], special)
            opens = role == "assistant"
            for text, part in parts or ((content, TurnPart.CONTENT),):
                if text:
                    yield TemplateSpan(text, tags[part], opens=opens)
                    opens = False
            yield TemplateSpan(self.end_token, tags[TurnPart.END], special=True, opens=opens)
            if self.trailer:
                yield TemplateSpan(self.trailer, tags[TurnPart.TRAILER])

    def turns(self, conversation: Conversation) -> Iterator[tuple[Role, str, bool, bool, TextParts]]:
        """Yield the turns to write: role, text, whether it is the last answer, whether it must not be trained, parts.

        The text of a turn has its reasoning and tool calls, that of the system message the definitions of the tools.
        The parts are those of an answer that has more than one; otherwise none, and all of the text is content.

        Raises:
            UserError: a message has a role that the template cannot write.
        """
        messages = conversation.messages
        tools = "" if conversation.tools is None else tools_text(conversation)
        if not (messages and messages[0].role == "system") and (self.system is not None or tools):
            yield "system", with_tools(self.system or "", tools), False, False, ()
            tools = ""
        last = last_answer_index(conversation)
        for index, message in enumerate(messages):
            if message.role not in self.headers:
                raise UserError(
                    f"message {index + 1} has the role `{message.role}`, which the template `{self.name}` cannot write",
                    where=conversation.source or None,
                    hint="Use `chat.template: chatml`, or set `chat.unsupported_roles: merge_into_user` or `drop`.",
                )
            text = message_text(message)
            if tools and not index:
                text = with_tools(text, tools)
            parts = message_parts(message) if message.role == "assistant" else ()
            if len(parts) == 1 and parts[0][1] == TurnPart.CONTENT:
                parts = ()
            yield message.role, text, index == last, message.train is False, parts

    @property
    def written_date(self) -> None:
        """The date that the template writes: none."""
        return None

    @property
    def reads_documents(self) -> bool:
        """Whether the template reads the `documents` of a record: ours do not."""
        return False

    @property
    def missing_roles(self) -> frozenset[Role]:
        """The roles that it cannot write and that the recipe says what to do with: none, such are refused."""
        return frozenset()

    @property
    def end_tokens(self) -> tuple[str, ...]:
        """Every token that ends an answer."""
        return (self.end_token,)

    def header_spans(self, role: Role) -> HeaderSpans:
        """Return the header of a role as spans of (text, whether it is one special token)."""
        return _split_special(self.headers[role], tuple(self.special_tokens))

    @property
    def jinja(self) -> str:
        """The template for `apply_chat_template`, with generation marks around each answer and its end token."""
        role = "message['role']"
        opening = _literal(self.headers["assistant"])
        start = "" if self.bos_token is None else f"{{{{ {_literal(self.bos_token)} }}}}"
        end = f"{self.end_token}{self.trailer}"
        has_system = "messages and messages[0]['role'] == 'system'"
        default = (
            f"{{% if not ({has_system}) and ({'listed.text' if self.system is None else 'true'}) %}}"
            f"{{{{ {_literal(self.headers['system'] + (self.system or ''))} + "
            f"({_literal(_GAP if self.system else '')} + listed.text if listed.text else '') + {_literal(end)} }}}}"
            f"{{% endif %}}"
        )
        answer = (
            f"{{{{ {opening} }}}}{{% generation %}}{ANSWER_JINJA}{{{{ {_literal(self.end_token)} }}}}"
            f"{{% endgeneration %}}{{{{ {self.trailer!r} }}}}"
        )
        system = (
            f"{{% elif {role} == 'system' and loop.first and listed.text %}}{{{{ {_literal(self.headers['system'])} + "
            f"(message['content'] + {_literal(_GAP)} if message['content'] else '') + "
            f"listed.text + {_literal(end)} }}}}"
        )
        others = "".join(
            f"{{% elif {role} == '{other}' %}}{{{{ {_literal(header)} + message['content'] + {_literal(end)} }}}}"
            for other, header in self.headers.items()
            if other != "assistant"
        )
        error = f"{{{{ raise_exception('the template {self.name} cannot write the role ' + {role}) }}}}"
        return (
            f"{TOOLS_JINJA}{start}{default}{{% for message in messages %}}"
            f"{{% if {role} == 'assistant' %}}{answer}{system}{others}{{% else %}}{error}{{% endif %}}"
            f"{{% endfor %}}{{% if add_generation_prompt %}}{{{{ {opening} }}}}{{% endif %}}"
        )


def last_answer_index(conversation: Conversation) -> int:
    """Return the index of the last assistant message, -1 if there is none."""
    for index in range(len(conversation.messages) - 1, -1, -1):
        if conversation.messages[index].role == "assistant":
            return index
    return -1


@cache
def _split_special(text: str, special_tokens: tuple[str, ...]) -> HeaderSpans:
    """Split a text into special tokens and the ordinary text between them."""
    by_length = sorted(special_tokens, key=len, reverse=True)
    parts = re.split(f"({'|'.join(map(re.escape, by_length))})", text)
    return tuple((part, number % 2 == 1) for number, part in enumerate(parts) if part)


def _literal(text: str) -> str:
    """Return the text as a Jinja string literal. JSON's escapes are a subset of those that Jinja reads."""
    return json.dumps(text, ensure_ascii=False)


def _read(name: str) -> ChatTemplate:
    text = Path(__file__).with_name(f"{name}.toml").read_text(encoding="utf-8")
    return ChatTemplate(name=name, **tomllib.loads(text))


CHAT_TEMPLATES: dict[str, ChatTemplate] = {
    name: _read(name)
    for name in (
        "starchat",
        "chatml",
        "llama3",
    )
}
"""The templates that a recipe can name, by name."""

TOKENIZER_TEMPLATE = "model"
"""The value of `chat.template` that keeps the tokenizer's own template."""

TEMPLATE_SUFFIX = ".jinja"
"""The ending of a file that holds a chat template."""


def is_template_name(name: str) -> bool:
    """Return whether `chat.template` accepts a name: that of a template, or a path of a Jinja file."""
    return name in CHAT_TEMPLATES or name == TOKENIZER_TEMPLATE or name.endswith(TEMPLATE_SUFFIX)


def template_summaries() -> dict[str, str]:
    """Return every value of `chat.template` with one line that describes it."""
    own = "The tokenizer's own template, with an exact loss mask. Adds no tokens."
    file = "A Jinja template of your own, used like `model`."
    built_in = {name: template.summary for name, template in CHAT_TEMPLATES.items()}
    return {**built_in, TOKENIZER_TEMPLATE: own, f"path/to/template{TEMPLATE_SUFFIX}": file}


def added_token_count(name: str) -> int:
    """Return how many tokens a template adds to a tokenizer that has none of them.

    Args:
        name: a value of `chat.template`.
    """
    return len(CHAT_TEMPLATES[name].special_tokens) if name in CHAT_TEMPLATES else 0
