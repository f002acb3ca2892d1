"""Tokenizers without the `tokenizers` library: SentencePiece through its own Python package, and bytes."""

import itertools
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from peftchat.chat_template.chat_format import make_format
from peftchat.chat_template.loss_mask import TurnPart, labels_for, loss_mask_table, part_of
from peftchat.chat_template.text_encoder import special_tokens
from peftchat.conversation import Conversation, Message
from tests.support.borders import check_borders
from tests.support.random_text import CORPUS, conversations

spm = pytest.importorskip("sentencepiece", reason="the extra `sentencepiece` is not installed")
COUNT = 300


@pytest.fixture(scope="module", params=["bpe", "unigram"])
def model_file(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sentencepiece")
    text = folder / "corpus.txt"
    text.write_text("\n".join(line for part in CORPUS for line in part.split("\n")), encoding="utf-8")
    spm.SentencePieceTrainer.train(
        input=str(text),
        model_prefix=str(folder / request.param),
        model_type=request.param,
        vocab_size=600,
        hard_vocab_limit=False,
        byte_fallback=request.param == "bpe",
        user_defined_symbols=["<pad>"],
        minloglevel=2,
    )
    return folder / f"{request.param}.model"


def backend(model_file: Path, **options: Any) -> Any:
    from transformers.tokenization_utils_sentencepiece import SentencePieceBackend

    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    tokenizer = SentencePieceBackend(vocab_file=str(model_file), **names, **options)
    assert not tokenizer.is_fast
    return tokenizer


def by_hand(tokenizer: Any, conversation: Conversation) -> tuple[list[int], list[int]]:
    """Ids and `answers` labels through the SentencePiece library, whose pieces carry their places."""
    ids: list[int] = []
    labels: list[int] = []
    end = tokenizer.convert_tokens_to_ids("<|end|>")
    for message in conversation.messages:
        answer = message.role == "assistant"
        pieces = tokenizer.sp_model.encode("\n" + message.content, out_type="proto").pieces
        body = [piece.id for piece in pieces]
        turn = [tokenizer.convert_tokens_to_ids(f"<|{message.role}|>"), *body, end]
        trained = [False, *(piece.end > 1 or piece.begin > 0 for piece in pieces), True]
        after = tokenizer.sp_model.encode("\n")
        ids += turn + after
        labels += [token if answer and learn else -100 for token, learn in zip(turn, trained, strict=True)]
        labels += [-100] * len(after)
    return ids, labels


@pytest.mark.parametrize("legacy", [True, False])
def test_ids_and_labels_by_sentencepiece_itself(model_file: Path, legacy: bool) -> None:
    chat = make_format("starchat", None, backend(model_file, legacy=legacy))
    batch = [
        one
        for one in conversations(COUNT, ("system", "user", "assistant"), forged=False)
        # Without its dummy prefix transformers puts a word of its own before text that begins with a space.
        if not any(text.content[:1] in " ▁" or "<pad>" in text.content for text in one.messages)
    ]
    assert len(batch) > COUNT / 3
    for conversation, row in zip(batch, chat.encoder().encode(batch), strict=True):
        ids, labels = by_hand(chat.tokenizer, conversation)
        assert row.ids.tolist() == ids, conversation
        assert labels_for(row.ids, row.token_tags, loss_mask_table("answers")).tolist() == labels, conversation


@pytest.mark.parametrize("kind", ["legacy", "modern", "gpt-sw3", "bytes"])
def test_stock_ids_and_no_forged_tokens(model_file: Path, kind: str) -> None:
    from transformers import ByT5Tokenizer, GPTSw3Tokenizer

    if kind == "bytes":
        tokenizer = ByT5Tokenizer()
    elif kind == "gpt-sw3":
        tokenizer = GPTSw3Tokenizer(vocab_file=str(model_file), eos_token="</s>")
    else:
        tokenizer = backend(model_file, legacy=kind == "legacy")
    chat = make_format("chatml", "", tokenizer)
    encoder = chat.encoder()
    special = set(special_tokens(chat.tokenizer).values()) - {chat.tokenizer.unk_token_id}
    turn = [chat.tokenizer.convert_tokens_to_ids(token) for token in ("<|im_start|>", "<|im_end|>")]
    for conversation in conversations(COUNT):
        (row,) = encoder.encode([conversation])
        turns = len(conversation.messages)
        turns += not (turns and conversation.messages[0].role == "system")
        assert [number for number in row.ids.tolist() if number in special] == turn * turns, conversation
        if conversation.messages and not row.special_token_text:
            stock = chat.tokenizer.apply_chat_template(conversation.as_dicts(), return_dict=False)
            if row.ids.tolist() != stock:
                header = chat.tokenizer.encode("<|im_start|>assistant\n", add_special_tokens=False)
                check_borders(chat.tokenizer, row, stock, header)


def test_a_message_of_special_tokens(model_file: Path) -> None:
    chat = make_format("starchat", None, backend(model_file))
    text = "<pad></s><|end|>"
    (row,) = chat.encoder().encode([Conversation((Message("assistant", text),))])
    content = [
        number
        for number, value in zip(row.ids.tolist(), row.token_tags, strict=True)
        if part_of(int(value)) == TurnPart.CONTENT
    ]
    assert chat.tokenizer.sp_model.decode(content).replace(" ", "").endswith("<|end|>")
    assert not set(content) & (set(special_tokens(chat.tokenizer).values()) - {chat.tokenizer.unk_token_id})
    assert row.special_token_text == 3


def test_an_ordinary_added_token_stays_one_token(model_file: Path) -> None:
    from tokenizers import AddedToken

    tokenizer = backend(model_file)
    tokenizer.add_tokens([AddedToken("<think>", special=False)])
    chat = make_format("starchat", None, tokenizer)
    (row,) = chat.encoder().encode([Conversation((Message("user", "Hello<think>you"),))])
    assert tokenizer.convert_tokens_to_ids("<think>") in row.ids
    stock = chat.tokenizer.apply_chat_template([{"role": "user", "content": "Hello<think>you"}], return_dict=False)
    assert row.ids.tolist() == stock


def test_spans_by_bytes_are_those_by_offsets() -> None:
    from peftchat.chat_template.text_encoder import FastTextEncoder
    from tests.support.tokenizers import built

    tokenizer = built("byte-level-digits").tokenizer
    encoder = FastTextEncoder(tokenizer, special_tokens(tokenizer))
    draw = random.Random(1)
    words = ["日本", "naïve", " ", "\n\n", "🎉", "hello world", "", "x", "12", "e\u0301", "\u00a0"]
    texts = [
        ["".join(draw.choices(words, k=draw.randint(0, 4))) for _ in range(draw.randint(1, 5))] for _ in range(900)
    ]
    by_bytes = encoder.encode_spans(texts, at_start=False)
    assert encoder._byte_level
    assert by_bytes == encoder._encode_with_offsets(encoder._inner, texts)


def test_spans_by_prefix_agree_with_spans_by_offsets() -> None:
    """The way for tokenizers without offsets, on a tokenizer that has them."""
    from peftchat.chat_template.text_encoder import FastTextEncoder, SlowTextEncoder
    from tests.support.tokenizers import built

    tokenizer = built("byte-level-digits").tokenizer
    special = special_tokens(tokenizer)
    rust, slow = FastTextEncoder(tokenizer, special), SlowTextEncoder(tokenizer, special)
    contents = [message.content for one in conversations(COUNT, forged=False) for message in one.messages]
    texts = [["user\n", one, " ", "\nmore"] for one in itertools.islice(filter(None, contents), 400)]
    by_offsets, by_prefix = (one.encode_spans(texts, at_start=False) for one in (rust, slow))
    assert [one.ids for one in by_offsets] == [one.ids for one in by_prefix]
    share = np.mean([one.spans == other.spans for one, other in zip(by_offsets, by_prefix, strict=True)])
    assert share > 0.95
