"""An independent, slow encoder of conversations, to compare the fast one with.

It shares no code with `peftchat.chat_template`: it writes the format out by hand with stand-ins for the special
tokens, adds the stand-ins to a copy of the tokenizer as ordinary added tokens, lets stock transformers encode the
whole text in one call with `split_special_tokens`, and finds out what each token is from the characters it covers.
"""

import copy
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tokenizers import AddedToken, processors

from peftchat.conversation import Conversation, Message

HEADER, CONTENT, END, TRAILER = range(4)
"""Parts of a turn as the slow encoder numbers them."""

_SPECIAL_OF = {
    "starchat": ["<|system|>", "<|assistant|>", "<|user|>", "<|end|>"],
    "chatml": ["<|im_start|>", "<|im_end|>"],
}


@dataclass(frozen=True)
class SlowRow:
    """Ids, and for each the message that it belongs to and its part of the turn."""

    ids: np.ndarray
    message: np.ndarray
    part: np.ndarray
    roles: list[str]

    def labels(self, policy: str) -> np.ndarray:
        """The labels by the policy, written out from its definition."""
        if policy == "everything":
            return self.ids
        role = np.array([*self.roles, "none"])[self.message]
        trained = role == "assistant"
        if policy != "answers_and_headers":
            trained &= (self.part == CONTENT) | (self.part == END)
        if policy == "last_answer":
            answers = [index for index, name in enumerate(self.roles) if name == "assistant"]
            trained &= self.message == (answers[-1] if answers else -2)
        return np.where(trained, self.ids, -100)


class SlowEncoder:
    """Encodes conversations in a block format through stock transformers.

    Args:
        tokenizer: with the format's tokens added.
        clean: encodes the text between special tokens; a copy of it is changed.
    """

    def __init__(self, tokenizer: Any, clean: Any, template: str, system: str | None) -> None:
        self.template, self.system = template, system
        self.ids = {token: tokenizer.convert_tokens_to_ids(token) for token in _SPECIAL_OF[template]}
        flags = {token.content: token for token in tokenizer.added_tokens_decoder.values()}
        self.stand_in = {token: f"\uf8ff{number}\uf8ff" for number, token in enumerate(self.ids)}
        self.tokenizer = copy.deepcopy(clean)
        self.tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A", special_tokens=[])
        added = [
            AddedToken(name, special=False, normalized=False, lstrip=flags[token].lstrip, rstrip=flags[token].rstrip)
            for token, name in self.stand_in.items()
        ]
        assert self.tokenizer.add_tokens(added) == len(added)
        self.real = {
            self.tokenizer.convert_tokens_to_ids(name): self.ids[token] for token, name in self.stand_in.items()
        }

    def _blocks(self, conversation: Conversation) -> Iterator[tuple[str, int, int]]:
        """(text, message, part) from the format's definition; special tokens as their stand-ins."""
        turns = [(message.role, message.content) for message in conversation.messages]
        blocks = list(enumerate(turns))
        if self.system is not None and not (turns and turns[0][0] == "system"):
            blocks.insert(0, (-1, ("system", self.system)))
        for index, (role, content) in blocks:
            if self.template == "starchat":
                yield self.stand_in[f"<|{role}|>"] + "\n", index, HEADER
                end = self.stand_in["<|end|>"]
            else:
                yield f"{self.stand_in['<|im_start|>']}{role}\n", index, HEADER
                end = self.stand_in["<|im_end|>"]
            yield content, index, CONTENT
            yield end, index, END
            yield "\n", index, TRAILER

    def encode(self, conversations: Sequence[Conversation]) -> list[SlowRow]:
        """Return one slow row per conversation."""
        blocks = [list(self._blocks(conversation)) for conversation in conversations]
        texts = ["".join(text for text, _, _ in row) for row in blocks]
        call = {"add_special_tokens": False, "split_special_tokens": True, "return_offsets_mapping": True}
        encoded = self.tokenizer(texts, **call) if texts else {"input_ids": [], "offset_mapping": []}
        return [
            self._row(ids, spans, row, [message.role for message in conversation.messages])
            for ids, spans, row, conversation in zip(
                encoded["input_ids"], encoded["offset_mapping"], blocks, conversations, strict=True
            )
        ]

    def answer_header(self) -> list[int]:
        """The ids in front of an answer that begins with a letter."""
        (row,) = self.encode([Conversation((Message("assistant", "a"),))])
        return [int(number) for number in row.ids[(row.message == 0) & (row.part == HEADER)]]

    def _row(self, ids: list[int], spans: list[tuple[int, int]], blocks: Any, roles: list[str]) -> SlowRow:
        owner = list(itertools.chain.from_iterable([(index, part)] * len(text) for text, index, part in blocks))
        message, parts = [], []
        for token, (start, stop) in zip(ids, spans, strict=True):
            covered = owner[start:stop] if stop > start else owner[start : start + 1] or owner[-1:]
            if token in self.real:
                # Its offsets take in the white space that it strips; the token itself is what its own character says.
                stand_in = next(spot for spot in range(start, stop) if self._is_stand_in(blocks, spot))
                covered = [owner[stand_in]]
            # A token over two parts of a turn belongs to the content if it holds any of it.
            contents = [one for one in covered if one[1] == CONTENT]
            index, part = (contents or covered)[0]
            message.append(index)
            parts.append(part)
        real = np.array([self.real.get(token, token) for token in ids], dtype=np.int64)
        return SlowRow(real, np.array(message, dtype=np.int64), np.array(parts, dtype=np.int64), roles)

    @staticmethod
    def _is_stand_in(blocks: Any, spot: int) -> bool:
        for text, _, part in blocks:
            if spot < len(text):
                return part != CONTENT and text[spot] == "\uf8ff"
            spot -= len(text)
        return False
