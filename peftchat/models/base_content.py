"""The content of a base model: its commit or its files, compared with what a run was trained on."""

import hashlib
from pathlib import Path

from peftchat.console import stderr
from peftchat.errors import UserError, first_line
from peftchat.hashing import digest_files
from peftchat.models.source import (
    MODEL_CONFIG,
    WEIGHTS,
    WEIGHTS_INDEX,
    ModelKind,
    ModelSource,
    read_json,
)
from peftchat.runs.fingerprints import Fingerprints, RunRecord, refuse_changes
from peftchat.runs.run_folder import RunFolder
from peftchat.runs.run_summary import RunSummary

_SAVED = (
    "tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt", "added_tokens.json", "chat_template.jinja",
)  # fmt: skip
"""The files of a finished run that say how text becomes ids."""


def base_commit(source: ModelSource) -> str | None:
    """Return the commit of a hub model; None for a folder.

    Raises:
        UserError: its config cannot be loaded.
    """
    if source.kind is not ModelKind.HUB:
        return None
    from huggingface_hub import try_to_load_from_cache

    # Loading the config brings the cache up to date, where there is a network.
    source.config()
    found = try_to_load_from_cache(source.name, MODEL_CONFIG, revision=source.revision)
    folder = Path(found).parent if isinstance(found, str) else None
    return folder.name if folder is not None and folder.parent.name == "snapshots" else None


def base_content(source: ModelSource, *, exact: bool, threads: int | None = None) -> Fingerprints:
    """Return the fingerprints of a base: only its commit and its files.

    Args:
        source: the base. Of a hub model only files that are in the cache count.
        exact: read every byte of files that are not known yet; else a sample of them.
        threads: for reading.

    Raises:
        UserError: a file cannot be read.
    """
    try:
        digests = digest_files(_base_files(source), exact=exact, threads=threads)
    except OSError as error:
        raise UserError(f"a file cannot be read: {first_line(error)}", where=source.where) from error
    return Fingerprints(
        base_name=source.name, base_revision=source.revision, base_commit=base_commit(source), base=digests
    )


def saved_files(run: Path) -> dict[str, str]:
    """Return the digests of a run's own tokenizer and template files."""
    return {name: hashlib.sha256((run / name).read_bytes()).hexdigest() for name in _SAVED if (run / name).is_file()}


def check_run(run: ModelSource, base: ModelSource, *, allow_changed: bool, exact: bool) -> tuple[str, ...]:
    """Check that a run's base, tokenizer and template are those that it was trained with.

    Runs of older versions and adapters of other tools have no fingerprints, so nothing is checked.

    Args:
        run: the run folder.
        base: its base, as it is now.
        allow_changed: tell a change instead of refusing it.
        exact: read every byte of the base, unless it is known; else a sample of every tensor.

    Returns:
        What changed, in words.

    Raises:
        UserError: something changed.
    """
    trained = fingerprints_of(RunFolder(run.path))
    if trained is None:
        return ()
    changes = changes_since(trained, run, base, exact=exact)
    if changes and allow_changed:
        stderr.print("Changed since the run, and allowed: " + "; ".join(changes), markup=False, highlight=False)
    elif changes:
        hint = "Restore it, name the base it was trained on with `--base`"
        refuse_changes(changes, f"{run.where} on {base.name}", hint)
    return tuple(changes)


def changes_since(trained: Fingerprints, run: ModelSource, base: ModelSource, *, exact: bool) -> list[str]:
    """Return how a run's base, tokenizer and template differ from those that it was trained with, in words."""
    changes = trained.changes_of_base(base_content(base, exact=exact))
    now = saved_files(run.path) if trained.saved else {}
    changes += [
        f"the run's own {name} {'differs' if name in now else 'is missing'}"
        for name, digest in sorted(trained.saved.items())
        if now.get(name) != digest
    ]
    return changes


def fingerprints_of(run: RunFolder) -> Fingerprints | None:
    """Return what a run was trained on and with; None for runs of older versions and for other folders."""
    if run.is_finished:
        try:
            fingerprints = RunSummary.read(run).fingerprints
        except UserError:
            fingerprints = None
        if fingerprints is not None:
            return fingerprints
    record = RunRecord.read(run.fingerprints)
    return None if record is None else record.fingerprints


def _base_files(source: ModelSource) -> dict[str, Path]:
    """Return the files that the model is made of, by name."""
    if source.kind is ModelKind.HUB:
        try:
            folder = source.download(local_files_only=True)
        except UserError:
            return {}
    else:
        folder = source.path
    names = {MODEL_CONFIG, *(path.name for path in folder.glob("*.py"))}
    if (folder / WEIGHTS).is_file():
        names.add(WEIGHTS)
    elif (folder / WEIGHTS_INDEX).is_file():
        weight_map = read_json(folder / WEIGHTS_INDEX).get("weight_map")
        names |= {str(name) for name in weight_map.values()} if isinstance(weight_map, dict) else set()
    files = {name: folder / name for name in sorted(names) if (folder / name).is_file()}
    # A hub model whose weights are not in the cache is known by its commit alone.
    return files if any(name.endswith(".safetensors") for name in files) else {}
