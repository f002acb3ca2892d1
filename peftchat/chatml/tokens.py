"""Special tokens: adding a template's tokens to a tokenizer, and knowing all of them by name."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from peftchat.chatml.template import Template
from peftchat.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


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
        InputError: the tokenizer does not turn one of the tokens into exactly one id.
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
                cure="Choose another template, or a tokenizer that can take added tokens.",
            )
    return [NewToken(token, known[token]) for token in template.tokens if token not in before]
