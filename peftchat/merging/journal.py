"""What a merge has finished, kept beside its shards so that a second start goes on."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

NAME = "merge_state.json"
_CHUNK = 16 << 20


@dataclass
class Journal:
    """Finished shards of one merge.

    Attributes:
        path: the file.
        plan: fingerprint of everything that decides the result; a journal of another plan is not continued.
        done: shard -> SHA-256 of the file.
    """

    path: Path
    plan: str
    done: dict[str, str] = field(default_factory=dict)

    @classmethod
    def open(cls, folder: Path, plan: str) -> "Journal":
        """The journal in `folder`, less the shards that have changed since; a new one if it is of another plan."""
        path = folder / NAME
        try:
            kept = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return cls(path, plan)
        if kept.get("plan") != plan:
            return cls(path, plan)
        done = {name: digest for name, digest in kept["shards"].items() if file_digest(folder / name) == digest}
        return cls(path, plan, done)

    def record(self, shard: str, digest: str) -> None:
        """Add a finished shard and write the journal in one step."""
        self.done[shard] = digest
        self.save()

    def save(self) -> None:
        """Write the journal in one step: the old one is there until the new one is whole."""
        text = json.dumps({"plan": self.plan, "shards": self.done}, indent=1)
        temporary = self.path.with_suffix(".part")
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(self.path)


def file_digest(file: Path) -> str:
    """SHA-256 of a file, "" if there is none."""
    if not file.is_file():
        return ""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def fingerprint(parts: Mapping[str, object]) -> str:
    """One hash of everything that decides what a merge writes."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()
