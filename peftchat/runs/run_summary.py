"""Settings that were chosen for the user, and why."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from peftchat.errors import UserError


@dataclass(frozen=True, slots=True)
class AutoSetting:
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


class NewToken(BaseModel):
    """A special token that the run added.

    `seen` counts its occurrences in the training rows; the moves are L2 distances between a row's first and last
    value, `None` where there is no such row.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    token: str
    id: int
    seen: int | None = None
    input_moved: float | None = None
    output_moved: float | None = None

    @property
    def verdict(self) -> str:
        """What the numbers say, in a word or two."""
        moves = [move for move in (self.input_moved, self.output_moved) if move is not None]
        if not self.seen:
            return "not in the data" if self.seen == 0 else "not measured"
        if not moves:
            return "not measured"
        return "learned" if all(move > 0 for move in moves) else "did not move"


class Answer(BaseModel):
    """What the model said to one prompt; `stopped` tells whether it ended its turn by itself."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    prompt: str
    answer: str
    stopped: bool | None = None


class RunSummary(BaseModel):
    """The keys of `run.json` that people are shown.

    Losses are means over supervised tokens in nats, `seconds` is wall time, memory is in bytes, shares are fractions.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    method: str | None = None
    base: str | None = None
    command: str | None = None
    started: str | None = None
    finished: str | None = None
    attention: str | None = None
    steps: int | None = None
    epochs: float | None = None
    world_size: int | None = None
    rows: int | None = None
    dropped: dict[str, int] | None = None
    special_text: int | None = None
    tokens: int | None = None
    supervised_tokens: int | None = None
    padding_fraction: float | None = None
    trainable_parameters: int | None = None
    train_loss: float | None = None
    eval_loss_before: float | None = None
    eval_loss: float | None = None
    seconds: float | None = None
    tokens_per_second: float | None = None
    peak_memory_bytes: int | None = None
    model_flops_utilisation: float | None = None
    base_vocabulary_size: int | None = None
    new_tokens: tuple[NewToken, ...] = ()
    versions: dict[str, str | None] = {}
    samples_before: tuple[Answer, ...] = ()
    samples_after: tuple[Answer, ...] = ()

    @classmethod
    def of(cls, run_json: Mapping[str, Any]) -> "RunSummary":
        """Facts of a run; a key whose value is `null` counts as absent.

        Raises:
            pydantic.ValidationError: a key holds something of another kind.
        """
        return cls.model_validate({key: value for key, value in run_json.items() if value is not None})

    @property
    def supervised_share(self) -> float | None:
        """Share of the tokens that the loss was computed on."""
        if not self.tokens or self.supervised_tokens is None:
            return None
        return self.supervised_tokens / self.tokens

    @property
    def dropped_rows(self) -> int:
        """Rows left out, for whatever reason."""
        return sum((self.dropped or {}).values())


def read_run_json(run: Path) -> dict[str, Any]:
    """`run.json` of a run folder.

    Raises:
        UserError: there is none, or it is not a JSON object.
    """
    path = run / "run.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            "this folder has no run.json", where=str(run), hint="Give the folder of a run that has finished."
        ) from None
    except ValueError as error:
        raise UserError(f"not a JSON file ({error})", where=str(path)) from None
    if not isinstance(content, dict):
        raise UserError("not a JSON object", where=str(path))
    return content


def weights_size(run: Path) -> int | None:
    """Bytes of the safetensors files that a run wrote: whole weights, or an adapter with the rows of new tokens."""
    files = [*run.glob("*.safetensors"), *run.glob("token_rows/*.safetensors")]
    sizes = [path.stat().st_size for path in files]
    return sum(sizes) if sizes else None
