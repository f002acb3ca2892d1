"""Random conversations come through `data prepare` unchanged, out of every kind of file.

The test writes JSON by itself, number by number, and reads what was written with the `json` module.
"""

import csv
import gzip
import json
import os
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from peftchat.conversation import Conversation
from peftchat.conversations import ProblemLog, read_conversations
from peftchat.conversations.prepare import PrepareOptions, prepare

EXAMPLES = int(os.environ.get("PEFTCHAT_TEST_EXAMPLES", "40"))

HOSTILE = [
    *(
        "<|im_end|>",
        "<|im_start|>assistant\n",
        "</tool_call>",
        "<think>",
        "### Human:",
        "USER:",
        "\ufeffBOM",
        "\u2028\u2029\x85",
    ),
    *(
        "\r\n",
        "\r",
        "\t",
        "\x01\x1b[31m",
        '"',
        "'",
        "\\",
        "\\n",
        "\\u0041",
        "{",
        "[{",
        "]",
        ",",
        ";",
        "|",
        "\N{NO-BREAK SPACE}",
    ),
    *(
        "\N{GRINNING FACE}",
        "e\u0301",
        "\N{LATIN SMALL LETTER E WITH ACUTE}",
        "\u200d",
        "\u202e",
        "中文",
        "العربية",
        "null",
        "NaN",
    ),
    *(
        "007",
        "1.50",
        "1E5",
        "-0",
        "    indented",
        "```json\n{}\n```",
        "a" * 300,
        "\n\n",
        " ",
        "nan",
        "#",
        "=1+1",
        "\x7f",
        "\U0010ffff",
    ),
]
NUMBERS = [
    "0",
    "-0",
    "1.50",
    "1E5",
    "1e-7",
    "-0.0",
    "2.0",
    "100",
    "12345678901234567890123",
    "1" * 60,
    "0.1e+400",
    "9007199254740993",
]


@dataclass(frozen=True)
class Written:
    """A value as JSON text, and the same in one spelling: `, ` and `: `, no escapes, numbers as they are."""

    text: str
    plain: str


class Maker:
    """Random conversations, each the fields of a record as `Written`."""

    def __init__(self, seed: int, *, is_typed: bool) -> None:
        self.random = random.Random(seed)
        self.is_typed = is_typed

    def words(self, *, may_be_blank: bool = False) -> str:
        text = "".join(self.random.choices([*HOSTILE, "word ", "Hello", "x"], k=self.random.randint(1, 5)))
        return text if text.strip() or may_be_blank else f"{text}."

    def maybe(self, share: float = 0.5) -> bool:
        return self.random.random() < share

    def string(self, text: str) -> Written:
        return Written(json.dumps(text, ensure_ascii=self.maybe()), json.dumps(text, ensure_ascii=False))

    def value(self, depth: int = 0) -> Written:
        kind = self.random.choice(["number", "text", "word", "list", "object"][: 5 if depth < 2 else 3])
        if kind == "number":
            number = self.random.choice(NUMBERS)
            return Written(number, number)
        if kind == "text":
            return self.string(self.words(may_be_blank=True))
        if kind == "word":
            word = self.random.choice(["true", "false", "null"])
            return Written(word, word)
        if kind == "list":
            items = [self.value(depth + 1) for _ in range(self.random.randint(0, 3))]
            return Written(
                f"[{self.comma().join(item.text for item in items)}]", f"[{', '.join(item.plain for item in items)}]"
            )
        return self.object(
            {self.words(may_be_blank=True): self.value(depth + 1) for _ in range(self.random.randint(0, 3))}
        )

    def comma(self) -> str:
        return self.random.choice([",", ", ", " ,  "])

    def object(self, fields: dict[str, Written]) -> Written:
        names = {name: self.string(name) for name in fields}
        colon = self.random.choice([":", ": ", " : "])
        text = self.comma().join(f"{names[name].text}{colon}{value.text}" for name, value in fields.items())
        plain = ", ".join(f"{names[name].plain}: {value.plain}" for name, value in fields.items())
        return Written(f"{{{text}}}", f"{{{plain}}}")

    def list_of(self, items: list[Written]) -> Written:
        return Written(f"[{','.join(item.text for item in items)}]", f"[{', '.join(item.plain for item in items)}]")

    def call(self) -> Written:
        arguments = self.object({self.words(): self.value() for _ in range(self.random.randint(0, 3))})
        if self.is_typed or self.maybe(0.3):
            arguments = self.string(arguments.text)
        function = self.object({"name": self.string(self.words()), "arguments": arguments})
        fields = {"type": self.string("function"), "function": function}
        return self.object({"id": self.string(self.words()), **fields} if self.maybe() else fields)

    def flag(self) -> dict[str, Written]:
        return (
            {"train": Written(word, word)}
            if self.maybe(0.3) and (word := self.random.choice(["true", "false"]))
            else {}
        )

    def turns(self, start: str) -> list[dict[str, Written]]:
        turns = [{"role": self.string("system"), "content": self.string(self.words())}] if self.maybe(0.3) else []
        for number in range(self.random.randint(1, 3)):
            name = {"name": self.string(self.words())} if self.maybe(0.2) else {}
            asked = self.string(f"{start if number == 0 else ''}{self.words()}")
            turns.append({"role": self.string("user"), "content": asked, **name, **self.flag()})
            thought = {"reasoning_content": self.string(self.words())} if self.maybe(0.3) else {}
            if self.maybe(0.4):
                calls = [self.call() for _ in range(self.random.randint(1, 2))]
                said = self.string(self.random.choice(["", self.words()]))
                turn = {"role": self.string("assistant"), "content": said, **thought, "tool_calls": self.list_of(calls)}
                turns.append({**turn, **self.flag()})
                for _ in calls:
                    result = {"role": self.string("tool"), "content": self.string(self.words(may_be_blank=True))}
                    turns.append(
                        {**result, "tool_call_id": self.string(self.words()), "name": self.string(self.words())}
                    )
                thought = {}
            turns.append(
                {"role": self.string("assistant"), "content": self.string(self.words()), **thought, **self.flag()}
            )
        return turns

    def record(self, number: int) -> dict[str, Any]:
        """The fields of a record; `messages` is a list of turns, each a dictionary of fields."""
        record: dict[str, Any] = {"messages": self.turns(f"{number} ")}
        if self.maybe():
            tools = [self.object({"name": self.string(self.words()), "parameters": self.value()}) for _ in range(2)]
            record["tools"] = self.list_of(tools)
        for name in ("id", "lang", "source", "my note"):
            if self.maybe():
                record[name] = self.string(self.words())
        if not self.is_typed and self.maybe():
            record["extra"] = self.object({"inner": self.value()})
        return record


def line_of(maker: Maker, record: dict[str, Any]) -> str:
    turns = maker.list_of([maker.object(turn) for turn in record["messages"]])
    return maker.object({**record, "messages": turns}).text


Records = list[dict[str, Any]]


def write_lines(path: Path, maker: Maker, records: Records) -> None:
    data = "".join(line_of(maker, record) + "\n" for record in records).encode()
    if path.suffix == ".zst":
        with pyarrow.CompressedOutputStream(str(path), "zstd") as file:
            file.write(data)
    else:
        path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


def write_array(path: Path, maker: Maker, records: Records) -> None:
    lines = (line_of(maker, record) for record in records)
    path.write_bytes(("[" + " ,\n".join(lines) + "]\n").encode())


def texts_of(record: dict[str, Any]) -> dict[str, str]:
    """The fields as a table of text has them: texts as they are, anything else as JSON text."""
    turns = ",".join(
        "{" + ",".join(f'"{name}": {value.text}' for name, value in turn.items()) + "}" for turn in record["messages"]
    )
    texts = {
        name: value.text if name == "tools" else json.loads(value.text)
        for name, value in record.items()
        if name != "messages"
    }
    return {"messages": f"[{turns}]", **texts}


def write_csv(path: Path, maker: Maker, records: Records) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        columns = ["messages", "tools", "id", "lang", "source", "my note"]
        writer = csv.DictWriter(file, columns, delimiter="\t" if path.suffix == ".tsv" else ",")
        writer.writeheader()
        writer.writerows(texts_of(record) for record in records)


def table_of_text(records: Records) -> pyarrow.Table:
    return pyarrow.Table.from_pylist([texts_of(record) for record in records], TEXTS)


def table_of_structs(records: Records) -> pyarrow.Table:
    """Turns, calls and their fields as structs, which Arrow fills with nulls."""
    rows = []
    for record in records:
        turns = [{name: json.loads(value.text) for name, value in turn.items()} for turn in record["messages"]]
        rows.append({**texts_of(record), "messages": turns})
    return pyarrow.Table.from_pylist(rows, STRUCTS)


_TEXT = pyarrow.string()
TEXTS = pyarrow.schema([(name, _TEXT) for name in ("messages", "tools", "id", "lang", "source", "my note")])
_CALL = pyarrow.struct(
    [("id", _TEXT), ("type", _TEXT), ("function", pyarrow.struct([("name", _TEXT), ("arguments", _TEXT)]))]
)
_TURN = pyarrow.struct(
    [
        *((name, _TEXT) for name in ("role", "content", "reasoning_content", "tool_call_id", "name")),
        ("tool_calls", pyarrow.list_(_CALL)),
        ("train", pyarrow.bool_()),
    ]
)
STRUCTS = pyarrow.schema(
    [("messages", pyarrow.list_(_TURN)), *((field.name, field.type) for field in TEXTS if field.name != "messages")]
)


def write_parquet_of_text(path: Path, maker: Maker, records: Records) -> None:
    pyarrow.parquet.write_table(table_of_text(records), path)


def write_parquet_of_structs(path: Path, maker: Maker, records: Records) -> None:
    pyarrow.parquet.write_table(table_of_structs(records), path)


def write_arrow(path: Path, maker: Maker, records: Records) -> None:
    table = table_of_structs(records)
    with pyarrow.OSFile(str(path), "wb") as file, pyarrow.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)


def write_saved(path: Path, maker: Maker, records: Records) -> None:
    from datasets import Dataset

    Dataset(table_of_structs(records)).save_to_disk(path)


@dataclass(frozen=True)
class Kind:
    """A kind of file: how the test writes it, and whether its columns have types, so that values are text there."""

    name: str
    write: Callable[[Path, Maker, Records], None]
    is_typed: bool = False


KINDS = [
    Kind("lines.jsonl", write_lines),
    Kind("lines.ndjson", write_lines),
    Kind("lines.jsonl.gz", write_lines),
    Kind("lines.jsonl.zst", write_lines),
    Kind("array.json", write_array),
    Kind("text.csv", write_csv, True),
    Kind("text.tsv", write_csv, True),
    Kind("text.parquet", write_parquet_of_text, True),
    Kind("structs.parquet", write_parquet_of_structs, True),
    Kind("structs.arrow", write_arrow, True),
    Kind("saved", write_saved, True),
]


class Spelled(str):
    """A number of a JSON text, as it is spelled."""


def parse(text: str) -> Any:
    return json.loads(text, parse_float=Spelled, parse_int=Spelled)


def expected_row(record: dict[str, Any]) -> dict[str, Any]:
    """What `data prepare` has to write for a record: its own fields, in one spelling."""
    turns = [{name: parse(value.plain) for name, value in turn.items()} for turn in record["messages"]]
    others = {name: parse(value.plain) for name, value in record.items() if name != "messages"}
    return {"messages": turns, **others}


def in_one_spelling(row: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if value not in (None, "")}


def check_read(one: Conversation, record: dict[str, Any]) -> None:
    """Check what the reader made of a record, spelling by spelling."""
    assert one.tools == (record["tools"].plain if "tools" in record else None)
    for message, turn in zip(one.messages, record["messages"], strict=True):
        said = {name: parse(value.plain) for name, value in turn.items() if name != "tool_calls"}
        read = [message.role, message.content, message.reasoning, message.tool_call_id, message.name, message.train]
        names = ("role", "content", "reasoning_content", "tool_call_id", "name", "train")
        assert read == [said.get(name) for name in names]
        calls = parse(turn["tool_calls"].plain) if "tool_calls" in turn else []
        for call, written in zip(message.tool_calls, calls, strict=True):
            assert (call.name, call.id) == (written["function"]["name"], written.get("id"))
            arguments = written["function"]["arguments"]
            assert call.as_text == isinstance(arguments, str)
            assert parse(call.arguments) == (parse(arguments) if call.as_text else arguments)
            assert call.as_text is False or call.arguments == arguments
            assert call.as_text or f'"arguments": {call.arguments}}}' in turn["tool_calls"].plain


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_random_conversations_come_through_unchanged(tmp_path: Path, kind: Kind) -> None:
    maker = Maker(len(kind.name), is_typed=kind.is_typed)
    records = [maker.record(number) for number in range(EXAMPLES)]
    source, output = tmp_path / kind.name, tmp_path / "prepared"
    kind.write(source, maker, records)
    card = prepare(str(source), output, PrepareOptions(eval_fraction=0))
    assert not card.problems, card.examples
    assert not card.skipped
    assert card.train.conversations == EXAMPLES
    assert not card.unused.keys() - {"extra", "my note"}

    first, second = (
        list(read_conversations(path, problems=ProblemLog(strict=True))) for path in (source, output / "train.jsonl")
    )
    for one, again, record in zip(first, second, records, strict=True):
        check_read(one, record)
        assert (again.messages, again.tools) == (one.messages, one.tools)
    written = (output / "train.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
    for line, record, one in zip(written, records, first, strict=True):
        assert {"source": one.source, **in_one_spelling(expected_row(record))} == in_one_spelling(parse(line))


def test_held_out_conversations_are_the_rest(tmp_path: Path) -> None:
    maker = Maker(1, is_typed=False)
    records = [maker.record(number) for number in range(EXAMPLES)]
    write_lines(tmp_path / "lines.jsonl", maker, records)
    prepare(str(tmp_path / "lines.jsonl"), tmp_path / "prepared", PrepareOptions(eval_fraction=0.3))
    rows = []
    for name in ("train", "eval"):
        text = (tmp_path / "prepared" / f"{name}.jsonl").read_text(encoding="utf-8")
        rows += [parse(line)["messages"] for line in text.split("\n")[:-1]]
    expected = [expected_row(record)["messages"] for record in records]
    assert sorted(rows, key=repr) == sorted(expected, key=repr)


def test_prepared_files_stay_as_they_are(tmp_path: Path) -> None:
    """What `data prepare` makes of its own output is the same, byte by byte."""
    maker = Maker(2, is_typed=False)
    records = [maker.record(number) for number in range(EXAMPLES)]
    write_lines(tmp_path / "lines.jsonl", maker, records)
    options = PrepareOptions(eval_fraction=0)
    prepare(str(tmp_path / "lines.jsonl"), tmp_path / "one", options)
    prepare(str(tmp_path / "one" / "train.jsonl"), tmp_path / "two", options)
    assert (tmp_path / "one" / "train.jsonl").read_bytes() == (tmp_path / "two" / "train.jsonl").read_bytes()


@pytest.mark.parametrize("name", ["mixed.parquet", "mixed"])
def test_turns_that_datasets_stores_as_json_come_through(tmp_path: Path, name: str) -> None:
    """`datasets` gives objects of mixed fields, such as calls with other arguments each, the type `arrow.json`."""
    from datasets import Dataset

    def row(arguments: dict[str, Any], schema: dict[str, Any]) -> dict[str, Any]:
        call = {"type": "function", "function": {"name": "find", "arguments": arguments}}
        turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
        tool = {"type": "function", "function": {"name": "find", "parameters": {"properties": schema}}}
        return {"messages": turns, "tools": [tool]}

    rows = [row({"a": 1, "none": None}, {"a": {"type": "integer"}}), row({"b": [1.5, "x"]}, {"b": {"type": "array"}})]
    mixed = Dataset.from_list(rows, on_mixed_types="use_json")
    path = tmp_path / name
    mixed.to_parquet(path) if path.suffix else mixed.save_to_disk(path)
    found = list(read_conversations(path))
    for one, wanted in zip(found, rows, strict=True):
        (call,) = one.messages[1].tool_calls
        assert json.loads(call.arguments) == wanted["messages"][1]["tool_calls"][0]["function"]["arguments"]
        assert json.loads(one.tools or "") == wanted["tools"]


def test_turns_as_maps(tmp_path: Path) -> None:
    turns = pyarrow.list_(pyarrow.map_(pyarrow.string(), pyarrow.string()))
    rows = [[[("role", "user"), ("content", "q")], [("role", "assistant"), ("content", "a")]]]
    pyarrow.parquet.write_table(pyarrow.table({"messages": pyarrow.array(rows, turns)}), tmp_path / "maps.parquet")
    (one,) = read_conversations(tmp_path / "maps.parquet")
    assert [(message.role, message.content) for message in one.messages] == [("user", "q"), ("assistant", "a")]


def test_turns_as_a_list_of_json_texts(tmp_path: Path) -> None:
    turns = ['{"role": "user", "content": "q"}', '{"role": "assistant", "content": "{\\"a\\": 1.50}"}']
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"messages": turns}]), tmp_path / "texts.parquet")
    (one,) = read_conversations(tmp_path / "texts.parquet")
    assert [message.content for message in one.messages] == ["q", '{"a": 1.50}']


def test_a_preference_file_of_whole_texts_is_read_turn_by_turn(tmp_path: Path) -> None:
    text = "\n\nHuman: one\n\nAssistant: two\n\nlines\n\nHuman: three\n\nAssistant: four"
    (tmp_path / "rows.jsonl").write_text(json.dumps({"chosen": text, "rejected": "x"}), encoding="utf-8")
    (one,) = read_conversations(tmp_path / "rows.jsonl")
    said = [(message.role, message.content) for message in one.messages]
    assert said == [("user", "one"), ("assistant", "two\n\nlines"), ("user", "three"), ("assistant", "four")]
