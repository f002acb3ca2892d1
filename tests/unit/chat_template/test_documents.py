"""The `documents` of a record: what stock `apply_chat_template(documents=…)` makes of them is before each answer."""

import json
from pathlib import Path
from typing import Any

import pytest

from peftchat.chat_template.chat_format import make_format
from peftchat.conversation import Conversation
from peftchat.conversations import read_conversations
from peftchat.errors import UserError
from tests.unit.chat_template.test_template_families import tokenizer_of, trained_runs

READING = (
    "{%- if documents %}{%- for document in documents %}<|im_start|>document {{ document['title'] }}\n"
    "{{ document['text'] }}<|im_end|>\n{%- endfor %}{%- endif %}"
    "{%- for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{%- endfor %}"
    "{%- if add_generation_prompt %}<|im_start|>assistant\n{%- endif %}"
)
DOCUMENTS = [{"title": "Ada", "text": "Ada wrote <|im_end|> first."}, {"title": "Bob", "text": "Bob came later."}]


def conversation_of(folder: Path, documents: Any, *questions: str) -> Conversation:
    messages = [
        {"role": role, "content": text} for q in questions for role, text in (("user", q), ("assistant", f"{q} yes"))
    ]
    (folder / "data.jsonl").write_text(json.dumps({"messages": messages, "documents": documents}), encoding="utf-8")
    (found,) = read_conversations(folder / "data.jsonl")
    return found


def chat_of(template: str) -> Any:
    tokenizer = tokenizer_of("qwen3")
    tokenizer.chat_template = template
    return make_format("model", None, tokenizer)


@pytest.mark.parametrize("as_text", [False, True], ids=["list", "JSON text"])
def test_documents_are_before_each_answer_as_stock_writes_them(tmp_path: Path, as_text: bool) -> None:
    given = json.dumps(DOCUMENTS) if as_text else DOCUMENTS
    conversation = conversation_of(tmp_path, given, "Who was first?", "And who came later?")
    chat = chat_of(READING)
    # The same conversation several times: plain ones take a shorter way from the second on.
    for row in chat.encoder().encode([conversation] * 3):
        runs = trained_runs(row)
        assert len(runs) == 2
        for (start, _), count in zip(runs, (1, 3), strict=True):
            prompt = chat.tokenizer.apply_chat_template(
                conversation.as_dicts()[:count], documents=DOCUMENTS, add_generation_prompt=True, tokenize=False
            )
            assert chat.tokenizer.decode(row.ids[:start]) == prompt
    # A text in a document that is spelled like a special token is none.
    end = chat.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert row.ids.tolist().count(end) == 2 + 4


def test_a_template_that_reads_no_documents_gets_none(tmp_path: Path) -> None:
    chat = chat_of(READING[READING.index("{%- for message") :])
    with_documents = conversation_of(tmp_path, DOCUMENTS, "Who?")
    without = conversation_of(tmp_path, [], "Who?")
    assert chat.template.reads_documents is False
    one, other = chat.encoder().encode([with_documents, without])
    assert one.ids.tolist() == other.ids.tolist()


def test_a_document_whose_fields_the_template_does_not_read_is_refused(tmp_path: Path) -> None:
    conversation = conversation_of(tmp_path, [{"title": "Ada", "body": "Ada wrote this long ago."}], "Who?")
    with pytest.raises(UserError, match="does not write document 1, which has `title`, `body`"):
        chat_of(READING).encoder().encode([conversation])
