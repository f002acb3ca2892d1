"""What a user wants served: each folder or file, the name that clients use, and what it is made of."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peftchat.errors import UserError
from peftchat.models.source import (
    ADAPTER_CONFIG,
    MODEL_CONFIG,
    ModelKind,
    ModelSource,
    read_json,
)

GGUF_SUFFIX = ".gguf"


@dataclass(frozen=True)
class Served:
    """One model that clients can ask for.

    Attributes:
        given: as the user named it.
        name: what clients call it.
        source: the folder or hub model; None for a GGUF file.
        file: the GGUF file; None for others.
        adapter: the adapter's config; None for a full model.
    """

    given: str
    name: str
    source: ModelSource | None = None
    file: Path | None = None
    adapter: dict[str, Any] | None = None

    @property
    def dtype(self) -> str:
        """The dtype of a run's recipe; `auto` for others, which is the dtype of the weights."""
        recipe = None if self.source is None else self.source.recipe()
        return "auto" if recipe is None else recipe.recipe.model.dtype

    @property
    def saved_dtype(self) -> str | None:
        """The dtype of the weights by the config of a full model's folder; None for others, and where it names none."""
        if self.source is None or self.source.kind is not ModelKind.FULL:
            return None
        config = read_json(self.source.path / MODEL_CONFIG)
        found = config.get("dtype") or config.get("torch_dtype")
        return None if found is None or config.get("quantization_config") else str(found)

    @property
    def base(self) -> str:
        """Folder or hub id of an adapter's base.

        Raises:
            UserError: there is no such base.
        """
        assert self.source is not None
        return self.source.base().name

    @property
    def merged(self) -> "Served | None":
        """The merged model in an adapter's folder, under the same name; None if there is none."""
        if self.source is None or self.adapter is None:
            return None
        folder = self.source.path / "merged"
        if not (folder / MODEL_CONFIG).is_file():
            return None
        return Served(self.given, self.name, ModelSource.open(str(folder)))


def open_served(names: Sequence[str], *, base: str | None = None) -> list[Served]:
    """Find out what the user named, by the files alone.

    Args:
        names: run folders, model folders, hub ids or GGUF files.
        base: folder or hub id of the adapters' base; None for the one that each was trained on.

    Raises:
        UserError: there is no such model, or clients could not tell two of them apart.
    """
    found = [_open(name, base) for name in names]
    for number, one in enumerate(found):
        other = next((other for other in found[:number] if other.name == one.name), None)
        if other is not None:
            raise UserError(
                f"{other.given} and {one.given} would both be called `{one.name}`",
                where="MODEL",
                hint="Rename one of the folders.",
            )
    if base is not None and all(one.adapter is None for one in found):
        raise UserError("no model here needs a base", where=f"--base {base}", hint="Leave the option out.")
    return found


def _open(name: str, base: str | None) -> Served:
    path = Path(name)
    if path.suffix.lower() == GGUF_SUFFIX:
        if not path.is_file():
            raise UserError("there is no such file", where=name, hint="Check the path.")
        with path.open("rb") as stream:
            if stream.read(4) != b"GGUF":
                raise UserError("the file is no GGUF file", where=name, hint="Export the model again.")
        return Served(name, _client_name(path.stem), file=path)
    source = ModelSource.open(name, base=base)
    if source.kind is ModelKind.EMPTY:
        files = sorted(path.glob(f"*{GGUF_SUFFIX}"))
        if len(files) == 1:
            return _open(str(files[0]), base)
    source.require_model()
    if source.kind is ModelKind.ADAPTER:
        return Served(name, _folder_name(path), source, adapter=read_json(path / ADAPTER_CONFIG))
    if source.kind is ModelKind.HUB:
        return Served(name, name, source)
    return Served(name, _folder_name(path), source)


def _folder_name(path: Path) -> str:
    folder = path.resolve()
    return _client_name(folder.parent.name if folder.name == "merged" else folder.name)


def _client_name(text: str) -> str:
    """Return a name that needs no escaping in an address or on a command line."""
    return re.sub(r"[^\w.-]+", "-", text).strip("-") or "model"
