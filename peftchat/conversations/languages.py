"""Which language a conversation is in: what its record says, else a detector's guess."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from peftchat.conversation import Message
from peftchat.conversations.language_names import language_tag
from peftchat.conversations.problems import ProblemLog
from peftchat.errors import UserError

_FIELDS = ("lang", "language")
_DETECT_CHARACTERS = 2_000
_CODE = re.compile(r"[a-z]{2,3}([-_]\w{2,8})*", re.IGNORECASE)
_SHOWN_OF_VALUE = 40
_MOST_VALUES = 20


def matches_language(language: str, wanted: Sequence[str]) -> bool:
    """Whether a language is one of `wanted` or a regional variety of one: `pt` includes `pt-BR` and `Portuguese`."""
    tag = language_tag(language) or language.lower().replace("_", "-")
    codes = [language_tag(want) or want.lower().replace("_", "-") for want in wanted]
    return any(tag == code or tag.startswith(f"{code}-") for code in codes)


def check_languages(wanted: Sequence[str]) -> None:
    """Check that each wanted language is one, or at least looks like a code.

    Raises:
        UserError: one is not.
    """
    for want in wanted:
        if language_tag(want) is None and not _CODE.fullmatch(want.strip()):
            raise UserError(
                f"{want!r} is not a language",
                where="languages (--languages)",
                hint="Give codes or English names, such as en, pt-BR or German.",
            )


def detect_language(messages: Sequence[Message]) -> str:
    """The ISO 639 code of the language that user and assistant speak, judged by the start of the conversation.

    Raises:
        UserError: the detector is not installed.
    """
    try:
        import py3langid
    except ImportError as error:
        raise UserError(
            "records without a `lang` field need a language detector, and none is installed",
            where="languages (--languages)",
            hint="pip install 'peftchat[languages]'",
        ) from error
    text = "\n".join(message.content for message in messages if message.role in ("user", "assistant"))
    code: str = py3langid.classify(text[:_DETECT_CHARACTERS])[0]
    # The detector tells the Chinese languages apart; data sets and users call the written one zh.
    return language_tag(code) or code


def is_in_languages(
    fields: Mapping[str, Any], messages: Sequence[Message], wanted: Sequence[str], problems: ProblemLog
) -> bool:
    """Return whether a conversation is in a wanted language, by its `lang` or `language` field, else by its text.

    A value that is no language, such as `python` or `unknown`, leaves the choice to the text, and is counted.
    """
    for name in _FIELDS:
        if not isinstance(value := fields.get(name), str) or not value.strip():
            continue
        if language_tag(value) is not None:
            return matches_language(value, wanted)
        remark = f"`{name}: {value.strip()[:_SHOWN_OF_VALUE]}` is not a language, and the text decided"
        if remark not in problems.remarks and len(problems.remarks) >= _MOST_VALUES:
            remark = f"`{name}` has another value that is not a language, and the text decided"
        problems.remarks[remark] += 1
    return matches_language(detect_language(messages), wanted)
