# ruff: noqa: RUF001 - text in many scripts
"""Tokenizers of every kind, trained on the spot, random conversations, and a slow encoder to compare with.

The slow encoder shares no code with `peftchat.chat_template`: it writes the format out by hand with stand-ins for
special tokens, adds these to a copy of the tokenizer as ordinary added tokens, lets stock transformers encode the whole
text in one call with `split_special_tokens`, and finds out what each token is from the characters it covers.
"""

import copy
import itertools
import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from peftchat.conversation import ROLES, Conversation, Message, Role

CORPUS = [
    "def area(radius):\n    return 3.14159 * radius ** 2\n\n\nprint(area(2))\n",
    "Hello, can you help me? Sure, what can I do for you?\n\n\tThe quick brown fox isn't lazy.",
    "system user assistant tool <|system|> <|user|> <|assistant|> <|end|> </s> <s> [SEP] [CLS] <unk> <|im_end|>",
    "Η γρήγορη καφέ αλεπού. Съешь же ещё этих мягких французских булок. שלום עולם مرحبا بالعالم",
    "日本語の文章です。中文句子。한국어 문장. हिन्दी में वाक्य. ภาษาไทย",
    "naïve café ﬁancé ① Ⅷ 𝔘𝔫𝔦𝔠𝔬𝔡𝔢 🎉👩‍👩‍👧 🇮🇹 a\u0301 e\u0308 \u200b\u00a0\u3000 \r\n \u2028",
] * 4
FORGERIES = [
    "<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<|im_start|>", "<|im_end|>", "<|endoftext|>", "</s>", "<s>",
    "<unk>", "[UNK]", "[SEP]", "[CLS]", "<think>", "</think>", "<0x0A>", "▁", "\uff1c/s\uff1e", "<|END|>", "<|end",
]  # fmt: skip
_PLANES = [
    (0x20, 0x7F),
    (0x0, 0x20),
    (0x80, 0x2FF),
    (0x300, 0x36F),
    (0x370, 0x1FFF),
    (0x2000, 0x206F),
    (0x2070, 0xD7FF),
]
_PLANES += [(0xE000, 0xF8FD), (0xF900, 0xFFFF), *((plane << 16, (plane << 16) + 0xFFFF) for plane in range(1, 17))]
_WORDS = ["Hello", "can", "you", "?", "Sure", ",", "2024", "3.14", "user", "assistant", "isn't", "naïve", "日本", "🎉"]


def _content(draw: random.Random, pieces: int) -> Iterator[str]:
    for _ in range(pieces):
        kind = draw.random()
        if kind < 0.45:
            yield " ".join(draw.choices(_WORDS, k=draw.randint(1, 6)))
        elif kind < 0.6:
            yield draw.choice(
                ["\n", "\n\n", " ", "  ", "\t", "\r\n", "\n \n", "\u3000", "\u0301", "\x1c", "\x85", "\u2028"]
            )
        elif kind < 0.8:
            yield draw.choice(FORGERIES)
        else:
            low, high = draw.choice(_PLANES)
            yield "".join(chr(draw.randint(low, high)) for _ in range(draw.randint(1, 3)))


@cache
def conversations(count: int, roles: tuple[Role, ...] = ROLES, forged: bool = True) -> list[Conversation]:
    """Random conversations: any order of roles, empty and huge messages, every plane, text made of special tokens."""
    draw = random.Random(count)
    found = []
    for number in range(count):
        messages = []
        for _ in range(draw.choice([0, 1, 1, 2, 2, 3, 4, 6])):
            huge = draw.random() < 0.001
            text = "".join(_content(draw, draw.choice([1000, 3000]) if huge else draw.choice([0, 1, 1, 2, 3, 5])))
            for forgery in () if forged else FORGERIES:
                text = text.replace(forgery, "-")
            messages.append(Message(draw.choice(roles), text))
        found.append(Conversation(tuple(messages), f"random:{number + 1}"))
    return found


@dataclass(frozen=True)
class Case:
    """A tokenizer, and one without its control tokens in the vocabulary where that makes a difference."""

    tokenizer: Any
    clean: Any


def _fast(tokenizer: Tokenizer, **names: str) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def _byte_level(digits: bool = False) -> Case:
    """GPT-2's kind; its one special token is everything: beginning, end, padding, unknown."""
    tokenizer = Tokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    split_digits = [pre_tokenizers.Digits(individual_digits=True)] if digits else []
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*split_digits, byte_level])
    if not digits:
        tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    tokenizer.decoder = decoders.ByteLevel()
    names = ["<|endoftext|>", "<fim_prefix>"] if digits else ["<|endoftext|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=names, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(CORPUS, trainer)
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


# ---------------------------------------------------------------------------------------------------------------------

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
        """One slow row a conversation."""
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
