"""GGUF vocabulary: a tokenizer's tokens, types, merges and split pattern."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from peftchat.chat_template.text_encoder import special_tokens
from peftchat.errors import UserError

if TYPE_CHECKING:
    from gguf import GGUFWriter
    from transformers import PreTrainedTokenizerBase

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SPLITS = {
    _WORDS + r"\p{N}{1,3}" + _REST: "llama-bpe",
    _WORDS + r"\p{N}" + _REST: "qwen2",
}
"""Split patterns of byte-level tokenizers -> llama.cpp's name for them (`src/llama-vocab.cpp`)."""

_BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")
# llama.cpp reads scores only of tokens that merges produce; SentencePiece gives others this score or a lower one.
_UNMERGED_SCORE = -1e6


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """The GGUF metadata of a tokenizer.

    Attributes:
        model: `gpt2` for byte-level BPE, `llama` for SentencePiece's BPE with byte fallback.
        split: llama.cpp's name for the pre-tokenizer, which splits text before merging.
        tokens: every token by id, padded to the rows of the model.
        types: `gguf.TokenType` of each.
        merges: of byte-level BPE, in order; empty otherwise.
        scores: of SentencePiece's BPE: higher for earlier merges; empty otherwise.
        space_first: whether a space is added before the text.
    """

    model: str
    split: str
    tokens: Sequence[str]
    types: Sequence[int]
    merges: Sequence[str]
    scores: Sequence[float]
    space_first: bool

    def write(self, writer: "GGUFWriter") -> None:
        """Write all metadata."""
        writer.add_tokenizer_model(self.model)
        writer.add_tokenizer_pre(self.split)
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.types)
        if self.merges:
            writer.add_token_merges(self.merges)
        if self.scores:
            writer.add_token_scores(self.scores)
        writer.add_add_space_prefix(self.space_first)


def read_vocabulary(tokenizer: "PreTrainedTokenizerBase", rows: int, where: str) -> Vocabulary:
    """Read a tokenizer of the `tokenizers` library.

    Args:
        rows: rows of the model's embedding; ids without a token get a placeholder.

    Raises:
        UserError: llama.cpp has no tokenizer that gives the same ids, or there are more tokens than rows.
    """
    if not tokenizer.is_fast:
        raise _unsupported("it is not one of the `tokenizers` library", where)
    state: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    model = state["model"]
    if model["type"] != "BPE":
        raise _unsupported(f"its model is {model['type']}, not BPE", where)
    tokens, types = _tokens(tokenizer, model, rows, where)
    pairs = [tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in model["merges"]]
    if model.get("byte_fallback"):
        ranks: dict[str, int] = {}
        for rank, pair in enumerate(pairs):
            ranks.setdefault("".join(pair), rank)
        scores = [float(-ranks[token]) if token in ranks else _UNMERGED_SCORE for token in tokens]
        return Vocabulary("llama", "default", tokens, types, (), scores, _puts_space_first(state, where))
    merges = [" ".join(pair) for pair in pairs]
    return Vocabulary("gpt2", _split_name(state, where), tokens, types, merges, (), space_first=False)


def _tokens(
    tokenizer: "PreTrainedTokenizerBase", model: dict[str, Any], rows: int, where: str
) -> tuple[list[str], list[int]]:
    from gguf import TokenType

    by_id = {token_id: token for token, token_id in tokenizer.get_vocab().items()}
    if max(by_id) >= rows:
        raise UserError(
            f"the tokenizer has the id {max(by_id)}, but the model's embedding only {rows} rows", where=where
        )
    special = special_tokens(tokenizer)
    added = {token.content for token in tokenizer.added_tokens_decoder.values()}
    tokens, types = [], []
    for token_id in range(rows):
        token = by_id.get(token_id)
        kind = TokenType.NORMAL
        if token is None:
            token, kind = f"[unused{token_id}]", TokenType.UNUSED
        elif token == model.get("unk_token") and model.get("byte_fallback"):
            kind = TokenType.UNKNOWN
        elif token in special:
            kind = TokenType.CONTROL
        elif token in added:
            kind = TokenType.USER_DEFINED
        elif model.get("byte_fallback") and _BYTE_TOKEN.fullmatch(token):
            kind = TokenType.BYTE
        tokens.append(token)
        types.append(int(kind))
    return tokens, types


def _split_name(state: dict[str, Any], where: str) -> str:
    """Return llama.cpp's name for the pre-tokenizer of a byte-level tokenizer."""
    normalizer = state["normalizer"]
    # Qwen's tokenizer normalizes to NFC, which llama.cpp leaves to the caller.
    if normalizer is not None and normalizer["type"] != "NFC":
        raise _unsupported(f"it normalizes text ({normalizer['type']})", where)
    steps = _steps(state["pre_tokenizer"])
    bytes_last = bool(steps) and steps[-1]["type"] == "ByteLevel" and not steps[-1]["add_prefix_space"]
    match [step["type"] for step in steps] if bytes_last else []:
        case ["ByteLevel"] if steps[0]["use_regex"]:
            return "gpt-2"
        case ["Digits", "ByteLevel"] if steps[0]["individual_digits"] and steps[1]["use_regex"]:
            return "smollm"
        case ["Split", "ByteLevel"] if not steps[1]["use_regex"]:
            name = _SPLITS.get(steps[0]["pattern"].get("Regex", ""))
            if name is not None and steps[0]["behavior"] == "Isolated":
                return name
    raise _unsupported("llama.cpp does not support its rules for splitting text", where)


def _puts_space_first(state: dict[str, Any], where: str) -> bool:
    """Return whether SentencePiece's space mark is added before the text."""
    steps = [*_steps(state["normalizer"], "normalizers"), *_steps(state["pre_tokenizer"])]
    kinds = [step["type"] for step in steps]
    if kinds == ["Prepend", "Replace"]:
        return True
    if kinds == ["Replace"]:
        return False
    if kinds == ["Metaspace"]:
        return bool(steps[0]["prepend_scheme"] != "never")
    raise _unsupported("llama.cpp does not support its treatment of spaces", where)


def _steps(part: dict[str, Any] | None, inner: str = "pretokenizers") -> list[dict[str, Any]]:
    if part is None:
        return []
    return list(part[inner]) if part["type"] == "Sequence" else [part]


def _unsupported(why: str, where: str) -> UserError:
    return UserError(
        f"the tokenizer cannot be written as GGUF: {why}",
        where=where,
        hint="Convert the merged folder with llama.cpp's convert_hf_to_gguf.py.",
    )
