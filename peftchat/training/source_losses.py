"""Training losses by file, at the beginning and at the end of a run."""

from collections.abc import Sequence

from peftchat.runs.run_summary import SourceLoss
from peftchat.training.outliers import StepConversations


class SourceLosses:
    """Sums of the training losses of each file and step."""

    def __init__(self) -> None:
        self._sums: dict[str, dict[int, tuple[int, float, float]]] = {}

    def add(self, sources: Sequence[str], step: StepConversations) -> None:
        """Add the conversations of a step.

        Args:
            sources: `file:line` of each.
            step: their losses.
        """
        for source, count, total in zip(sources, step.counts.tolist(), step.sums.tolist(), strict=True):
            file = source.rpartition(":")[0] or source
            of_file = self._sums.setdefault(file, {})
            conversations, tokens, loss = of_file.get(step.step, (0, 0.0, 0.0))
            of_file[step.step] = (conversations + 1, tokens + count, loss + total)

    def means(self) -> dict[str, SourceLoss]:
        """Return the losses of each file, in the order in which the files came."""
        steps = [number for of_file in self._sums.values() for number in of_file]
        if not steps:
            return {}
        first, last = min(steps), max(steps)
        third = (last - first + 1) / 3
        return {
            file: SourceLoss(
                conversations=sum(one[0] for one in of_file.values()),
                tokens=round(sum(one[1] for one in of_file.values())),
                first=_mean([one for number, one in of_file.items() if number < first + third]),
                last=_mean([one for number, one in of_file.items() if number > last - third]),
            )
            for file, of_file in self._sums.items()
        }


def _mean(parts: Sequence[tuple[int, float, float]]) -> float | None:
    tokens = sum(part[1] for part in parts)
    return sum(part[2] for part in parts) / tokens if tokens else None
