"""Metrics file: `metrics.jsonl`, one JSON object per logged step, readable while the run goes on."""

import json
import math
import numbers
from collections.abc import Iterable, Mapping
from pathlib import Path

from peftchat.errors import UserError
from peftchat.files import write_text

Scalar = float | int | str | bool | None
"""A value of a line; a float may be NaN or infinite."""

# JSON has no such numbers. The names are those of the JSON mapping of Protocol Buffers, and Python's float() reads
# them, so a diverged loss stays visible.
_NAMED = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


class MetricsFile:
    """The metrics of one run, appended line by line and cut back when a run resumes.

    Args:
        path: the file; it is created with the first line.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, line: Mapping[str, Scalar]) -> None:
        """Append one line and flush it to the operating system.

        Floats keep all their digits; NaN and infinities are written as the strings `"NaN"`, `"Infinity"` and
        `"-Infinity"`. A half-written line of an earlier process is removed first.

        Raises:
            TypeError: a value is not a number, a string, a boolean or `None`.
        """
        text = _encode(line)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self._has_partial_line():
            self._rewrite(self.read())
        with self.path.open("a", encoding="utf-8") as file:
            file.write(text)

    def keep_through(self, step: int) -> None:
        """Delete the lines after `step`, atomically, so that a resumed run logs each step once.

        Lines without a step stay. `-1` deletes every line with a step.
        """
        if self.path.exists():
            self._rewrite(line for line in self.read() if _step(line) <= step)

    def read(self) -> list[dict[str, Scalar]]:
        """Return all complete lines, oldest first; a half-written last line is ignored.

        Raises:
            UserError: a line other than an unfinished last one is not a JSON object.
        """
        if not self.path.exists():
            return []
        *complete, rest = self.path.read_bytes().split(b"\n")
        lines = [self._decode(text, number) for number, text in enumerate(complete, start=1) if text.strip()]
        if rest:
            try:
                lines.append(self._decode(rest, len(complete) + 1))
            except UserError:
                return lines
        return lines

    def _has_partial_line(self) -> bool:
        if not self.path.exists() or self.path.stat().st_size == 0:
            return False
        with self.path.open("rb") as file:
            file.seek(-1, 2)
            return file.read(1) != b"\n"

    def _rewrite(self, lines: Iterable[Mapping[str, Scalar]]) -> None:
        write_text(self.path, "".join(_encode(line) for line in lines))

    def _decode(self, text: bytes, number: int) -> dict[str, Scalar]:
        try:
            line = json.loads(text)
        except ValueError as error:
            raise UserError(
                "this line is not JSON", where=f"{self.path}:{number}", hint="Remove the line, or the file."
            ) from error
        if not isinstance(line, dict):
            raise UserError(
                "this line is not a JSON object", where=f"{self.path}:{number}", hint="Remove the line, or the file."
            )
        return {key: _NAMED.get(value, value) if isinstance(value, str) else value for key, value in line.items()}


def _encode(line: Mapping[str, Scalar]) -> str:
    return json.dumps({key: _to_json(value) for key, value in line.items()}, allow_nan=False) + "\n"


def _to_json(value: Scalar) -> Scalar:
    # The json module does not serialize NumPy's scalars.
    if isinstance(value, numbers.Integral):
        return value if isinstance(value, bool) else int(value)
    if not isinstance(value, numbers.Real):
        return value
    number = float(value)
    if math.isfinite(number):
        return number
    if math.isnan(number):
        return "NaN"
    return "Infinity" if number > 0 else "-Infinity"


def _step(line: Mapping[str, Scalar]) -> float:
    """Return the step of a line; minus infinity without one."""
    step = line.get("step")
    return step if isinstance(step, int | float) else -math.inf
