"""One candidate's runs put together."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from peftchat.comparing.candidates import Candidate, Settings
from peftchat.comparing.record import Measured, Record
from peftchat.comparing.search import RATE
from peftchat.comparing.statistics import Estimate, estimate


@dataclass(frozen=True)
class Outcome:
    """What became of one candidate.

    Attributes:
        candidate: which.
        tried: a run of the first seed for each of the settings tried.
        repeats: runs of the other seeds at the best of them.
        measured: what was measured of the best run of the first seed.
    """

    candidate: Candidate
    tried: Sequence[Record] = ()
    repeats: Sequence[Record] = ()
    measured: Measured = field(default_factory=Measured)

    @property
    def best(self) -> Record | None:
        """The run of the first seed with the lowest held-out loss; None if all failed."""
        whole = [record for record in self.tried if record.failure is None]
        return min(whole, key=lambda record: record.loss, default=None)

    @property
    def settings(self) -> Settings:
        """The best of the settings tried; empty if all failed."""
        return self.best.job.settings if self.best else {}

    @property
    def runs(self) -> list[Record]:
        """The finished runs at the best settings, one a seed."""
        return [] if self.best is None else [self.best, *(one for one in self.repeats if one.failure is None)]

    @property
    def failures(self) -> list[Record]:
        """The runs that failed."""
        return [record for record in (*self.tried, *self.repeats) if record.failure is not None]

    @property
    def loss(self) -> Estimate | None:
        """Held-out loss over the seeds."""
        return estimate([record.loss for record in self.runs]) if self.runs else None

    @property
    def losses(self) -> Mapping[int, float]:
        """Held-out loss by seed."""
        return {record.job.seed: record.loss for record in self.runs}

    @property
    def seconds(self) -> float:
        """Mean training time of a run."""
        return fmean(record.seconds for record in self.runs)

    @property
    def tokens_per_second(self) -> float:
        """Mean over the runs."""
        return fmean(record.tokens_per_second for record in self.runs)

    @property
    def peak_memory_bytes(self) -> int:
        """Of the run that took the most."""
        return max(record.peak_memory_bytes for record in self.runs)

    @property
    def seconds_per_token(self) -> float:
        """Training time a token of the fastest run: whatever else a machine does can only make one slower.

        The learning rate does not matter for it, so runs that tried another one count too.
        """
        alike = [one for one in self.tried if one.failure is None and _without_rate(one) == _without_rate(self.best)]
        return min(record.seconds / max(1, record.tokens) for record in [*self.runs, *alike])

    @property
    def cost(self) -> float:
        """What training takes of a machine for each token: time times memory."""
        return self.seconds_per_token * self.peak_memory_bytes

    @property
    def edge(self) -> str | None:
        """`lowest` or `highest` where the best learning rate is at an end of those tried."""
        rates = sorted(rate for one in self.tried if isinstance(rate := one.job.settings.get(RATE), float))
        if len(rates) < 2 or self.best is None:
            return None
        best = self.settings[RATE]
        return "lowest" if best == rates[0] else "highest" if best == rates[-1] else None


def _without_rate(record: Record | None) -> dict[str, Any]:
    return {} if record is None else {key: value for key, value in record.job.settings.items() if key != RATE}
