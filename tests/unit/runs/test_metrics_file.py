import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from peftchat.errors import UserError
from peftchat.runs.metrics_file import MetricsFile

scalars = st.one_of(st.floats(), st.integers(), st.text(), st.none(), st.booleans()).filter(
    lambda value: value not in ("NaN", "Infinity", "-Infinity")
)


def same(left: object, right: object) -> bool:
    if isinstance(left, float) and isinstance(right, float) and math.isnan(left):
        return math.isnan(right)
    return left == right


def refuse_constant(name: str) -> None:
    raise AssertionError(f"{name} is not JSON")


@given(lines=st.lists(st.dictionaries(st.text(), scalars)))
def test_what_is_appended_is_read_back_bit_for_bit_from_strict_json(
    lines: list[dict], tmp_path_factory: pytest.TempPathFactory
) -> None:
    file = MetricsFile(tmp_path_factory.mktemp("metrics") / "metrics.jsonl")
    for line in lines:
        file.append(line)
    read = file.read()
    assert len(read) == len(lines)
    for written, line in zip(lines, read, strict=True):
        assert written.keys() == line.keys()
        assert all(same(written[key], line[key]) for key in written)
    if lines:
        for text in file.path.read_text(encoding="utf-8").split("\n")[:-1]:
            json.loads(text, parse_constant=refuse_constant)


@given(
    steps=st.lists(st.integers(0, 30), max_size=20).map(sorted),
    cut=st.integers(-1, 31),
)
def test_after_a_resume_each_step_is_there_once(
    steps: list[int], cut: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    steps = sorted(set(steps))
    file = MetricsFile(tmp_path_factory.mktemp("metrics") / "metrics.jsonl")
    for step in steps:
        file.append({"step": step, "loss": 1.0})
    file.keep_through(cut)
    for step in steps:
        if step > cut:
            file.append({"step": step, "loss": 2.0})
    assert [line["step"] for line in file.read()] == steps
    assert all(line["loss"] == (1.0 if line["step"] <= cut else 2.0) for line in file.read())


def test_a_kill_at_any_byte_costs_the_last_line_at_most(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "metrics.jsonl")
    for step in (1, 2):
        file.append({"step": step, "note": "größer"})
    whole = file.path.read_bytes()
    first = whole.index(b"\n") + 1
    for cut in range(first, len(whole)):
        file.path.write_bytes(whole[:cut])
        assert [line["step"] for line in file.read()][:1] == [1]
        file.append({"step": 3})
        steps = [json.loads(line)["step"] for line in file.path.read_text(encoding="utf-8").splitlines()]
        # Without only its newline the second line is whole.
        assert steps == ([1, 2, 3] if cut == len(whole) - 1 else [1, 3])


def test_damage_in_the_middle_is_named_by_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": \n{"step": 3}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl:2"):
        MetricsFile(path).read()
    path.write_text('{"step": 1}\n[2]\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl:2"):
        MetricsFile(path).read()


def test_numpy_scalars_are_numbers_and_other_objects_are_refused(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "metrics.jsonl")
    file.append({"step": np.int64(3), "loss": np.float32(0.5), "bad": np.float32("inf")})
    assert file.read() == [{"step": 3, "loss": 0.5, "bad": math.inf}]
    with pytest.raises(TypeError):
        file.append({"loss": 1j})  # type: ignore[dict-item]
    assert len(file.read()) == 1


def test_nothing_is_left_beside_the_file_and_an_absent_file_is_empty(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "metrics.jsonl")
    file.keep_through(3)
    assert file.read() == []
    assert list(tmp_path.iterdir()) == []
    file.append({"step": 1})
    file.keep_through(-1)
    assert file.read() == []
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]
