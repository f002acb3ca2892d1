"""Digests of encoded examples and of tokenizers: the content that training sees, wherever it comes from."""

import hashlib
import os
from contextlib import suppress
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from peftchat.chat_template.examples import ExampleStore

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ExampleDigests = npt.NDArray[np.uint64]
"""A number for each example, made from its ids and token tags."""

_VERSION = 1


def example_digests(store: ExampleStore) -> ExampleDigests:
    """Return the digest of each example, in order; kept beside the file of the examples."""
    kept = store.path.with_suffix(f".digests{_VERSION}.npy")
    with suppress(OSError, ValueError):
        found = np.load(kept)
        if found.shape == (len(store),) and found.dtype == np.uint64:
            return found
    parts = [_digests(ids, tags, offsets) for ids, tags, offsets in store.arrays()]
    digests = np.concatenate([np.zeros(0, np.uint64), *parts])
    temporary = kept.with_name(f"{kept.name}.{os.getpid()}.tmp")
    with suppress(OSError):
        with temporary.open("wb") as file:
            np.save(file, digests)
        temporary.replace(kept)
    return digests


def tokenizer_digest(tokenizer: "PreTrainedTokenizerBase") -> str:
    """Return the digest of everything that turns text into ids: vocabulary, merges, normalization, special tokens."""
    if tokenizer.is_fast:
        vocabulary = tokenizer.backend_tokenizer.to_str()
    else:
        vocabulary = repr(sorted(tokenizer.get_vocab().items()))
    special = repr(sorted(map(str, tokenizer.added_tokens_decoder.values())))
    return text_digest(vocabulary + special)


def text_digest(text: str) -> str:
    """Return the SHA-256 of a text."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _digests(ids: npt.NDArray[np.int32], tags: npt.NDArray[np.uint8], offsets: npt.NDArray[np.int64]) -> ExampleDigests:
    """Return the digests of examples in flat arrays: a sum of mixed bits of id, tag and position."""
    lengths = np.diff(offsets)
    positions = np.arange(len(ids)) - np.repeat(offsets[:-1], lengths)
    tokens = ids.astype(np.uint64) << np.uint64(8) | tags
    # Sums of unsigned numbers wrap around, so differences of running sums are exact.
    sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum(_mix(_mix(tokens) + positions.astype(np.uint64)))])
    return _mix(np.diff(sums[offsets]) + lengths.astype(np.uint64))


def _mix(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Return well-mixed bits (the finalizer of splitmix64, Steele et al., 2014)."""
    mixed = values + np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    result: npt.NDArray[np.uint64] = mixed ^ (mixed >> np.uint64(31))
    return result
