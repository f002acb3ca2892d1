"""A large file of JSON lines that several processes read: what they write is what one process writes."""

import json
import os
import random
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from peftchat.conversations import parts_of_file
from peftchat.conversations.parts_of_file import parts_of
from peftchat.conversations.prepare import PrepareOptions, prepare
from peftchat.conversations.reading import read_and_make
from peftchat.errors import UserError
from tests.support.forks import watch_forks

RECORDS = 3_000


def turns(number: int, rng: random.Random) -> list[dict[str, object]]:
    start = "Hello" if rng.random() < 0.4 else f"{number} asks “why”"
    more = [{"role": "user", "content": f"and {number % 700}"}, {"role": "assistant", "content": "so\n" * 9}]
    return [{"role": "user", "content": start}, {"role": "assistant", "content": "x" * rng.randrange(1, 400)}, *more]


def line_of(number: int, rng: random.Random) -> bytes:
    """A record of one of many kinds, good or bad."""
    record: dict[str, object] = {"messages": turns(number, rng)}
    kind = rng.randrange(28)
    if kind == 0:
        record |= {"id": number, "big": 10**30, "price": 1.5, f"field{number % 150}": "not known"}
    elif kind == 1:
        record["messages"] = turns(number, rng)[:3]
    elif kind == 2:
        return b'{"messages": [' + b"\n"
    elif kind == 3:
        return rng.choice([b"\n", b"  \r\n", b"\xff\xfe\n", b"17\n", b'{"a": 1}\n', b"\xef\xbb\xbf" + b'{"b": NaN}\n'])
    elif kind == 4:
        record["messages"] = [*turns(number % 50, random.Random(number % 50))]
    elif kind == 5:
        call = {"type": "function", "function": {"name": "look", "arguments": '{"a": 1.50}'}}
        record["messages"] = [
            {"role": "user", "content": f"call {number}", "extra": 1},
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "content": "found"},
            {"role": "assistant", "content": "done", "train": number % 2 == 0},
        ]
    elif kind == 6:
        record["messages"] = [{"role": "wizard", "content": "?"}]
    elif kind == 7:
        record["lang"] = rng.choice(["en", "de"])
    elif kind == 8:
        record["messages"] = [{"role": "user", "content": "long"}, {"role": "assistant", "content": "y" * 60_000}]
    elif kind in (9, 10, 11):
        record["messages"] = nearly_plain(number, rng)
    return json.dumps(record, ensure_ascii=rng.random() < 0.5).encode() + b"\n"


def nearly_plain(number: int, rng: random.Random) -> list[dict[str, object]]:
    """Turns of a role and a content, of which one may be what a reader has to look at."""
    odd = ["", "  \n", "a\0b", None, 17, ["text"], [{"type": "text", "text": "part"}], " “kept” ", "\u2028", "#" * 300]
    roles = rng.choice(["ua", "sua", "uau", "usa", "ssua", "uaau", "au", "sa", "s", "a", "u", "ta", "uata", "x", ""])
    names = {"u": "user", "a": "assistant", "s": "system", "t": "tool", "x": "User "}
    made = []
    for letter in roles:
        turn = {"role": names[letter], "content": rng.choice(odd) if rng.random() < 0.2 else f"{number % 400} says"}
        if rng.random() < 0.1:
            turn = dict(reversed(turn.items()))
        if rng.random() < 0.1:
            turn |= rng.choice([{"name": None}, {"train": True}, {"name": "Ada"}, {"weight": 0}, {"note": "x"}])
        made.append(turn)
    return made


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    rng = random.Random(5)
    path = tmp_path / "mixed.jsonl"
    path.write_bytes(b"".join(line_of(number, rng) for number in range(RECORDS)) + b'{"messages": [{"role"')
    return path


def small_parts(monkeypatch: pytest.MonkeyPatch, processes: int) -> None:
    monkeypatch.setattr(parts_of_file, "SMALLEST_FILE", 1)
    monkeypatch.setattr(parts_of_file, "_PART_BYTES", 20_000)
    monkeypatch.setattr(parts_of_file, "usable_processes", lambda: processes)


def written(folder: Path) -> dict[str, bytes]:
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    card = json.loads(files.pop("card.json"))
    del card["seconds"]
    files.pop("card.md")
    return {**files, "card": json.dumps(card).encode()}


@pytest.mark.parametrize(
    "options",
    [
        PrepareOptions(keep_going=True),
        PrepareOptions(keep_going=True, languages=("de",), consecutive="merge", max_record_bytes=50_000),
        PrepareOptions(keep_going=True, max_samples=900, eval_fraction=0.5, seed=3),
    ],
)
def test_several_processes_write_what_one_writes(
    mixed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: PrepareOptions
) -> None:
    prepare(str(mixed), tmp_path / "one", options)
    small_parts(monkeypatch, 3)
    assert parts_of_file.is_read_in_parts(mixed)
    prepare(str(mixed), tmp_path / "three", options)
    assert written(tmp_path / "three") == written(tmp_path / "one")
    assert (tmp_path / "one/quarantine.jsonl").stat().st_size


def test_parts_are_all_lines_once(mixed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_parts(monkeypatch, 2)
    data, parts = mixed.read_bytes(), list(parts_of(mixed))
    assert len(parts) > 20
    assert b"".join(data[part.start : part.end] for part in parts) == data
    for part in parts:
        assert part.lines_before == data[: part.start].count(b"\n")
    assert parts[1].lines_before >= 1_000


def reading(file: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Iterator[str | None], list[int]]:
    """A file that two processes begin to read, and their ids once they are started."""
    started = watch_forks(monkeypatch)
    small_parts(monkeypatch, 2)
    stream = read_and_make(file, lambda made: (one.source for one in made), problems=parts_of_file.PartLog())
    return stream, started


def test_processes_end_with_the_reading(mixed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stream, started = reading(mixed, monkeypatch)
    for _ in range(1_500):
        next(stream)
    assert len(started) == 2
    stream.close()  # type: ignore[attr-defined]
    for pid in started:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_a_process_that_was_killed_is_an_error(mixed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stream, started = reading(mixed, monkeypatch)
    while not started:
        next(stream)
    os.kill(started[-1], signal.SIGKILL)
    with pytest.raises(UserError, match="ended from outside"):
        list(stream)


def test_what_fails_in_a_process_is_raised_here(mixed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_parts(monkeypatch, 2)
    last = f"{mixed}:2500"

    def make(conversation: object) -> str:
        place = str(getattr(conversation, "source", ""))
        if place >= last:
            raise ZeroDivisionError(place)
        return place

    with pytest.raises(ZeroDivisionError, match=r"mixed\.jsonl:"):
        list(read_and_make(mixed, lambda made: map(make, made), problems=parts_of_file.PartLog()))
