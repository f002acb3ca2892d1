"""A chat template together with a tokenizer that has its special tokens."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from peftchat.chat_template.encoder import ChatEncoder
from peftchat.chat_template.template_settings import TemplateSettings
from peftchat.chat_template.templates import CHAT_TEMPLATES, TOKENIZER_TEMPLATE, ChatTemplate
from peftchat.chat_template.text_encoder import special_tokens
from peftchat.chat_template.tokenizer_template import TokenizerTemplate
from peftchat.conversation import ROLES
from peftchat.errors import UserError, first_line

if TYPE_CHECKING:
    from datetime import date

    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class NewToken:
    """A token that a template added to the tokenizer's vocabulary.

    Attributes:
        token: the token's text.
        id: its id.
        description: a few words for `chat.new_token_init: description`; "" takes the words in the token's text.
    """

    token: str
    id: int
    description: str = field(default="", compare=False)


@dataclass(frozen=True, slots=True)
class ChatFormat:
    """A chat template together with a tokenizer that has its special tokens.

    Attributes:
        tokenizer: with the template's tokens added and its Jinja source as `chat_template`.
        template: the template.
        new_tokens: the tokens that the tokenizer did not have before.
    """

    tokenizer: "PreTrainedTokenizerBase"
    template: ChatTemplate | TokenizerTemplate
    new_tokens: Sequence[NewToken]

    def encoder(self) -> ChatEncoder:
        """Return an encoder for the format."""
        return ChatEncoder(self.tokenizer, self.template)


def make_format(
    name: str,
    system: str | None,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    settings: TemplateSettings | None = None,
    today: "date | None" = None,
) -> ChatFormat:
    """Prepare a tokenizer for a chat template. The tokenizer is changed.

    Args:
        name: a value of `chat.template`.
        system: the system message of conversations that have none. None leaves that to the template.
        tokenizer: gets the template's tokens and its Jinja source; with a template of the registry also its end token
            as `eos_token`.
        settings: what the recipe says about the template.
        today: the date for Jinja templates that write one; None for the clock's.

    Raises:
        UserError: the tokenizer cannot take the template's tokens, or has no template of its own for `model`.
    """
    settings = settings or TemplateSettings()
    if name not in CHAT_TEMPLATES:
        if name != TOKENIZER_TEMPLATE:
            tokenizer.chat_template = _read_template(name)
        own = TokenizerTemplate(tokenizer, system, settings=settings, today=today)
        return ChatFormat(tokenizer, own, add_template_tokens(tokenizer, own))
    template = CHAT_TEMPLATES[name]
    known_bos = template.bos_token if template.bos_token in special_tokens(tokenizer) else None
    template = replace(template, system=system, bos_token=known_bos)
    new_tokens = add_template_tokens(tokenizer, template)
    if not _changes(template, settings):
        return ChatFormat(tokenizer, template, new_tokens)
    # The template's own Jinja source, with the settings in front, as a model would bring it.
    # It writes reasoning inline by itself.
    settings = replace(settings, reasoning_format="template")
    changed = TokenizerTemplate(tokenizer, settings=settings, name=name)
    tokenizer.chat_template = changed.jinja
    return ChatFormat(tokenizer, changed, new_tokens)


def _changes(template: ChatTemplate, settings: TemplateSettings) -> bool:
    """Return whether settings change what a template of the registry writes. It keeps all reasoning by itself."""
    misses_roles = not frozenset(ROLES) <= frozenset(template.headers)
    return settings.reasoning_history == "drop" or (misses_roles and settings.unsupported_roles != "error")


def _read_template(path: str) -> str:
    """Read a Jinja file.

    Raises:
        UserError: it cannot be read, or is empty.
    """
    try:
        # Some editors begin a file with a byte order mark, which would become text of every prompt.
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        hint = "Save it as UTF-8 text." if isinstance(error, UnicodeDecodeError) else "Check the path."
        what = f"the template cannot be read: {first_line(error)}"
        raise UserError(what, where=f"chat.template: {path}", hint=hint) from error
    if not text.strip():
        raise UserError("the template is empty", where=f"chat.template: {path}", hint="Name a file with a template.")
    return text


def add_template_tokens(
    tokenizer: "PreTrainedTokenizerBase", template: ChatTemplate | TokenizerTemplate
) -> list[NewToken]:
    """Add the template's missing tokens, in its order, and make its end token the tokenizer's `eos_token`.

    A token that is already in the vocabulary keeps its id. If it is ordinary there, it becomes special. The padding
    token stays distinct from the end token wherever the tokenizer has another candidate.

    Returns:
        The tokens that were not in the vocabulary before.

    Raises:
        UserError: the tokenizer does not encode one of the tokens as exactly one id.
    """
    from transformers import AddedToken

    vocabulary = set(tokenizer.get_vocab())
    already_special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    # A token that is special only as `eos_token`, say, must stay special when another token takes that name.
    required = [str(token) for token in (*tokenizer.all_special_tokens, *template.special_tokens)]
    missing = [AddedToken(token, special=True, normalized=False) for token in required if token not in already_special]
    tokenizer.add_tokens(missing, special_tokens=True)
    ids = special_tokens(tokenizer)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token or template.end_token
    if isinstance(template, ChatTemplate):
        # A model's own template may write its tokenizer's `eos_token`, which therefore stays.
        tokenizer.eos_token = template.end_token
    tokenizer.chat_template = template.jinja
    for token in template.special_tokens:
        encoded = tokenizer.encode(token, add_special_tokens=False)
        if encoded != [ids.get(token)]:
            raise UserError(
                f"the tokenizer encodes the special token {token} as {encoded}, expected one id",
                where="chat.template",
                hint="Choose another template, or a tokenizer that supports added tokens.",
            )
    return [
        NewToken(token, ids[token], description)
        for token, description in template.special_tokens.items()
        if token not in vocabulary
    ]
