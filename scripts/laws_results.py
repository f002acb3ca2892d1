"""The runs of `laws.py`: a file of JSON lines, and the losses in it; other scripts import this."""

import json
import math
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from peftchat.reports.svg import Series

UNTRAINED = "untrained"
"""The row of the base's loss on general text."""


@dataclass
class Results:
    """Losses of each conversation for each setting, rate and seed. The first line says what all runs have in common.

    Attributes:
        path: the file.
        about: model, data, steps and so on.
        rows: one a run.
    """

    path: Path
    about: dict[str, Any]
    rows: dict[tuple[str, float, int], dict[str, Any]] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path, about: dict[str, Any] | None = None) -> "Results":
        """Read a file.

        Args:
            path: the file; a new one is begun if `about` is given.
            about: what the runs to come have in common; it must be what the file's own runs have.
        """
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        if not lines:
            if about is None:
                sys.exit(f"Error: {path}: no results are here. `python scripts/laws.py` writes them.")
            path.write_text(json.dumps(about) + "\n", encoding="utf-8")
            return cls(path, about)
        found = cls(path, json.loads(lines[0]))
        if about is not None and about != found.about:
            unlike = ", ".join(
                f"{key} {found.about.get(key)!r}, not {about[key]!r}"
                for key in about
                if found.about.get(key) != about[key]
            )
            sys.exit(f"Error: {path}: its runs are others ({unlike}). Give what they have, or name another file.")
        for line in lines[1:]:
            row = json.loads(line)
            found.rows[row["setting"], row["rate"], row["seed"]] = row
        return found

    def add(self, row: dict[str, Any]) -> None:
        """Keep a run."""
        self.rows[row["setting"], row["rate"], row["seed"]] = row
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    @property
    def names(self) -> list[str]:
        """The settings, in the order in which they were trained."""
        return list(dict.fromkeys(setting for setting, _, _ in self.rows if setting != UNTRAINED))

    @property
    def untrained(self) -> list[tuple[float, int]]:
        """The loss of each part of the general text before training, and its tokens."""
        return [(loss, count) for loss, count in self.rows[UNTRAINED, 0.0, 0]["general"]]

    def seeds(self, name: str) -> set[int]:
        """Return the seeds that a setting was trained with."""
        return {seed for setting, _, seed in self.rows if setting == name}

    def of(self, name: str, seeds: Iterable[int]) -> "Measured | None":
        """Return the losses of a setting at the rates that every seed has finished; None if there are none."""
        seeds = sorted(seeds)
        rows = [row for (setting, _, _), row in self.rows.items() if setting == name]
        rates = sorted({row["rate"] for row in rows})
        kept = [rate for rate in rates if all(self.rows.get((name, rate, seed), {}).get("losses") for seed in seeds)]
        if not kept or not seeds:
            return None
        chosen = [[self.rows[name, rate, seed] for rate in kept] for seed in seeds]
        losses, general = (
            np.array([[[*row[key]] for row in of_seed] for of_seed in chosen]) for key in ("losses", "general")
        )
        first = chosen[0][0]
        return Measured(name, np.array(kept), losses, np.array(first["tokens"], dtype=float), general, first["trained"])


@dataclass(frozen=True)
class Measured:
    """Losses of a setting.

    Attributes:
        name: of the setting.
        rates: shape (R,).
        losses: summed over each conversation, shape (seeds, R, conversations).
        tokens: of each conversation.
        general: loss of each part of the general text and its tokens, shape (seeds, R, parts, 2).
        trained: parameters with a gradient.
    """

    name: str
    rates: np.ndarray
    losses: np.ndarray
    tokens: np.ndarray
    general: np.ndarray
    trained: int

    def curve(self) -> np.ndarray:
        """Return the mean loss at each rate."""
        mean: np.ndarray = self.losses.sum(-1).mean(0) / self.tokens.sum()
        return mean

    @property
    def best_place(self) -> int:
        """The place of the rate with the lowest mean loss."""
        return int(np.argmin(self.curve()))

    def best(self) -> np.ndarray:
        """Return the losses at the best rate, shape (seeds, conversations)."""
        best: np.ndarray = self.losses[:, self.best_place]
        return best

    def best_general(self) -> np.ndarray:
        """Return the losses of the parts of the general text at the best rate, shape (seeds, parts)."""
        best: np.ndarray = self.general[:, self.best_place, :, 0]
        return best

    @property
    def at_edge(self) -> bool:
        """Whether the lowest loss is at the end of the grid."""
        return self.best_place in (0, len(self.rates) - 1)

    def series(self, color: int, *, of_general: bool = False) -> Series:
        """Return its curve over the logarithm of the rate: held-out loss, or loss on general text."""
        general = self.general[..., 0].sum(-1).mean(0) / self.general[0, 0, :, 1].sum()
        curve = general if of_general else self.curve()
        points = [(math.log10(rate), loss) for rate, loss in zip(self.rates, curve, strict=True)]
        return Series(self.name, points, color)
