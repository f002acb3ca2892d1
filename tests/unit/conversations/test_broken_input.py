"""Broken input of every sort: good conversations, counted problems or one `UserError`, and nothing else."""

import csv
import gzip
import io
import json
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from peftchat.conversations import ProblemLog, ReadOptions, read_conversations
from peftchat.conversations.formats import FORMATS
from peftchat.errors import UserError

TURNS = [{"role": "user", "content": "Grüße 你好"}, {"role": "assistant", "content": "Hello."}]
SEEDS: dict[str, dict[str, Any]] = {
    "messages": {"messages": TURNS},
    "sharegpt": {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
    "alpaca": {"instruction": "a", "input": "b", "output": "c", "history": [["d", "e"]], "system": "f"},
    "prompt_completion": {"prompt": "a", "completion": "b"},
    "guanaco": {"text": "### Human: a ### Assistant:", "output": "b"},
    "oasst": {
        "message_tree_id": "1",
        "tree_state": "ready_for_export",
        "prompt": {
            "message_id": "1",
            "text": "a",
            "role": "prompter",
            "lang": "en",
            "review_result": True,
            "replies": [{"message_id": "2", "text": "b", "role": "assistant", "rank": 0, "replies": []}],
        },
    },
}
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in SEEDS.values()).encode()


def table() -> pyarrow.Table:
    return pyarrow.Table.from_pylist([{"messages": TURNS}] * 50)


def as_parquet() -> bytes:
    sink = io.BytesIO()
    parquet.write_table(table(), sink)
    return sink.getvalue()


def as_csv() -> bytes:
    sink = io.StringIO(newline="")
    csv.writer(sink).writerows([["prompt", "completion"], *[["a, \n b", 'c "d"']] * 20])
    return sink.getvalue().encode()


WHOLE = {
    "a.jsonl": LINES,
    "a.jsonl.gz": gzip.compress(LINES),
    "a.json": json.dumps([SEEDS["messages"]] * 20, ensure_ascii=False).encode(),
    "a.csv": as_csv(),
    "a.parquet": as_parquet(),
}
POISON = (
    b"\x00",
    b"\xff",
    b"\xef\xbb\xbf",
    b"\xed\xa0\x80",
    b'"',
    b"\\ud800",
    b"{",
    b"]",
    b"\n",
    b"[" * 10_000,
    b"1" * 5_000,
)


def outcome(path: Path, *, strict: bool, format: str = "auto") -> UserError | ProblemLog:
    """Read everything; whatever is not a conversation, a counted problem or an `UserError` fails the test."""
    log = ProblemLog(strict=strict)
    try:
        for conversation in read_conversations(
            path, format=format, problems=log, options=ReadOptions(languages=("en", "de"), max_record_bytes=100_000)
        ):
            assert any(message.role == "assistant" for message in conversation.messages)
            for message in conversation.messages:
                message.content.encode()
                assert "\x00" not in message.content
    except UserError as error:
        str(error).encode()
        assert "\n" not in str(error)
        return error
    assert not (strict and log.total)
    return log


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    name=st.sampled_from(sorted(WHOLE)),
    wounds=st.lists(
        st.tuples(st.floats(0, 1), st.sampled_from(("cut", "insert", "overwrite", "drop")), st.sampled_from(POISON)),
        min_size=1,
        max_size=3,
    ),
    strict=st.booleans(),
)
# A line break in a field's name, which a hint shows.
@example(name="a.parquet", wounds=[(0.265625, "overwrite", b"\n")], strict=False)
def test_bytes_may_be_broken_anywhere(
    folder: Path, name: str, wounds: list[tuple[float, str, bytes]], strict: bool
) -> None:
    content = WHOLE[name]
    for place, way, poison in wounds:
        at = int(place * len(content))
        if way == "cut":
            content = content[:at]
        elif way == "insert":
            content = content[:at] + poison + content[at:]
        elif way == "overwrite":
            content = content[:at] + poison + content[at + len(poison) :]
        else:
            content = content[:at] + content[at + 7 :]
    path = folder / name
    path.write_bytes(content)
    outcome(path, strict=strict)


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-5, 5)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in a JSON value, as the keys that lead to it."""
    below = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, inner in below for place in places(inner, (*path, key)))]


@settings(max_examples=600, deadline=None)
@given(data=st.data(), name=st.sampled_from(sorted(SEEDS)), strict=st.booleans())
def test_any_value_may_stand_anywhere(folder: Path, data: st.DataObject, name: str, strict: bool) -> None:
    row = json.loads(json.dumps(SEEDS[name]))
    place = data.draw(st.sampled_from([place for place in places(row) if place]))
    target = row
    for key in place[:-1]:
        target = target[key]
    target[place[-1]] = data.draw(json_values)
    path = folder / "values.jsonl"
    path.write_text(json.dumps(row, ensure_ascii=True) + "\n", encoding="utf-8")
    outcome(path, strict=strict, format=data.draw(st.sampled_from(("auto", name, *sorted(FORMATS)))))


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b'{"prompt": "a", "completion": "b"', "not_json"),
        (b'{"prompt": "a\x00", "completion": "b"}', "nul_character"),
        (b'{"prompt": "a\\u0000", "completion": "b"}', "nul_character"),
        (b'{"prompt": "\\ud800", "completion": "b"}', "lone_surrogate"),
        (b'{"prompt": "\xff", "completion": "b"}', "not_utf8"),
        (b'{"prompt": "\xed\xa0\x80", "completion": "b"}', "not_utf8"),
        ('{"prompt": "a", "completion": "b"}'.encode("utf-16"), "not_utf8"),
        (b'{"prompt": ' + b"[" * 10_000 + b"]" * 10_000 + b', "completion": "b"}', "nested_too_deep"),
        (b'{"prompt": 1, "completion": 2}', "wrong_type"),
        (b'{"prompt": "' + b"x" * 200_000 + b'", "completion": "b"}', "record_too_long"),
        (b"null", "not_an_object"),
        (b"NaN", "not_json"),
    ],
)
@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_each_sort_of_damage_has_its_name(tmp_path: Path, name: str, content: bytes, kind: str) -> None:
    good = b'{"prompt": "a", "completion": "b"}'
    path = tmp_path / name
    path.write_bytes(b"\n".join([good, content, good]) if name == "a.jsonl" else b"[" + good + b"," + content + b"]")
    found = outcome(path, strict=False, format="prompt_completion")
    assert isinstance(found, ProblemLog)
    assert found.first is not None
    assert found.first.where == f"{path}:2"
    if name == "a.jsonl" or kind not in ("not_json", "nul_character"):
        assert found.first.kind == kind
    if name == "a.jsonl" and not content.startswith(b"\xff\xfe"):
        assert found.total == 1
