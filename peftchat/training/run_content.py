"""What a run is trained on and with: taken at its start, compared when it is resumed, completed while it trains."""

import threading
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from peftchat.chat_template.chat_format import ChatFormat
from peftchat.dataset.digests import example_digests, text_digest, tokenizer_digest
from peftchat.errors import UserError
from peftchat.models.base_content import base_commit, base_content, saved_files
from peftchat.models.source import ModelKind, ModelSource
from peftchat.runs.checkpoint import Checkpoint
from peftchat.runs.fingerprints import (
    DataDigest,
    Digests,
    Fingerprints,
    RunRecord,
    describe_data,
    read_data_digests,
    refuse_changes,
    write_data_digests,
)
from peftchat.runs.layout import Layout, layout_change
from peftchat.runs.resumed_settings import as_saved, fixed_settings
from peftchat.runs.run_folder import RunFolder
from peftchat.training.distributed import DistributedSetup

if TYPE_CHECKING:
    from collections.abc import Mapping

    from peftchat.dataset.cache import EncodedSplit, Split
    from peftchat.recipe import LoadedRecipe, Recipe


def pin_base(loaded: "LoadedRecipe", run_folder: RunFolder, *, resume: bool) -> "LoadedRecipe":
    """Return the recipe with the commit of a hub model as its revision.

    A resumed run takes the commit that it was started with, whatever its branch has become.

    Raises:
        UserError: the model's config cannot be loaded.
    """
    model = loaded.recipe.model
    source = ModelSource.of_recipe(loaded.recipe)
    if source.kind is not ModelKind.HUB:
        return loaded
    record = RunRecord.read(run_folder.fingerprints) if resume else None
    before = None if record is None else record.fingerprints
    if before is not None and (before.base_name, before.base_revision) == (model.name, model.revision):
        commit = before.base_commit
    else:
        commit = base_commit(source)
    if commit is None:
        return loaded
    pinned = model.model_copy(update={"revision": commit})
    return replace(loaded, recipe=loaded.recipe.model_copy(update={"model": pinned}))


@dataclass(slots=True)
class RunContent:
    """The record of a run, and its work in the background.

    Attributes:
        record: what `fingerprints.json` and each checkpoint hold.
        layout: the run's layout.
        digests: the digest of each encoded example, by split.
        fresh_optimizer: whether the optimizer's state of the checkpoint is left out.
        notes: what the user is told before training.
    """

    record: RunRecord
    layout: Layout
    digests: "Mapping[str, Digests]"
    fresh_optimizer: bool = False
    notes: tuple[str, ...] = ()
    _thread: threading.Thread | None = None

    def write(self, run_folder: RunFolder) -> None:
        """Write the record and the digests of the data."""
        self.record.write(run_folder.fingerprints)
        write_data_digests(run_folder.data_digests, self.digests)

    def marker(self) -> dict[str, Any]:
        """Return what the marker of a checkpoint holds."""
        return {"layout": self.layout.as_dict(), "fingerprints": self.record.fingerprints.model_dump()}

    def read_base(self, source: ModelSource, run_folder: RunFolder) -> None:
        """Begin to read every byte of the base, in a thread beside training.

        The base has just been loaded, so the system still has most of it in memory.
        """

        def read() -> None:
            try:
                found = base_content(source, exact=True, threads=1)
            except UserError:
                return  # Someone removes the base while it is in use; its samples are known.
            before = self.record.fingerprints
            known = {name: digest for name, digest in found.base.items() if name in before.base or not before.base}
            self.record = self.record.model_copy(
                update={"fingerprints": before.model_copy(update={"base": {**before.base, **known}})}
            )
            try:
                self.record.write(run_folder.fingerprints)
            except OSError:
                return  # Training meets the same disk and tells it.

        self._thread = threading.Thread(target=read, name="base digests", daemon=True)
        self._thread.start()

    def finish(self, run_folder: RunFolder) -> None:
        """Wait for the base to be read, and add the tokenizer and template that the run saved."""
        if self._thread is not None:
            self._thread.join()
        finished = self.record.fingerprints.model_copy(update={"saved": saved_files(run_folder.path)})
        self.record = self.record.model_copy(update={"fingerprints": finished})
        self.record.write(run_folder.fingerprints)


def open_content(
    recipe: "Recipe",
    requested_revision: str | None,
    distributed: DistributedSetup,
    chat: ChatFormat,
    splits: "Mapping[Split, EncodedSplit]",
    run_folder: RunFolder,
    checkpoint: Checkpoint | None,
    first_stage: str | None,
    *,
    resume: bool,
    allow_changed: bool,
) -> RunContent:
    """Take a run's fingerprints, and compare them with those of the run that is resumed.

    Args:
        recipe: the recipe, its base pinned.
        requested_revision: the revision that the user's recipe asks for.
        distributed: the processes of the run.
        chat: the tokenizer with its template.
        splits: the encoded examples.
        run_folder: the run folder.
        checkpoint: the checkpoint to resume from, or None.
        first_stage: the digest of the adapter that the run begins at, or None.
        resume: whether the run in the folder is to go on.
        allow_changed: whether to go on with what changed.

    Raises:
        UserError: something changed.
    """
    kept = RunRecord.read(run_folder.fingerprints) if resume else None
    before = _fingerprints_of(checkpoint) or (kept.fingerprints if kept else None)
    base = base_content(ModelSource.of_recipe(recipe), exact=before is not None and bool(before.base))
    digests = {str(split): example_digests(encoded.store) for split, encoded in splits.items()}
    now = base.model_copy(
        update={
            "base_revision": requested_revision,
            "first_stage": first_stage,
            "tokenizer": tokenizer_digest(chat.tokenizer),
            "chat_template": text_digest(chat.template.jinja),
            "data": {split: DataDigest.of(found) for split, found in digests.items()},
            "recipe": fixed_settings(as_saved(recipe), with_paths=False),
        }
    )
    layout = layout_of(recipe, distributed)
    changes = (
        [] if before is None else [*before.changes(now), *_changes_of_data(before, now, digests, splits, run_folder)]
    )
    change = None if checkpoint is None else layout_change(checkpoint, layout)
    if change is not None:
        changes += [text for text in change.changes if not _is_told(text, changes)]
    if change is not None and change.fresh_optimizer and layout.is_sharded:
        # DeepSpeed reads weights only together with the optimizer's shards.
        raise UserError(
            f"{change.changes[0]}; {layout.strategy} cannot begin with a fresh optimizer",
            where=str(checkpoint.path if checkpoint else run_folder.path),
            hint="Resume with the checkpoint's layout, or with distributed.strategy: ddp or single.",
        )
    if not allow_changed:
        refuse_changes(changes, str(run_folder.path), "Resume with what it was started with")
    fresh = change is not None and change.fresh_optimizer
    allowed = (*(kept.allowed_changes if kept else ()), *(_at_step(text, checkpoint) for text in changes))
    record = RunRecord(fingerprints=now, allowed_changes=allowed)
    return RunContent(record, layout, digests, fresh, _notes(changes, change.notes if change else (), fresh=fresh))


def layout_of(recipe: "Recipe", distributed: DistributedSetup) -> Layout:
    """Return a run's layout."""
    training = recipe.training
    examples = training.per_device_train_batch_size * training.gradient_accumulation_steps * distributed.world_size
    return Layout(distributed.strategy, distributed.world_size, recipe.distributed.offload, training.optim, examples)


def _fingerprints_of(checkpoint: Checkpoint | None) -> Fingerprints | None:
    found = None if checkpoint is None else checkpoint.record().get("fingerprints")
    try:
        return None if found is None else Fingerprints.model_validate(found)
    except ValueError:
        return None


def _changes_of_data(
    before: Fingerprints,
    now: Fingerprints,
    digests: "Mapping[str, Digests]",
    splits: "Mapping[Split, EncodedSplit]",
    run_folder: RunFolder,
) -> list[str]:
    kept = read_data_digests(run_folder.data_digests)
    changes = []
    for split in before.changed_splits(now):
        if split not in digests or split not in before.data:
            changes.append(f"{split} data: {'none' if split in before.data else 'there was none'}")
            continue
        # The file is of the time at which the run began, the checkpoint perhaps not.
        known = kept.get(split)
        if known is not None and DataDigest.of(known) != before.data[split]:
            known = None
        words, first = describe_data(split, known, digests[split])
        source = "" if first is None else f"; the first is {_short(splits[split].store[first].source)}"  # type: ignore[index]
        changes.append(words + source)
    return changes


def _short(source: str) -> str:
    return source if len(source) < 200 else f"…{source[-200:]}"


def _is_told(text: str, changes: list[str]) -> bool:
    """Return whether another change says the same: a recipe's key names the optimizer too."""
    return text.startswith("optimizer:") and any(one.startswith("recipe: training.optim:") for one in changes)


def _at_step(text: str, checkpoint: Checkpoint | None) -> str:
    return f"{text} (since step {checkpoint.step if checkpoint else 0})"


def _notes(changes: list[str], notes: tuple[str, ...], *, fresh: bool) -> tuple[str, ...]:
    lines = [f"Changed, and allowed: {text}." for text in changes]
    lines += [f"Note: {text}." for text in notes]
    if fresh:
        lines.append("The optimizer starts from zero: weights, learning rate schedule and steps carry over.")
    return tuple(lines)
