"""Train context: the inputs of a run, opened before its model is loaded."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, date, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from peftchat.chat_template.chat_format import ChatFormat, make_format
from peftchat.console import stderr
from peftchat.dataset.cache import EncodedSplit, Split, load_splits
from peftchat.dataset.mixture import data_notes
from peftchat.errors import UserError
from peftchat.models.base_check import check_tokenizer
from peftchat.models.source import ModelSource
from peftchat.runs.checkpoint import Checkpoint
from peftchat.runs.run_folder import RunFolder
from peftchat.training.distributed import DistributedSetup, resolve_distributed
from peftchat.training.first_stage import begin_note, check_first_stage
from peftchat.training.position import Position, RunPosition
from peftchat.training.process_group import join_processes
from peftchat.training.run_content import RunContent, open_content, pin_base
from peftchat.training.several_processes import is_main_process
from peftchat.training.shared_folder import check_shared
from peftchat.training.step_numbers import name_sources

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from peftchat.recipe import LoadedRecipe, Recipe
    from peftchat.runs.run_summary import AutoSetting


@dataclass(frozen=True, slots=True)
class TrainOptions:
    """Options of a run that are not part of its recipe.

    Attributes:
        resume: continue from the last complete checkpoint, if there is one.
        allow_changed: go on with a base, tokenizer, template, data, settings or layout that changed; record it.
        prompts: user messages to answer before and after training.
        command: the command line, for the run's summary.
        auto_settings: the recipe's settings that were chosen automatically, for the run's summary.
    """

    resume: bool = False
    allow_changed: bool = False
    prompts: Sequence[str] = ()
    command: str = ""
    auto_settings: Sequence["AutoSetting"] = ()


@dataclass(slots=True)
class RunNotes:
    """What a run changed or found by itself: told in one line each, and kept for the run's summary.

    Attributes:
        lines: the lines so far.
        silent: whether they are kept and not told.
    """

    lines: list[str] = field(default_factory=list)
    silent: bool = False

    def tell(self, line: str) -> None:
        """Tell and keep a line; only the main process writes it."""
        if line in self.lines:
            return
        self.lines.append(line)
        if is_main_process() and not self.silent:
            stderr.print(f"Note: {line}", markup=False, highlight=False)


@dataclass(frozen=True, slots=True)
class TrainContext:
    """The inputs of a run, shared by every step of training.

    Attributes:
        loaded: the recipe, with the place of each key in its files.
        options: what else was asked for.
        distributed: the processes and devices of the run.
        run_folder: where the run is written.
        checkpoint: the checkpoint to resume from, or None.
        chat: the tokenizer in the recipe's chat format.
        splits: the encoded conversations of each split.
        content: fingerprints and layout of the run.
        started: when the run started.
        notes: what is told while it goes on.
        position: what this process does at present.
    """

    loaded: "LoadedRecipe"
    options: TrainOptions
    distributed: DistributedSetup
    run_folder: RunFolder
    checkpoint: Checkpoint | None
    chat: ChatFormat
    splits: Mapping[Split, EncodedSplit]
    content: RunContent
    started: datetime
    notes: RunNotes = field(default_factory=RunNotes)
    position: RunPosition = field(default_factory=RunPosition)

    @property
    def recipe(self) -> "Recipe":
        """The recipe's values."""
        return self.loaded.recipe

    @property
    def threads_given(self) -> bool:
        """Whether the environment says with how many threads a process computes."""
        return bool(os.environ.get("OMP_NUM_THREADS"))

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes and reports."""
        return is_main_process()

    def sources_at(self, position: Position) -> list[str]:
        """Return the conversations that a position names, as `file:line`."""
        split = self.splits.get(position.split)
        return position.sources(None if split is None else split.store)

    def name_sources(self, position: Position) -> str:
        """Name a few of the conversations of a position, and count them."""
        return name_sources(self.sources_at(position))


def open_context(
    loaded: "LoadedRecipe", options: TrainOptions, distributed: DistributedSetup | None = None
) -> TrainContext:
    """Check the run folder, join the process group, and load tokenizer and data.

    Args:
        loaded: the recipe.
        options: what else was asked for.
        distributed: the resolved `distributed` section; resolved here by default.

    Raises:
        UserError: the run folder, the tokenizer or the data cannot be used, or this process alone cannot run what the
            recipe asks for.
    """
    started = datetime.now(UTC)
    recipe = loaded.recipe
    distributed = distributed or resolve_distributed(loaded)
    if distributed.launcher == "torchrun":
        raise UserError(
            f"the recipe needs {distributed.world_size} processes, and this is a single one",
            where=loaded.where("distributed", "processes"),
            hint="Run `peftchat train` or torchrun, or set distributed.processes: 1.",
        )
    run_folder = RunFolder(Path(recipe.output_dir))
    checkpoint = run_folder.check_usable(recipe, resume=options.resume, allow_changed=options.allow_changed)
    store = join_processes(distributed)
    if store is not None:
        check_shared(run_folder.path, store, int(os.environ["RANK"]), distributed.world_size)
    pinned = pin_base(loaded, run_folder, resume=options.resume)
    chat = load_chat_format(pinned.recipe)
    first_stage = check_first_stage(pinned.recipe, chat)
    splits = load_splits(pinned.recipe, chat)
    content = open_content(pinned.recipe, recipe.model.revision, distributed, chat, splits, run_folder, checkpoint,
                           first_stage, resume=options.resume, allow_changed=options.allow_changed)  # fmt: skip
    if is_main_process():
        for line in content.notes:
            stderr.print(line, markup=False, highlight=False)
    context = TrainContext(pinned, options, distributed, run_folder, checkpoint, chat, splits, content, started)
    for note in begin_note(pinned.recipe):
        context.notes.tell(note)
    if checkpoint is not None:
        for step, wrong in run_folder.resumable_checkpoint()[1].items():
            context.notes.tell(f"The checkpoint of step {step} is damaged ({wrong}). The run goes on from step "
                               f"{checkpoint.step}.")  # fmt: skip
    for split, encoded in splits.items():
        for note in data_notes(pinned.recipe, split, encoded.stats):
            context.notes.tell(f"{split} data: {note}")
    return context


def check_content(loaded: "LoadedRecipe", options: TrainOptions, distributed: DistributedSetup) -> None:
    """Encode the data, and check what a resumed run is trained on, before its processes are started.

    Raises:
        UserError: as `open_context`.
    """
    run_folder = RunFolder(Path(loaded.recipe.output_dir))
    checkpoint = run_folder.check_usable(loaded.recipe, resume=options.resume, allow_changed=options.allow_changed)
    recipe = pin_base(loaded, run_folder, resume=options.resume).recipe
    chat = load_chat_format(recipe)
    first_stage = check_first_stage(recipe, chat)
    splits = load_splits(recipe, chat)
    if options.resume:
        open_content(recipe, loaded.recipe.model.revision, distributed, chat, splits, run_folder, checkpoint,
                     first_stage, resume=True, allow_changed=options.allow_changed)  # fmt: skip


def load_chat_format(recipe: "Recipe") -> ChatFormat:
    """Load the recipe's tokenizer in the recipe's chat format.

    Raises:
        UserError: it cannot be loaded, or has tokens that the model's embedding lacks.
    """
    source = ModelSource.of_recipe(recipe)
    chat = chat_format_of(recipe, source.tokenizer())
    check_tokenizer(chat.tokenizer, source, source.config(), [token.id for token in chat.new_tokens])
    return chat


def chat_format_of(recipe: "Recipe", tokenizer: "PreTrainedTokenizerBase") -> ChatFormat:
    """Return the recipe's chat format with a tokenizer, which is changed. The model's config is not needed.

    Raises:
        UserError: the tokenizer and the template do not fit.
    """
    section = recipe.chat
    return make_format(
        section.template,
        section.system,
        tokenizer,
        settings=section.template_settings,
        today=date.fromisoformat(section.template_date) if section.template_date else None,
    )
