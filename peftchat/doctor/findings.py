"""What an examination finds: a subject, how it stands, what is there, and the cure."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, Literal

Status = Literal["ok", "note", "warning", "problem"]

_SEVERITY: dict[Status, int] = {"ok": 0, "note": 1, "warning": 2, "problem": 3}


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was examined.

    Attributes:
        subject: what was examined.
        status: `ok`; `note`: a fact that limits what can be done here; `warning`: runs may fail or be slow;
            `problem`: training, or this recipe, does not work.
        found: what is there.
        cure: what to do; None where nothing is to be done.
    """

    subject: str
    status: Status
    found: str
    cure: str | None = None

    def as_json(self) -> dict[str, Any]:
        """Return the finding as a JSON object."""
        return asdict(self)


def worst(findings: Iterable[Finding]) -> Status:
    """Return the most severe status; `ok` for no findings."""
    return max((finding.status for finding in findings), key=_SEVERITY.__getitem__, default="ok")
