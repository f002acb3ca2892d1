"""Which language a conversation is in: what its record says, else a detector's guess."""

from collections.abc import Mapping, Sequence
from typing import Any

from peftchat.conversation import Message
from peftchat.errors import UserError

_FIELDS = ("lang", "language")
_DETECT_CHARACTERS = 2_000
# The detector tells the Chinese languages apart; data sets and users call the written one zh.
_WRITTEN_AS = {"cmn": "zh", "yue": "zh", "wuu": "zh"}


def matches_language(language: str, wanted: Sequence[str]) -> bool:
    """Whether a language tag is one of `wanted` or a regional variety of one: `pt` includes `pt-BR`."""
    tag = language.lower().replace("_", "-")
    return any(tag == want.lower() or tag.startswith(want.lower() + "-") for want in wanted)


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
    return _WRITTEN_AS.get(code, code)


def is_in_languages(fields: Mapping[str, Any], messages: Sequence[Message], wanted: Sequence[str]) -> bool:
    """Return whether a conversation is in a wanted language, by its `lang` or `language` field, else by its text."""
    for name in _FIELDS:
        if isinstance(value := fields.get(name), str) and value:
            return matches_language(value, wanted)
    return matches_language(detect_language(messages), wanted)
