"""The chat formats that a recipe can name."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from peftchat.chat_template.encoder import ChatEncoder
from peftchat.chat_template.templates import NewToken, Template, add_template_tokens, chatml, starchat
from peftchat.chat_template.tokenizer_template import TokenizerTemplate

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BLOCK_TEMPLATES: dict[str, Callable[[str | None], Template]] = {"starchat": starchat, "chatml": chatml}
"""Formats that stand on their own, by name; each is made from the default system prompt."""

TEMPLATE_NOTES = {
    "starchat": "<|system|>, <|user|>, <|assistant|> and <|end|>: StarChat's format, a token for each role.",
    "chatml": "<|im_start|>role ... <|im_end|>: OpenAI's format, at home in Qwen and SmolLM2.",
    "model": "The template that the model's tokenizer brings, with an exact mask.",
}
"""Every value of `chat.template`, with a line about it."""


@dataclass(frozen=True, slots=True)
class ChatFormat:
    """A template together with a tokenizer that knows its tokens.

    Attributes:
        tokenizer: with the template's tokens added and its Jinja form as `chat_template`.
        template: the format.
        new_tokens: the tokens that the tokenizer did not have before.
    """

    tokenizer: "PreTrainedTokenizerBase"
    template: Template
    new_tokens: Sequence[NewToken]

    def encoder(self) -> ChatEncoder:
        """An encoder for the format."""
        return ChatEncoder(self.tokenizer, self.template)


def make_format(name: str, system: str | None, tokenizer: "PreTrainedTokenizerBase") -> ChatFormat:
    """Bring a tokenizer into a chat format; the tokenizer is changed.

    Raises:
        UserError: the tokenizer cannot hold the format's tokens, or has no template of its own for `model`.
    """
    template = BLOCK_TEMPLATES[name](system) if name in BLOCK_TEMPLATES else TokenizerTemplate(tokenizer, system)
    return ChatFormat(tokenizer, template, add_template_tokens(tokenizer, template))
