"""Every kind of file gives the same conversations, in memory that does not depend on the file."""

import csv
import gzip
import json
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from peftchat.conversation import Conversation, Message
from peftchat.conversations import ProblemLog, ReadOptions, read_conversations
from peftchat.conversations.readers import json_values
from peftchat.errors import UserError

ROWS = [{"prompt": f"Question {i} … ¿qué? 你好", "completion": f"Answer {i}\nin two lines 🙂"} for i in range(30)]
EXPECTED = [(Message("user", row["prompt"]), Message("assistant", row["completion"])) for row in ROWS]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)


def write_csv(path: Path) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["prompt", "completion"])
        writer.writeheader()
        writer.writerows(ROWS)


WRITERS = {
    "rows.jsonl": lambda path: path.write_text(LINES, encoding="utf-8"),
    "bom.jsonl": lambda path: path.write_text(LINES, encoding="utf-8-sig"),
    "blank.jsonl": lambda path: path.write_text("\n" + LINES.replace("\n", "\r\n\r\n") + "\n\n", encoding="utf-8"),
    "rows.jsonl.gz": lambda path: path.write_bytes(gzip.compress(LINES.encode())),
    "ROWS.JSONL.GZ": lambda path: path.write_bytes(gzip.compress(LINES.encode())),
    "rows.json": lambda path: path.write_text(json.dumps(ROWS), encoding="utf-8"),
    "pretty.json": lambda path: path.write_text(json.dumps(ROWS, indent=4, ensure_ascii=False), encoding="utf-8-sig"),
    "lines.json": lambda path: path.write_text(LINES, encoding="utf-8"),
    "rows.parquet": lambda path: parquet.write_table(pyarrow.Table.from_pylist(ROWS), path, row_group_size=7),
    "rows.csv": write_csv,
}


def messages(stream: Any) -> list[tuple[Message, ...]]:
    return [conversation.messages for conversation in stream]


@pytest.mark.parametrize("name", WRITERS)
def test_every_kind_of_file_gives_the_same_conversations(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    WRITERS[name](path)
    found = list(read_conversations(path))
    assert messages(found) == EXPECTED
    assert len({conversation.source for conversation in found}) == len(ROWS)
    assert all(conversation.source.startswith(f"{path}:") for conversation in found)


@pytest.mark.parametrize("piece", [1, 2, 7, 64, 1000])
def test_json_is_read_the_same_in_pieces_of_any_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, piece: int
) -> None:
    rows = [*ROWS, {"prompt": '\\ "é" \u2028 \x7f', "completion": "🙂" * 50, "extra": [None, True, -1.5e10, {}]}]
    expected = [(row["prompt"], row["completion"]) for row in rows]
    monkeypatch.setattr(json_values, "_PIECE", piece)
    for ascii_only in (True, False):
        (tmp_path / "a.json").write_text(json.dumps(rows, ensure_ascii=ascii_only, indent=1), encoding="utf-8")
        found = messages(read_conversations(tmp_path / "a.json"))
        assert [tuple(message.content for message in each) for each in found] == expected


def test_a_json_line_is_named_by_its_line_and_an_element_by_its_number(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("\n" + LINES)
    (tmp_path / "b.json").write_text(json.dumps(ROWS))
    assert next(read_conversations(tmp_path / "a.jsonl")).source == f"{tmp_path / 'a.jsonl'}:2"
    assert next(read_conversations(tmp_path / "b.json")).source == f"{tmp_path / 'b.json'}:1"


def test_turns_in_a_parquet_and_in_a_csv_column(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    parquet.write_table(pyarrow.Table.from_pylist([{"messages": turns}]), tmp_path / "a.parquet")
    with (tmp_path / "a.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["messages"], [json.dumps(turns)]])
    expected = [(Message("user", "a"), Message("assistant", "b"))]
    assert messages(read_conversations(tmp_path / "a.parquet")) == expected
    assert messages(read_conversations(tmp_path / "a.csv")) == expected


def test_a_folder_is_its_files_in_order_each_in_its_own_form(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "one.jsonl").write_text(LINES, encoding="utf-8")
    (tmp_path / "two.json").write_text(json.dumps([{"instruction": "a", "input": "", "output": "b"}]))
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / ".hidden.jsonl").write_text("not read")
    (tmp_path / "notes.txt").write_text("not read")
    log = ProblemLog(strict=True)
    found = messages(read_conversations(tmp_path, problems=log))
    assert found == [*EXPECTED, (Message("user", "a"), Message("assistant", "b"))]
    assert sorted(log.formats.values()) == ["alpaca", "prompt_completion"]


def test_a_folder_with_splits_gives_one_of_them(tmp_path: Path) -> None:
    for name, text in (("train-00000-of-00001", "t"), ("validation", "v"), ("quarantine", "q")):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"prompt": text, "completion": text}))

    def prompts(split: str | None) -> list[str]:
        return [found[0].content for found in messages(read_conversations(tmp_path, split=split))]

    assert prompts(None) == prompts("train") == ["t"]
    assert prompts("validation") == prompts("eval") == ["v"]
    with pytest.raises(UserError, match="splits found: eval, train"):
        prompts("test")


def test_a_long_record_is_skipped_without_being_read_into_memory(tmp_path: Path) -> None:
    path = tmp_path / "long.jsonl"
    with path.open("wb") as file:
        file.write(LINES.encode())
        file.write(b'{"prompt": "')
        for _ in range(200):
            file.write(b"x" * 2**20)
        file.write(b'", "completion": "y"}\n' + LINES.encode())
    program = textwrap.dedent(f"""
        import resource
        from peftchat.conversations import ProblemLog, read_conversations
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        log = ProblemLog()
        count = sum(1 for _ in read_conversations({str(path)!r}, problems=log))
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        print(count, dict(log.problems), log.first.where.rsplit(":", 1)[1], grown < 100_000)
    """)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == f"{2 * len(ROWS)} {{'record_too_long': 1}} {len(ROWS) + 1} True"


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.csv"])
def test_the_limit_on_a_record_holds_for_text_files(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    WRITERS[name](path)
    log = ProblemLog()
    assert messages(read_conversations(path, problems=log, options=ReadOptions(max_record_bytes=20))) == []
    assert log.total > 0


def test_a_gzip_file_that_is_cut_off_gives_its_records_and_one_problem(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl.gz"
    packed = gzip.compress("".join(json.dumps({**ROWS[0], "n": i**9}) + "\n" for i in range(5000)).encode())
    path.write_bytes(packed[: len(packed) // 2])
    log = ProblemLog()
    found = list(read_conversations(path, problems=log))
    assert found
    assert dict(log.problems) == {"broken_file": 1}
    assert log.first is not None
    assert log.first.where == f"{path}:{len(found) + 1}"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: folder / "absent.jsonl", "no such file"),
        (lambda folder: folder / "absent", "no such file"),
        (lambda folder: folder, "no data files"),
        (lambda folder: _touch(folder / "empty.jsonl"), "empty"),
        (lambda folder: _touch(folder / "blank.jsonl", b"\n \n"), "no records"),
        (lambda folder: _touch(folder / "array.json", b"[]"), "no records"),
        (lambda folder: _touch(folder / "header.csv", b"prompt,completion\n"), "no records"),
        (lambda folder: _touch(folder / "notes.txt", b"hello"), "ending"),
        (lambda folder: _touch(folder / "fake.parquet", b"PAR1 not really"), "not readable Parquet"),
        (lambda folder: _touch(folder / "fake.jsonl.gz", b"not gzip"), "gzip"),
    ],
)
def test_a_source_without_records_is_refused_in_words(tmp_path: Path, make: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        list(read_conversations(make(tmp_path)))


def test_a_hub_id_that_cannot_be_had_is_one_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    program = "from peftchat.conversations import read_conversations; list(read_conversations('nobody/nothing'))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert "UserError: nobody/nothing (split train): there is no such file or folder" in done.stderr


def _touch(path: Path, content: bytes = b"") -> Path:
    path.write_bytes(content)
    return path


def test_records_of_the_whole_file_agree_with_a_plain_reading(shared_data: Path) -> None:
    path = shared_data / "sharegpt_500.json"
    speaker = {"human": "user", "gpt": "assistant"}
    expected = [
        Conversation(
            tuple(Message(speaker[turn["from"]], turn["value"]) for turn in row["conversations"]), f"{path}:{number}"
        )
        for number, row in enumerate(json.loads(path.read_text(encoding="utf-8")), start=1)
    ]
    assert list(read_conversations(path)) == expected
