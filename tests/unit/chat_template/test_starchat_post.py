"""The labels that the StarChat post prints, and the published function that never produced them in training."""

from typing import Any

import pytest
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from peftchat.chat_template.chat_format import ChatFormat, make_format
from peftchat.chat_template.loss_mask import labels_for, loss_mask_table
from peftchat.conversation import Conversation, Message

# The post's vector for "\nSure, what can I do for you?<|end|>\n" as StarCoderBase's tokenizer splits it.
TARGETS = [49153, 203, 69, 513, 30, 2769, 883, 439, 745, 436, 844, 49, 49155, 203]
PIECES = ["S", "ure", ",", " what", " can", " I", " do", " for", " you", "?"]
IDS = dict(zip(PIECES, TARGETS[2:12], strict=True)) | {"\n": 203, "Hello": 8279, " help": 3049, " me": 597}
CONVERSATION = Conversation(
    (Message("user", "Hello, can you help me?"), Message("assistant", "Sure, what can I do for you?"))
)


@pytest.fixture
def chat() -> ChatFormat:
    """A word-level stand-in with StarCoderBase's ids for these pieces, and as many entries as StarCoderBase has."""
    filler = (f"\x00{number}" for number in range(49152))
    vocabulary = {**{name: number for number, name in enumerate(filler) if number not in IDS.values()}, **IDS}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="\x000"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"S(?=ure)|ure|\n| ?\w+|[,?]"), behavior="isolated")
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="\x000")
    assert len(fast) == 49152
    return make_format("starchat", None, fast)


def mask_user_labels(tokenizer: Any, labels: list[Any]) -> None:
    """What the post published: from each user token up to the next assistant token, -100, in place."""
    user = tokenizer.convert_tokens_to_ids("<|user|>")
    assistant = tokenizer.convert_tokens_to_ids("<|assistant|>")
    for place, label in enumerate(labels):
        if label == user:
            spot = place
            while spot < len(labels) and labels[spot] != assistant:
                labels[spot] = -100
                spot += 1


def published(chat: ChatFormat, ids: list[int]) -> list[int]:
    """As the post's training script called it: with the list of blocks."""
    blocks = [list(ids)]
    mask_user_labels(chat.tokenizer, blocks)
    return blocks[0]


def ours(chat: ChatFormat) -> list[int]:
    (row,) = chat.encoder().encode([CONVERSATION])
    return labels_for(row.ids, row.token_tags, loss_mask_table("answers_and_headers")).tolist()


def masks_the_user(labels: list[int]) -> bool:
    return labels[:11] == [-100] * 11


def test_new_tokens_have_the_posts_ids(chat: ChatFormat) -> None:
    assert [(new.token, new.id) for new in chat.new_tokens] == [
        ("<|system|>", 49152),
        ("<|assistant|>", 49153),
        ("<|user|>", 49154),
        ("<|end|>", 49155),
    ]


def test_the_posts_vector(chat: ChatFormat) -> None:
    assert ours(chat) == [-100] * 11 + TARGETS


def test_the_published_function_masks_nothing_and_ours_does(chat: ChatFormat) -> None:
    (row,) = chat.encoder().encode([CONVERSATION])
    ids = row.ids.tolist()
    assert masks_the_user(ours(chat))
    assert not masks_the_user(published(chat, ids))
    assert published(chat, ids) == ids
    # On one flat list it does what the post shows; the defect is in how it was called.
    flat = list(ids)
    mask_user_labels(chat.tokenizer, flat)
    assert flat == ours(chat)


def test_answers_leave_the_header_and_the_last_newline(chat: ChatFormat) -> None:
    (row,) = chat.encoder().encode([CONVERSATION])
    labels = labels_for(row.ids, row.token_tags, loss_mask_table("answers")).tolist()
    assert labels == [-100] * 13 + TARGETS[2:13] + [-100]
