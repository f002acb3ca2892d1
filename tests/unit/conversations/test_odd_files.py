"""Files as other tools leave them: what is read although it is odd, and what is refused with its reason."""

import gzip
import json
import os
from pathlib import Path
from typing import Any

import pytest

from peftchat.conversations import ProblemLog, read_conversations
from peftchat.errors import UserError

PAIR = {"prompt": "Hi", "completion": "Hello"}
LINE = json.dumps(PAIR)
TURNS = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
TALK = [("user", "Hi"), ("assistant", "Hello")]
LONG = [*TALK, ("user", "Bye"), ("assistant", "See you")]
HH = "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Bye\n\nAssistant:"


def said(path: Path, log: ProblemLog | None = None) -> list[list[tuple[str, str]]]:
    found = read_conversations(path, problems=log)
    return [[(message.role, message.content) for message in one.messages] for one in found]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("".join(f"\ufeff{LINE}\n" for _ in range(3)), [TALK] * 3),
        (json.dumps({"messages": json.dumps(json.dumps(TURNS))}), [TALK]),
        (json.dumps({"messages": [{**TURNS[0], "role": "USER"}, {**TURNS[1], "role": "Assistant:"}]}), [TALK]),
        (f'{LINE[:-1]}, "score": NaN}}\n{LINE[:-1]}, "score": -Infinity}}', [TALK, TALK]),
        (json.dumps({"chosen": f"{HH} See you", "rejected": f"{HH} No"}), [LONG]),
        (json.dumps({"prompt": HH, "chosen": "See you", "rejected": "No"}), [LONG]),
        (json.dumps({"prompt": HH, "response": "See you"}), [LONG]),
        (json.dumps({"uuid": "u", "chat_messages": [
            {"sender": who, "text": said, "content": [{"type": "text", "text": said}]}
            for who, said in (("human", "Hi"), ("assistant", "Hello"))]}), [TALK]),
        (json.dumps({"prompt": "Human: is a word\n\nand", "response": "b"}),
         [[("user", "Human: is a word\n\nand"), ("assistant", "b")]]),
    ],
)  # fmt: skip
def test_an_odd_file_is_read(tmp_path: Path, content: str, expected: Any) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(content, encoding="utf-8")
    log = ProblemLog(strict=True)
    assert said(path, log) == expected
    assert log.notes["constants_removed"] == content.count('"score"')
    assert set(log.unused) <= {"rejected"}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", json.dumps(LINE), "an object that was encoded twice"),
        ("a.jsonl", f"{LINE},\n{LINE},\n", "a comma stands behind the record"),
        ("a.jsonl", f"{PAIR}\n", "an object of Python, with its quotes"),
        ("a.jsonl", json.dumps({"messages": str(TURNS)}), "a list of Python, with its quotes, and not JSON; write it"),
        ("a.jsonl", f'{LINE[:-1]}, "prompt": "Bye"}}', "the key 'prompt' is there twice"),
        ("a.jsonl", '{"messages": [{"content": "a", "content": "b"}]}', "the key 'content' is there twice"),
        ("a.json", f'[{LINE}, {LINE[:-1]}, "prompt": "Bye"}}]', "a.json:2: the key 'prompt' is there twice"),
        ("a.jsonl", json.dumps({"items": TURNS}), "`columns: {messages: items}` reads it"),
        ("a.jsonl", json.dumps({"data": PAIR}), "They are below the field 'data'"),
        ("a.json", json.dumps([{"data": PAIR}]), 'if type == "array" then .[] else . end'),
        ("a.jsonl", json.dumps({"text": "Once upon a time"}), "has no turns that could be told apart"),
        ("a.jsonl", json.dumps({"chosen": "Yes", "rejected": "No"}), "an answer without a question"),
        ("a.json", json.dumps({"prompt": {"0": "a", "1": "b"}, "completion": {"0": "c", "1": "d"}}), "each with its"),
        ("a.jsonl", f'{LINE[:-1]}, "scores": [NaN]}}', "not JSON"),
        ("a.json", json.dumps({"prompt": ["a", "b"], "completion": ["c", "d"]}), "columns, each a list"),
        ("a.json", json.dumps({"x1": PAIR, "x2": PAIR}), "records, each below a name"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_named(tmp_path: Path, name: str, content: str, message: str) -> None:
    path = tmp_path / name
    path.write_text(content, encoding="utf-8")
    with pytest.raises(UserError) as error:
        said(path)
    assert message in str(error.value)


@pytest.mark.parametrize("name", ["train", "weight", "label"])
@pytest.mark.parametrize("off", ["false", "False", "0"])
def test_a_flag_in_a_csv_is_text_and_a_flag_all_the_same(tmp_path: Path, name: str, off: str) -> None:
    off = "FALSE" if name == "label" else off
    path = tmp_path / "rows.csv"
    path.write_text(f" prompt ,completion,{name}\nHi,Go away,{off}\nHi,Hello,1\nHi,Well,\n")
    log = ProblemLog(strict=True)
    assert said(path, log) == [TALK, [("user", "Hi"), ("assistant", "Well")]]
    assert sum(log.skipped.values()) == 1


@pytest.mark.parametrize("mark", [";", ",", "\t"])
@pytest.mark.parametrize("start", ["", "\ufeff"])
def test_the_line_in_which_excel_names_the_delimiter_is_no_header(tmp_path: Path, mark: str, start: str) -> None:
    path = tmp_path / "rows.csv"
    path.write_text(f"{start}sep={mark}\r\nprompt{mark}completion\r\nHi{mark}Hello\r\n", encoding="utf-8", newline="")
    assert said(path) == [TALK]
    assert next(read_conversations(path)).source == f"{path}:3"


def test_a_table_with_one_name_twice_is_refused(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    columns = [pyarrow.array([text]) for text in ("Hi", "Hello", "Bye")]
    path = tmp_path / "rows.parquet"
    parquet.write_table(pyarrow.Table.from_arrays(columns, names=["prompt", "completion", "completion"]), path)
    with pytest.raises(UserError, match="the column 'completion' twice"):
        said(path)


def test_text_that_a_table_holds_as_bytes_is_text(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    turns = [{name: text.encode() for name, text in turn.items()} for turn in TURNS]
    path = tmp_path / "rows.parquet"
    parquet.write_table(pyarrow.table({"messages": [turns], "raw": [b"\xff"]}), path)
    assert said(path) == [TALK]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="named pipes are of Unix")
def test_pipes_are_told_and_never_waited_for(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(LINE)
    os.mkfifo(tmp_path / "b.jsonl")
    log = ProblemLog(strict=True)
    assert said(tmp_path, log) == [TALK]
    assert "pipe" in log.unread[str(tmp_path / "b.jsonl")]
    for path in (tmp_path / "b.jsonl", Path("/dev/null"), Path("-")):
        with pytest.raises(UserError, match="a pipe or a device"):
            said(path)


def test_data_packed_twice_is_named(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(gzip.compress(gzip.compress(LINE.encode())))
    with pytest.raises(UserError, match="packed twice"):
        said(path)


def test_text_of_another_encoding_has_its_cure(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_bytes("prompt,completion\nCafé,Ja\n".encode("cp1252"))
    with pytest.raises(UserError, match="WINDOWS-1252"):
        said(path)
