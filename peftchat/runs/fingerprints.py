"""Fingerprints of a run: the content of its base, tokenizer, template, data and recipe, and what has changed since."""

import hashlib
import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, ValidationError

from peftchat.errors import UserError
from peftchat.files import write_text
from peftchat.hashing import FileDigest
from peftchat.runs.resumed_settings import in_order_of_cause, shown_settings

Digests = npt.NDArray[np.uint64]

ALLOW_CHANGED = "--allow-changed"


class DataDigest(BaseModel):
    """The encoded examples of one split.

    Attributes:
        examples: their number.
        digest: of the ids and token tags of all of them, in order.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    examples: int
    digest: str

    @classmethod
    def of(cls, digests: Digests) -> Self:
        """Return the digest of examples by their own digests."""
        return cls(examples=len(digests), digest=hashlib.sha256(digests.tobytes()).hexdigest())


class Fingerprints(BaseModel):
    """What a run was trained on and with. A field that was not taken is None or empty, and is not compared.

    Attributes:
        base_name: the base's folder or hub id.
        base_revision: the revision that was asked for.
        base_commit: the commit of a hub model.
        base: the base's weight files, config and code, by name.
        first_stage: the digest of the adapter that the run began at.
        tokenizer: the digest of the tokenizer with the template's tokens.
        chat_template: the digest of the template's Jinja source.
        data: the encoded examples of each split.
        recipe: the settings that must not change, by key.
        saved: digests of the run's own tokenizer and template files, once it is finished.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    base_name: str | None = None
    base_revision: str | None = None
    base_commit: str | None = None
    base: dict[str, FileDigest] = {}
    first_stage: str | None = None
    tokenizer: str | None = None
    chat_template: str | None = None
    data: dict[str, DataDigest] = {}
    recipe: dict[str, Any] = {}
    saved: dict[str, str] = {}

    def changes_of_base(self, now: "Fingerprints") -> list[str]:
        """Return how another base differs from this one, in words."""
        if self.base_commit is not None and self.base_commit == now.base_commit:
            return []
        if self.base and now.base:
            return [f"base: {change}" for change in changed_files(self.base, now.base)]
        if self.base_commit is not None and now.base_commit is not None:
            return [f"base: commit {now.base_commit}, expected {self.base_commit}"]
        return []

    def changes(self, now: "Fingerprints") -> list[str]:
        """Return everything that another run's fingerprints differ in, in words; the data without details."""
        found = self.changes_of_base(now)
        if self.first_stage != now.first_stage:
            found.append("first stage: the run that it began at has another adapter")
        if None not in (self.tokenizer, now.tokenizer) and self.tokenizer != now.tokenizer:
            found.append("tokenizer: it encodes text in another way")
        if None not in (self.chat_template, now.chat_template) and self.chat_template != now.chat_template:
            found.append("chat template: its source differs")
        for key in in_order_of_cause(self.recipe.keys() & now.recipe.keys()):
            if now.recipe[key] != self.recipe[key]:
                before, after = shown_settings(self.recipe[key], now.recipe[key])
                found.append(f"recipe: {key}: {after}, expected {before}")
        return found

    def changed_splits(self, now: "Fingerprints") -> list[str]:
        """Return the splits whose encoded examples differ."""
        return [
            split
            for split in sorted(self.data.keys() | now.data.keys())
            if self.data and now.data and self.data.get(split) != now.data.get(split)
        ]


class RunRecord(BaseModel):
    """The fingerprints in a run folder, written when the run begins.

    Attributes:
        fingerprints: the present ones.
        allowed_changes: what changed since the run was started, and was allowed.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    fingerprints: Fingerprints
    allowed_changes: tuple[str, ...] = ()

    @classmethod
    def read(cls, path: Path) -> Self | None:
        """Read the record; None if there is none, as in runs of older versions, or if it is damaged."""
        try:
            return cls.model_validate(json.loads(path.read_bytes()))
        except (OSError, ValueError, ValidationError):
            return None

    def write(self, path: Path) -> None:
        """Write the record."""
        write_text(path, json.dumps(self.model_dump(), indent=1) + "\n")


def changed_files(before: Mapping[str, FileDigest], now: Mapping[str, FileDigest]) -> list[str]:
    """Return which of two sets of files differ, in words."""
    changes = [f"{name} is missing" for name in before if name not in now]
    changes += [f"{name} is new" for name in now if name not in before]
    changes += [f"{name} differs" for name, file in before.items() if name in now and file.differs(now[name])]
    return sorted(changes)


def describe_data(split: str, before: Digests | None, now: Digests) -> tuple[str, int | None]:
    """Return how the examples of a split differ, in words, and the index of the first new one.

    Args:
        split: its name.
        before: the digest of each example when the run began; None if it was not kept.
        now: the digest of each example.
    """
    if before is None:
        return f"{split} data: the encoded conversations differ", None
    new = ~np.isin(now, before)
    gone = int((~np.isin(before, now)).sum())
    if not new.any() and not gone:
        same = "repeated in another number" if len(before) != len(now) else "in another order"
        return f"{split} data: the conversations are the same, {same}", None
    words = f"{split} data: {int(new.sum())} of {len(now)} conversations are new or changed"
    first = int(new.argmax()) if new.any() else None
    return words + (f", and {gone} of {len(before)} are gone" if gone else ""), first


def read_data_digests(path: Path) -> dict[str, Digests]:
    """Read the digest of each example by split; empty if the file is missing or damaged."""
    try:
        with np.load(path) as file:
            return {name: file[name] for name in file.files}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return {}


def write_data_digests(path: Path, digests: Mapping[str, Digests]) -> None:
    """Write the digest of each example by split."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("wb") as file:
        np.savez(file, allow_pickle=False, **dict(digests))
    temporary.replace(path)


def refuse_changes(changes: list[str], where: str, hint: str) -> None:
    """Raise for what differs from the run, unless there is nothing.

    Raises:
        UserError: naming every difference.
    """
    if changes:
        raise UserError(
            "this is not what the run was trained with: " + "; ".join(changes),
            where=where,
            hint=f"{hint}, or add `{ALLOW_CHANGED}` to go on and record the change.",
        )
