"""Tokenizers trained on the spot: byte-level ones for small models, and one of every kind there is."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from tests.support.data import CONVERSATIONS, WORDS
from tests.support.random_text import CORPUS

TEXT = [
    "def area(radius):\n    return 3.14159 * radius ** 2\n",
    "How do I read a file line by line in Python 3.11? Open it and iterate: for line in file: print(line)\n",
    "naïve café, 日本語 and 🎉 are text too; don't split 12345 badly.\n",
]


def train_byte_level(
    texts: Sequence[str], size: int, special_tokens: Sequence[str], split: pre_tokenizers.PreTokenizer | None = None
) -> Tokenizer:
    """Train a byte-level BPE tokenizer.

    Args:
        texts: to learn merges from.
        size: tokens in all; 256 bytes and the special tokens leave the rest for merges.
        special_tokens: come first.
        split: comes before the bytes; a pattern takes the place of the byte level's own.
    """
    tokenizer = Tokenizer(models.BPE())
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not isinstance(split, pre_tokenizers.Split))
    tokenizer.pre_tokenizer = last if split is None else pre_tokenizers.Sequence([split, last])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=list(special_tokens),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


@cache
def _small_talk_tokenizer() -> Tokenizer:
    return train_byte_level([" ".join(WORDS)] * 4, 320, ["<eos>"])


def small_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer for `small_talk`."""
    return PreTrainedTokenizerFast(tokenizer_object=_small_talk_tokenizer(), eos_token="<eos>", pad_token="<eos>")


def save_tokenizer(folder: Path) -> Path:
    """Save a tokenizer for `CONVERSATIONS`, and nothing else of a model; return the folder."""
    tokenizer = train_byte_level([content for one in CONVERSATIONS for _, content in one], 400, ["<eos>"])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>").save_pretrained(folder)
    return folder


def byte_level(merges: int = 60, split: Any = None) -> PreTrainedTokenizerFast:
    """Return a byte-level tokenizer of a few lines of `TEXT`; `split` comes before the bytes."""
    end = "<|endoftext|>"
    tokenizer = train_byte_level(TEXT, 257 + merges, [end], split=split)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=end, bos_token=end, model_max_length=512)


@dataclass(frozen=True)
class Case:
    """A tokenizer, and one without its control tokens in the vocabulary where that makes a difference."""

    tokenizer: Any
    clean: Any


def _fast(tokenizer: Tokenizer, **names: str) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def _byte_level(digits: bool = False) -> Case:
    """GPT-2's kind; its one special token is everything: beginning, end, padding, unknown."""
    names = ["<|endoftext|>", "<fim_prefix>"] if digits else ["<|endoftext|>"]
    split = pre_tokenizers.Digits(individual_digits=True) if digits else None
    tokenizer = train_byte_level(CORPUS, 700, names, split=split)
    if not digits:
        tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    end = "<|endoftext|>"
    fast = _fast(tokenizer, bos_token=end, eos_token=end, unk_token=end, **({} if digits else {"pad_token": end}))
    return Case(fast, fast)


def _byte_fallback(extra: Sequence[AddedToken], prepend: bool) -> PreTrainedTokenizerFast:
    """SentencePiece's BPE as Llama 2 and Gemma have it: 256 byte pieces for what the vocabulary lacks."""
    parts = [normalizers.Prepend("▁")] if prepend else []
    trained = Tokenizer(models.BPE(unk_token="<unk>"))
    trained.normalizer = normalizers.Sequence([*parts, normalizers.Replace(" ", "▁")])
    trained.train_from_iterator(
        CORPUS[:4], trainers.BpeTrainer(vocab_size=400, special_tokens=["<unk>", "<s>", "</s>"])
    )
    state = json.loads(trained.to_str())
    pieces = [piece for piece in state["model"]["vocab"] if piece not in ("<unk>", "<s>", "</s>")]
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    merges = [tuple(pair) for pair in state["model"]["merges"]]
    vocabulary = {name: number for number, name in enumerate(names)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = trained.normalizer
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens(
        [AddedToken(name, special=True, normalized=False) for name in ("<unk>", "<s>", "</s>")]
    )
    tokenizer.add_tokens(extra)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return _fast(tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def _llama2() -> Case:
    fast = _byte_fallback([], prepend=True)
    return Case(fast, fast)


def _gemma() -> Case:
    """Runs of newlines and <think> are added tokens that are not special."""
    runs = [AddedToken("\n" * count, special=False, normalized=False) for count in range(2, 6)]
    fast = _byte_fallback([*runs, AddedToken("<think>", special=False, normalized=False)], prepend=False)
    return Case(fast, fast)


def _phi3() -> Case:
    """The template's tokens are there already, in another order, and take the white space beside them."""
    tokens = [AddedToken(f"<|{name}|>", special=True, normalized=False, rstrip=True) for name in ("end", "user")]
    tokens += [AddedToken("<|assistant|>", special=True, normalized=False, rstrip=True, lstrip=True)]
    tokens += [AddedToken("<|im_end|>", special=True, normalized=False, lstrip=True)]
    fast = _byte_fallback(tokens, prepend=True)
    return Case(fast, fast)


def _unigram(scheme: str, control: Sequence[str], normalizer: normalizers.Normalizer | None) -> Case:
    """SentencePiece's Unigram; `control` tokens stand in its vocabulary with a score that beats their letters."""
    trained = Tokenizer(models.Unigram())
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    if normalizer is not None:
        trained.normalizer = normalizer
    trained.train_from_iterator(
        CORPUS, trainers.UnigramTrainer(vocab_size=400, special_tokens=["<unk>"], unk_token="<unk>")
    )
    state = json.loads(trained.to_str())

    def build(unknown: str, names: Sequence[str]) -> PreTrainedTokenizerFast:
        pieces = [(piece, score) for piece, score in state["model"]["vocab"][1:] if piece not in control]
        tokenizer = Tokenizer(models.Unigram([(unknown, 0.0), *pieces, *((name, -1.0) for name in names)], unk_id=0))
        tokenizer.normalizer = trained.normalizer
        tokenizer.pre_tokenizer = trained.pre_tokenizer
        tokenizer.decoder = decoders.Metaspace()
        return _fast(tokenizer, unk_token=unknown)

    dirty = build("<unk>", control)
    dirty.add_tokens([AddedToken(name, special=True, normalized=False) for name in control], special_tokens=True)
    dirty.eos_token = "</s>"
    return Case(dirty, build("\uf8fe", [f"\uf8fe{number}\uf8fe" for number in range(len(control))]))


def _wordpiece() -> Case:
    """BERT's: lower case, no white space, BOS and EOS by post-processor."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]", max_input_chars_per_word=20))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    tokenizer.train_from_iterator(CORPUS, trainers.WordPieceTrainer(vocab_size=500, special_tokens=special))
    single = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    tokenizer.post_processor = single
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token"), special, strict=True))
    fast = _fast(tokenizer, **names)
    return Case(fast, fast)


def _collapsing() -> normalizers.Normalizer:
    """As T5 and XLM-R have it: compatibility forms, newlines to spaces, runs of spaces to one."""
    spaces = normalizers.Replace(Regex(r"\s+"), " ")
    return normalizers.Sequence([normalizers.NFKC(), spaces])


BUILDERS: dict[str, Callable[[], Case]] = {
    "byte-level": _byte_level,
    "byte-level-digits": lambda: _byte_level(digits=True),
    "llama2": _llama2,
    "gemma": _gemma,
    "phi3": _phi3,
    "unigram-first": lambda: _unigram("first", ["</s>", "<s>"], None),
    "unigram-first-collapsing": lambda: _unigram("first", ["</s>"], _collapsing()),
    "unigram-always-with-control-tokens": lambda: _unigram("always", ["</s>", "<|end|>", "<|im_end|>", "def"], None),
    "wordpiece": _wordpiece,
}


@cache
def built(name: str) -> Case:
    """A case by name; take a deep copy before changing its tokenizers."""
    return BUILDERS[name]()
