"""What of a model's folder goes to the hub: weights, tokenizer, card. The rest stays, and secrets stop the push."""

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from peftchat.access_keys import find_access_key
from peftchat.errors import UserError
from peftchat.models.source import ADAPTER_CONFIG, ModelKind, ModelSource, read_json
from peftchat.reports.model_card import read_card

_FILES = (
    "README.md", "LICENSE", "config.json", "generation_config.json", ADAPTER_CONFIG, "tokenizer.json",
    "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "vocab.txt", "merges.txt", "chat_template.jinja", "preprocessor_config.json", "model.safetensors",
    "model.safetensors.index.json", "adapter_model.safetensors",
)  # fmt: skip
"""What loads a model or says what it is: no recipe, metrics, data, checkpoints or optimizer states."""

_SHARD = re.compile(r"model-\d+-of-\d+\.safetensors")

_SECRET_NAME = re.compile(r"TOKEN|KEY|SECRET|PASSW|CREDENTIAL", re.IGNORECASE)
_SHORTEST_SECRET = 8
_BASE_OF_CODE = re.compile(r'^(base = ")[^"]*("  # the model it was trained from)$', re.MULTILINE)
"""The line of the card's code that names the base (`peftchat.reports.model_card`)."""

_TEXTS = (".md", ".json", ".jinja", ".txt")


@dataclass(frozen=True, slots=True)
class PushFile:
    """A file of the push.

    Attributes:
        name: in the repository.
        source: on this machine.
        changed: its bytes, if they are not those of the source.
    """

    name: str
    source: Path
    changed: bytes | None = None

    @property
    def size(self) -> int:
        """Its size in bytes."""
        return self.source.stat().st_size if self.changed is None else len(self.changed)

    def content(self) -> "bytes":
        """Return its bytes."""
        return self.source.read_bytes() if self.changed is None else self.changed


def files_to_push(name: str, *, base: str | None = None) -> tuple[list[PushFile], list[str]]:
    """Return the files that are pushed, and the names of what stays.

    Args:
        name: a run folder or the folder of a model.
        base: the hub id that an adapter's base has for others.

    Raises:
        UserError: the folder holds no finished model, an adapter's base is a path of this machine, or a file holds a
            secret.
    """
    source = ModelSource.open(name, local=True)
    source.require_model()
    if source.kind is not ModelKind.ADAPTER:
        source.check_weights()
        if base is not None:
            raise UserError("the model is complete and has no base", where=f"--base {base}", hint="Leave it out.")
    folder = source.path
    chosen = [folder / file for file in _FILES if (folder / file).is_file()]
    chosen += sorted(path for path in folder.iterdir() if _SHARD.fullmatch(path.name))
    # Added tokens that a variant cannot hold have an adapter of their own.
    for config in sorted(folder.glob(f"*/{ADAPTER_CONFIG}")):
        chosen += [config, config.with_name("adapter_model.safetensors")]
    missing = [path for path in chosen if not path.is_file()]
    if missing:
        raise UserError("the file is not there", where=str(missing[0]), hint="Train or merge again.")
    files = [PushFile(path.relative_to(folder).as_posix(), path) for path in chosen]
    if source.kind is ModelKind.ADAPTER:
        files = [_with_base(file, base) if file.name.endswith(ADAPTER_CONFIG) else file for file in files]
    files = [_with_base_of_card(file, base) if file.name == "README.md" and base else file for file in files]
    _check_secrets(files, os.environ)
    pushed = {path.relative_to(folder).parts[0] for path in chosen}
    return files, sorted(path.name for path in folder.iterdir() if path.name not in pushed)


def card_of(files: Sequence[PushFile]) -> str | None:
    """Return the model card among the files."""
    for file in files:
        if file.name == "README.md":
            return (file.source.read_bytes() if file.changed is None else file.changed).decode(
                "utf-8", errors="replace"
            )
    return None


def _with_base(file: PushFile, base: str | None) -> PushFile:
    """Return the adapter's config with a base that others can load."""
    config = read_json(file.source)
    found = str(config.get("base_model_name_or_path") or "")
    if base is None and (not found or _is_path(found)):
        raise UserError(
            f"the adapter's base is a path of this machine, which nobody else can load: {found or 'none'}",
            where=str(file.source),
            hint="Give its hub id with `--base ID`, or merge the run and push the merged model.",
        )
    if base is None or base == found:
        return file
    text = json.dumps({**config, "base_model_name_or_path": base}, indent=2, sort_keys=True) + "\n"
    return PushFile(file.name, file.source, text.encode("utf-8"))


def _is_path(name: str) -> bool:
    return name.startswith((".", "~", "/")) or name.count("/") != 1 or Path(name).is_dir()


def _with_base_of_card(file: PushFile, base: str | None) -> PushFile:
    """Return the card with the base's hub id in its metadata and its code, where it names a folder."""
    card = read_card(file.source.read_text(encoding="utf-8", errors="replace"), str(file.source))
    if card.data.to_dict().get("base_model") not in (None, base):
        return file
    card.data.base_model = base  # type: ignore[attr-defined]
    card.data.base_model_relation = "adapter"  # type: ignore[attr-defined]
    card.text = _BASE_OF_CODE.sub(lambda match: f"{match[1]}{base}{match[2]}", card.text)
    return PushFile(file.name, file.source, str(card).encode("utf-8"))


def _check_secrets(files: Sequence[PushFile], environment: Mapping[str, str]) -> None:
    """Refuse a text that holds the value of a secret variable, or what looks like a key."""
    secrets = {
        value: name
        for name, value in environment.items()
        if _SECRET_NAME.search(name) and len(value) >= _SHORTEST_SECRET and not value.isdigit()
    }
    for file in files:
        if not file.name.endswith(_TEXTS) or file.name in ("tokenizer.json", "vocab.json", "merges.txt", "vocab.txt"):
            continue
        text = file.content().decode("utf-8", errors="replace")
        for value, name in secrets.items():
            if value in text:
                what = f"the file holds the value of the environment variable {name}"
                raise UserError(what, where=str(file.source), hint="Remove it there, and push again.")
        key = find_access_key(text)
        if key is not None:
            what = f"the file holds what looks like a key: {key}"
            raise UserError(what, where=str(file.source), hint="Remove it there, and push again.")
