"""What a file is, by its first bytes; packed, cut and oddly written files."""

import gzip
import json
import lzma
import zipfile
from pathlib import Path

import pyarrow
import pytest
from pyarrow import ipc, parquet

from peftchat.conversations import ProblemLog, ReadOptions, read_conversations
from peftchat.conversations.prepare import PrepareOptions, prepare
from peftchat.conversations.problems import Problem
from peftchat.conversations.readers.hub import open_dataset
from peftchat.errors import UserError, VerificationError

ROWS = [{"prompt": f"Which bird is number {number}? 🐦", "completion": f"Bird {number}."} for number in range(40)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)
QUESTIONS = [row["prompt"] for row in ROWS]


def table(delimiter: str, line_end: str = "\n") -> bytes:
    lines = [f"prompt{delimiter}completion", *(f"{row['prompt']}{delimiter}{row['completion']}" for row in ROWS)]
    return "".join(line + line_end for line in lines).encode()


def zstd(data: bytes) -> bytes:
    packed: bytes = pyarrow.compress(data, codec="zstd", asbytes=True)
    return packed


def arrow(kind: str) -> bytes:
    rows = pyarrow.Table.from_pylist(ROWS)
    sink = pyarrow.BufferOutputStream()
    with (ipc.new_file if kind == "file" else ipc.new_stream)(sink, rows.schema) as writer:
        writer.write_table(rows, max_chunksize=7)
    return bytes(sink.getvalue())


GOOD = {
    "a.ndjson": LINES.encode(),
    "a.json.gz": gzip.compress(json.dumps(ROWS).encode()),
    "a.jsonl.zst": zstd(LINES.encode()),
    "two_frames.jsonl.zst": zstd(LINES[: len(LINES) // 2].encode()) + zstd(LINES[len(LINES) // 2 :].encode()),
    "a.csv.gz": gzip.compress(table(",")),
    "a.csv.zst": zstd(table(",")),
    "a.tsv": table("\t"),
    "semicolons.csv": table(";"),
    "tabs.csv": table("\t"),
    "pipes.csv": table("|"),
    "stream.arrow": arrow("stream"),
    "file.arrow": arrow("file"),
    "old_mac.jsonl": LINES.replace("\n", "\r").encode(),
    "old_mac.csv": table(",", "\r"),
    "array.jsonl": json.dumps(ROWS).encode(),
    "pretty_array.jsonl": b"\xef\xbb\xbf" + json.dumps(ROWS, indent=2).encode(),
    "array_over_lines.jsonl": ("[\n" + ",\n".join(map(json.dumps, ROWS)) + "\n]\n").encode(),
    "pretty_records.jsonl": "\n".join(json.dumps(row, indent=1) for row in ROWS).encode(),
}


@pytest.mark.parametrize("name", GOOD)
def test_a_container_gives_its_records(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(GOOD[name])
    assert [one.messages[0].content for one in read_conversations(tmp_path / name)] == QUESTIONS


def packed_zip(path: Path) -> bytes:
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("a.jsonl", LINES)
    return path.read_bytes()


WRONG = {
    ("a.jsonl", LINES.encode("utf-16")): "UTF-16",
    ("a.json", LINES.encode("utf-16-be")): "UTF-16",
    ("a.csv", table(",").decode().encode("utf-32")): "UTF-32",
    ("a.jsonl", gzip.compress(LINES.encode())): "gzip data",
    ("a.csv", zstd(table(","))): "Zstandard",
    ("a.json", lzma.compress(LINES.encode())): "xz",
    ("a.jsonl.gz", LINES.encode()): "is not gzip, although its name ends in .gz",
    ("a.jsonl.zst", LINES.encode()): "is not Zstandard",
    ("a.jsonl.zst", gzip.compress(LINES.encode())): "the file is gzip data",
    ("a.jsonl.gz", gzip.compress(LINES.encode("utf-16"))): "UTF-16",
    ("a.parquet", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"): "git-lfs pointer",
    ("a.jsonl", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"): "git-lfs pointer",
    ("a.parquet", b"<!doctype html><html>Sign in</html>"): "web page",
    ("a.json", b"\n <HTML><body>Not found</body></HTML>"): "web page",
    ("a.json", b"<?xml version='1.0'?><Error/>"): "XML",
    ("a.jsonl", b"PAR1" + b"x" * 90): "a Parquet file",
    ("a.parquet", b"ARROW1" + b"x" * 90): "an Arrow file",
    ("a.jsonl", b"\0" * 900): "NUL bytes",
    ("a.json", json.dumps({"info": "birds", "entries": ROWS}).encode()): "below the key `entries`",
    ("a.jsonl", json.dumps({"entries": ROWS}, indent=1).encode()): "below the key `entries`",
    ("a.json", json.dumps({"first": ROWS, "second": ROWS}).encode()): "below the keys `first` and `second`",
    ("a.csv", b"prompt,completion,prompt\na,b,c\n"): "the column 'prompt' twice",
}


@pytest.mark.parametrize(("name", "content"), WRONG)
def test_another_kind_of_file_is_named(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=WRONG[name, content]):
        list(read_conversations(tmp_path / name))


def test_a_zip_archive_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(packed_zip(tmp_path / "a.zip"))
    with pytest.raises(UserError, match="a zip archive, or an Excel file"):
        list(read_conversations(tmp_path / "a.csv"))


def test_one_record_with_lists_of_its_own_is_a_record(tmp_path: Path) -> None:
    record = {
        "messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}],
        "tools": [{"type": "function", "function": {"name": "greet", "parameters": {}}}],
    }
    (tmp_path / "a.json").write_text(json.dumps(record, indent=1))
    assert len(list(read_conversations(tmp_path / "a.json"))) == 1


def test_a_large_object_names_the_key_of_its_records(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps({"entries": ROWS}))
    with pytest.raises(UserError, match="below the key `entries`"):
        list(read_conversations(tmp_path / "a.json", options=ReadOptions(max_record_bytes=500)))


def missing_comma() -> str:
    elements = [json.dumps(row) for row in ROWS]
    return f"[{', '.join(elements[:25])} {', '.join(elements[25:])}]"


MANY = "".join(json.dumps({**ROWS[0], "id": number**7}) + "\n" for number in range(5_000)).encode()
CUT = {
    "comma.json": missing_comma().encode(),
    "array.json": json.dumps(ROWS).encode()[:-40],
    "bracket.json": json.dumps(ROWS).encode()[:-1],
    "lines.jsonl": LINES.encode()[:-20],
    "packed.jsonl.gz": gzip.compress(MANY)[:-2_000],
    "packed.jsonl.zst": zstd(MANY)[:-2_000],
    "packed.json.gz": gzip.compress(json.dumps(ROWS * 50).encode())[:-500],
    "packed.csv.gz": gzip.compress(table(",") * 50)[:-300],
    "quote.csv": table(",") + b'a,"b\nc,d\n',
    "rows.arrow": arrow("stream")[:-200],
}


@pytest.mark.parametrize("name", CUT)
def test_a_file_that_is_cut_is_no_success(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(CUT[name])
    options = PrepareOptions(eval_fraction=0)
    with pytest.raises(VerificationError, match=r"not read|is missing"):
        prepare(str(path), tmp_path / "out", options)
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match=r"not read|is missing"):
        list(read_conversations(path))
    card = prepare(str(path), tmp_path / "out", PrepareOptions(eval_fraction=0, keep_going=True))
    assert card.train.conversations
    assert card.problems["broken_file"] == 1
    assert card.records == card.train.conversations + sum(card.skipped.values())


def test_a_row_with_another_number_of_columns_is_one_record(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(table(",") + b"only one\nfish,swims\n")
    card = prepare(str(tmp_path / "a.csv"), tmp_path / "out", PrepareOptions(eval_fraction=0))
    assert (card.train.conversations, card.problems) == (41, {"other_columns": 1})


def test_a_parquet_row_that_is_not_utf8_costs_one_row(tmp_path: Path) -> None:
    texts = pyarrow.array([b"a", b"\xff", b"c"], pyarrow.binary()).cast(pyarrow.string(), safe=False)
    columns = {"prompt": texts, "completion": pyarrow.array(["x", "y", "z"])}
    parquet.write_table(pyarrow.table(columns), tmp_path / "a.parquet")
    log = ProblemLog()
    assert [one.messages[0].content for one in read_conversations(tmp_path / "a.parquet", problems=log)] == ["a", "c"]
    assert log.first == Problem(f"{tmp_path / 'a.parquet'}:2", "not_utf8", "a text in this row is not UTF-8")


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_a_record_above_the_limit_is_marked_as_cut(tmp_path: Path, name: str) -> None:
    rows = [{"prompt": "a", "completion": "b" * 10_000}, ROWS[0]]
    text = "\n".join(map(json.dumps, rows)) if name == "a.jsonl" else json.dumps(rows)
    (tmp_path / name).write_text(text)
    prepare(str(tmp_path / name), tmp_path / "out", PrepareOptions(eval_fraction=0, max_record_bytes=6_000))
    (record,) = map(json.loads, (tmp_path / "out" / "quarantine.jsonl").read_text().splitlines())
    assert record["cut"] is True
    assert len(record["row"]) < 5_000


def test_subset_and_split_reach_the_library(tmp_path: Path) -> None:
    for name in ("birds", "fish"):
        rows = "".join(json.dumps({"prompt": name, "completion": str(number)}) + "\n" for number in range(3))
        (tmp_path / f"{name}.jsonl").write_text(rows)
    configs = [{"config_name": name, "data_files": f"{name}.jsonl"} for name in ("birds", "fish")]
    (tmp_path / "README.md").write_text(f"---\nconfigs: {json.dumps(configs)}\n---\n")
    found = list(open_dataset(str(tmp_path), "train", "fish", None))
    assert [row["prompt"] for row in found] == ["fish"] * 3
    with pytest.raises(ValueError, match="Config name is missing"):
        open_dataset(str(tmp_path), "train", None, None)


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_a_table_with_two_columns_of_one_name_is_refused(kind: str, tmp_path: Path) -> None:
    """Arrow keeps the last one alone, without a word; of two fields in a struct it makes no object at all."""
    columns = pyarrow.Table.from_arrays(
        [pyarrow.array(["a"]), pyarrow.array(["b"]), pyarrow.array(["c"])], ["prompt", "response", "response"]
    )
    turn = pyarrow.StructArray.from_arrays(
        [pyarrow.array(["user"]), pyarrow.array(["a"]), pyarrow.array(["b"])], ["role", "content", "content"]
    )
    turns = pyarrow.table({"messages": pyarrow.ListArray.from_arrays([0, 1], turn)})
    for table, message in (
        (columns, "the column 'response' twice"),
        (turns, "'messages' have the field 'content' twice"),
    ):
        path = tmp_path / f"a.{kind}"
        if kind == "parquet":
            parquet.write_table(table, path)
        else:
            with ipc.new_file(path, table.schema) as file:
                file.write_table(table)
        with pytest.raises(UserError, match=message):
            list(read_conversations(path))
