"""A recipe's settings, written into the Jinja source of a template.

Stock `apply_chat_template` with the tokenizer of a run then writes the prompts that were trained, without any argument:
variables of the template have the recipe's values, conversations without a system message get the recipe's, and
messages are changed as the recipe says before the template sees them.
"""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import date
from difflib import get_close_matches
from typing import Any, Literal

from peftchat.chat_template.message_text import CONTENT_JINJA, REASONING_JINJA, TOOLS_JINJA
from peftchat.conversation import Role
from peftchat.errors import UserError

ReasoningHistory = Literal["template", "keep", "drop"]
"""The values of `chat.reasoning_history`."""

ReasoningFormat = Literal["template", "inline"]
"""The values of `chat.reasoning_format`."""

UnsupportedRoles = Literal["error", "merge_into_user", "drop"]
"""The values of `chat.unsupported_roles`."""


@dataclass(frozen=True, slots=True)
class TemplateSettings:
    """What a recipe says about a template.

    Attributes:
        variables: of the template (`chat.template_kwargs`).
        end_token: ends an answer where the template writes no token behind it.
        reasoning_history: whether earlier reasoning is in a prompt.
        unsupported_roles: what happens to messages that the template cannot write.
        reasoning_format: whether the template writes reasoning, or it stands in the content as `<think>…</think>`.
    """

    variables: Mapping[str, Any] = field(default_factory=dict)
    end_token: str | None = None
    reasoning_history: ReasoningHistory = "template"
    unsupported_roles: UnsupportedRoles = "error"
    reasoning_format: ReasoningFormat = "template"


_GIVEN = frozenset(
    {
        *("conversation", "messages", "tools", "documents", "chat_template", "add_generation_prompt"),
        *("continue_final_message", "tokenize", "sanitize_control_tokens", "padding", "truncation", "max_length"),
        *("return_tensors", "return_dict", "return_assistant_tokens_mask", "tokenizer_kwargs"),
        *("range", "dict", "lipsum", "cycler", "joiner", "namespace", "raise_exception", "strftime_now", "loop"),
        *("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"),
    }
)
"""Names that `apply_chat_template` gives a template, or takes for itself.

https://github.com/huggingface/transformers/blob/main/src/transformers/utils/chat_template_utils.py
"""


def check_variables(variables: Mapping[str, Any], read: frozenset[str]) -> None:
    """Check that each variable of a recipe is one of the template.

    Args:
        variables: the recipe's.
        read: the names that the template reads.

    Raises:
        UserError: the template does not read one of them, or gets it from the data or the tokenizer.
    """
    for name in variables:
        where = f"chat.template_kwargs.{name}"
        if name in _GIVEN:
            raise UserError(
                f"`{name}` is given to the template by `apply_chat_template`, and is no setting",
                where=where,
                hint="Remove it. Messages, tools and documents come from the data, tokens from the tokenizer.",
            )
        if name in read:
            continue
        close = get_close_matches(name, sorted(read - _GIVEN), 1)
        raise UserError(
            f"the template reads no variable `{name}`, so it would change nothing",
            where=where,
            hint=f"Did you mean `{close[0]}`?" if close else "Remove it, or give it the name that the template reads.",
        )


def with_settings(jinja: Any, settings: TemplateSettings, system: str | None, missing_roles: frozenset[Role]) -> Any:
    """Return a template's source, or several by name, with a recipe's settings in front.

    Args:
        jinja: the source.
        settings: the recipe's.
        system: the system message of conversations that have none; None leaves that to the template.
        missing_roles: the roles that the template cannot write.
    """
    if isinstance(jinja, Mapping):
        return {name: with_settings(source, settings, system, missing_roles) for name, source in jinja.items()}
    prologue = "".join(_prologue(settings, system, missing_roles))
    if not prologue:
        return jinja
    # transformers removes a line break behind a block, and white space before a block that begins a line.
    border = "\n" if jinja[:1] in (" ", "\t") else "{{ '' }}"
    return prologue + border + jinja


def _prologue(settings: TemplateSettings, system: str | None, missing_roles: frozenset[Role]) -> Iterator[str]:
    for name, value in settings.variables.items():
        yield f"{{% if {name} is not defined %}}{{% set {name} = {_literal(value)} %}}{{% endif %}}"
    if system is not None:
        yield _SYSTEM.replace("SYSTEM", _literal(system))
    if missing_roles and settings.unsupported_roles != "error":
        roles = _literal(sorted(missing_roles))
        calls = "tool" in missing_roles
        if settings.unsupported_roles == "drop":
            yield (_DROP_CALLS if calls else _DROP).replace("ROLES", roles) + ("{% set tools = none %}" * calls)
        else:
            yield (_TOOLS_AS_TEXT * calls) + _MERGE.replace("ROLES", roles).replace(
                "FOLD", _CALLS_AS_TEXT if calls else _AS_IT_IS
            )
    if settings.reasoning_history == "drop":
        yield _DROP_REASONING
    if settings.reasoning_format == "inline":
        yield _INLINE_REASONING


def _literal(value: Any) -> str:
    """Return a value of a recipe as Jinja."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_literal(str(key))}: {_literal(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_literal, value)) + "]"
    return "none" if value is None else json.dumps(value, ensure_ascii=False)


def _without(names: str, content: str) -> str:
    """Return Jinja that appends `message` to `kept.messages` without some fields, and with another content.

    The fields are left out one by one: llama.cpp's `rejectattr` takes no number of a place in a pair.
    """
    return (
        "{% set kept.pairs = [] %}{% for name, value in message.items() %}"
        f"{{% if name not in {names} %}}{{% set kept.pairs = kept.pairs + [[name, value]] %}}{{% endif %}}"
        "{% endfor %}"
        f"{{% set kept.messages = kept.messages + [dict(kept.pairs, content={content})] %}}"
    )


_SYSTEM = (
    "{% if not (messages and messages[0]['role'] == 'system') %}"
    "{% set messages = [{'role': 'system', 'content': SYSTEM}] + (messages | list) %}{% endif %}"
)
_DROP = (
    "{% set kept = namespace(messages=[]) %}{% for message in messages %}{% if message['role'] not in ROLES %}"
    "{% set kept.messages = kept.messages + [message] %}{% endif %}{% endfor %}{% set messages = kept.messages %}"
)
_DROP_CALLS = _DROP.replace("not in ROLES", "not in ROLES and not message['tool_calls']")
_TOOLS_AS_TEXT = (
    TOOLS_JINJA
    + "{% if listed.text %}{% if messages[0]['role'] == 'system' %}"
    + "{% set messages = [dict(messages[0], content=messages[0]['content'] + '\\n\\n' + listed.text)] + messages[1:] %}"
    + "{% else %}{% set messages = [{'role': 'system', 'content': listed.text}] + messages %}"
    + "{% endif %}{% endif %}{% set tools = none %}"
)
_FLUSH = (
    "{% if kept.waiting %}{% if kept.messages and kept.messages[-1]['role'] == 'user' %}"
    "{% set kept.messages = kept.messages[:-1] + [dict(kept.messages[-1], "
    "content=kept.messages[-1]['content'] + '\\n\\n' + kept.text)] %}"
    "{% else %}{% set kept.messages = kept.messages + [{'role': 'user', 'content': kept.text}] %}{% endif %}"
    "{% set kept.waiting = false %}{% set kept.text = '' %}{% endif %}"
)
_AS_IT_IS = "{% set kept.messages = kept.messages + [message] %}"
_CALLS_AS_TEXT = (
    f"{{% if message['tool_calls'] %}}{{% set folded %}}{CONTENT_JINJA}{{% endset %}}"
    + _without("['tool_calls']", "folded")
    + f"{{% else %}}{_AS_IT_IS}{{% endif %}}"
)
_MERGE = (
    "{% set kept = namespace(messages=[], pairs=[], text='', waiting=false) %}{% for message in messages %}"
    "{% if message['role'] in ROLES %}"
    "{% set kept.text = kept.text + ('\\n\\n' if kept.text else '') + message['content'] %}"
    "{% set kept.waiting = true %}"
    "{% elif message['role'] == 'user' %}{% set kept.messages = kept.messages + "
    "[dict(message, content=(kept.text + '\\n\\n' if kept.text else '') + message['content'])] %}"
    "{% set kept.waiting = false %}{% set kept.text = '' %}"
    f"{{% else %}}{_FLUSH}FOLD{{% endif %}}{{% endfor %}}{_FLUSH}{{% set messages = kept.messages %}}"
)
_REASONING_NAMES = "['reasoning_content', 'reasoning', 'thinking']"
"""The names of the field in which servers and records hold reasoning."""

_DROP_REASONING = (
    "{% set kept = namespace(messages=[], pairs=[], last=-1) %}{% for message in messages %}"
    "{% if message['role'] == 'user' %}{% set kept.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for message in messages %}{% if message['role'] == 'assistant' and loop.index0 < kept.last %}"
    "{% set content = message['content'] %}"
    "{% if content is string and content.strip().startswith('<think>') and '</think>' in content %}"
    "{% set content = content.split('</think>', 1)[1].lstrip() %}{% endif %}"
    f"{_without(_REASONING_NAMES, 'content')}"
    "{% else %}{% set kept.messages = kept.messages + [message] %}{% endif %}{% endfor %}"
    "{% set messages = kept.messages %}"
)
_INLINE_REASONING = (
    "{% set kept = namespace(messages=[], pairs=[]) %}{% for message in messages %}"
    "{% set thought = message['reasoning_content'] or message['reasoning'] or message['thinking'] %}"
    "{% if message['role'] == 'assistant' and thought %}"
    f"{{% set thought = {REASONING_JINJA} %}}"
    "{% set content = message['content'] or '' %}"
    "{% set content = thought + content if content is string else [{'type': 'text', 'text': thought}] + content %}"
    f"{_without(_REASONING_NAMES, 'content')}"
    "{% else %}{% set kept.messages = kept.messages + [message] %}{% endif %}{% endfor %}"
    "{% set messages = kept.messages %}"
)


_DATE_CALL = re.compile(r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""")


def with_date(jinja: Any, today: date) -> Any:
    """Return a template that writes this date where it would write the clock's.

    A run that reads the clock would make other examples on another day. Formats that are no literal are left alone.
    """
    if isinstance(jinja, Mapping):
        return {name: with_date(source, today) for name, source in jinja.items()}
    return _DATE_CALL.sub(lambda match: f"{match[1]}{today.strftime(match[2])}{match[1]}", str(jinja))
