"""How much each run may use."""

from dataclasses import dataclass
from typing import Any, Literal

from peftchat.errors import UserError

Kind = Literal["steps", "tokens", "minutes"]
_FAR = 1_000_000.0
"""Epochs that no budget reaches."""


@dataclass(frozen=True, slots=True)
class Budget:
    """A limit that is the same for all runs.

    Attributes:
        kind: what is counted; minutes are of training, without evaluation.
    """

    kind: Kind
    amount: float

    @property
    def settings(self) -> dict[str, Any]:
        """The recipe's keys that bring it about."""
        if self.kind == "steps":
            return {"training.max_steps": int(self.amount)}
        key = "training.max_tokens" if self.kind == "tokens" else "training.max_minutes"
        amount = int(self.amount) if self.kind == "tokens" else float(self.amount)
        return {"training.max_steps": -1, "training.num_train_epochs": _FAR, key: amount}

    def __str__(self) -> str:
        amount = f"{self.amount:g}" if self.kind == "minutes" else f"{int(self.amount):,}"
        return f"{amount} {self.kind}"


def parse_budget(text: str) -> Budget:
    """`steps=200`, `tokens=1e6` or `minutes=30`.

    Raises:
        InputError: anything else.
    """
    kind, _, amount = (part.strip() for part in text.partition("="))
    cure = "Write steps=N, tokens=N or minutes=N."
    if kind not in ("steps", "tokens", "minutes"):
        raise UserError(f"`{kind}` is no budget", where=f"--budget {text}", cure=cure)
    try:
        number = float(amount.replace("_", ""))
    except ValueError:
        raise UserError(f"`{amount}` is not a number", where=f"--budget {text}", cure=cure) from None
    if not 0 < number < 1e15 or (kind != "minutes" and not number.is_integer()):
        what = "must be above 0" if kind == "minutes" else "must be a whole number above 0"
        raise UserError(what, where=f"--budget {text}", cure=cure)
    return Budget(kind, number)  # type: ignore[arg-type]
