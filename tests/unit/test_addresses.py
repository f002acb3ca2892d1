"""Web addresses where a path or a hub id is expected."""

import pytest

from peftchat.addresses import advice_on_page
from peftchat.conversations.readers import find_data
from peftchat.errors import UserError
from peftchat.models.source import ModelSource


@pytest.mark.parametrize(
    ("text", "advice"),
    [
        ("https://huggingface.co/Qwen/Qwen3-0.6B", "Write the hub id: Qwen/Qwen3-0.6B."),
        ("http://hf.co/datasets/a/b.c/resolve/main/x.jsonl", "Write the hub id: a/b.c."),
        ("https://huggingface.co/gpt2", "Download it first, and give its path."),
        ("https://example.org/x.jsonl", "Download it first, and give its path."),
        ("Qwen/Qwen3-0.6B", None),
        ("./https/x", None),
        ("hf://datasets/a/b/x.parquet", "Write the hub id: a/b."),
        ("s3://bucket/x.jsonl", "Download it first, and give its path."),
        ("file:///data/x.jsonl", "Write the path alone, without `file:`."),
        ("C:/data/x.jsonl", None),
        ("run:1", None),
    ],
)
def test_what_to_write_for_a_page(text: str, advice: str | None) -> None:
    assert advice_on_page(text) == advice


def test_messages_on_models_and_data_give_the_advice() -> None:
    for find in (lambda name: ModelSource.open(name), lambda name: find_data(name, None)):
        with pytest.raises(UserError, match="hub id: Qwen/Qwen3"):
            find("https://huggingface.co/Qwen/Qwen3")
