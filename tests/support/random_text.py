# ruff: noqa: RUF001 - text in many scripts
"""Random conversations in every script, with text that is made of special tokens."""

import random
from collections.abc import Iterator
from functools import cache

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
