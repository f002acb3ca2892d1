"""Settings that were chosen for the user, and why."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Choice:
    """One setting that the recipe left open.

    Attributes:
        key: its name in the recipe.
        value: what was chosen, as text.
        reason: why, in a few words.
    """

    key: str
    value: str
    reason: str

    def __str__(self) -> str:
        return f"{self.key}: {self.value} ({self.reason})"
