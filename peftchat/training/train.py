"""The trainer of a run, put together from its model, rows and arguments."""

import errno
import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate.utils import broadcast_object_list
from peft import PeftModel
from transformers import TrainerCallback

from peftchat.chat_template.chat_format import ChatFormat
from peftchat.console import stderr
from peftchat.dataset.cache import EncodedSplit, Split, load_splits
from peftchat.dataset.collator import BatchLayout, ChatCollator
from peftchat.dataset.packing import pack
from peftchat.errors import UserError, VerificationError
from peftchat.malloc import keep_large_blocks
from peftchat.models.added_tokens import EmbeddingSnapshot, l2_distance, snapshot_embeddings
from peftchat.models.fused_lora import fuse_lora_forward, num_adapted_layers
from peftchat.models.loading import VARLEN
from peftchat.models.saving import save_model_files
from peftchat.models.zero import is_zero3
from peftchat.runs.run_folder import Checkpoint, RunFolder
from peftchat.runs.run_summary import AddedToken, AutoSetting, RunSummary, SampleAnswer
from peftchat.training.distributed import DistributedSetup, deepspeed_config
from peftchat.training.model import (
    TrainableModel,
    build_model,
    chat_format,
    compile_if_faster,
    fall_back,
    select_attention,
)
from peftchat.training.preflight import check_isolation, check_loss, check_space, is_disk_full
from peftchat.training.progress import MetricsCallback, ProgressCallback
from peftchat.training.summary import (
    baseline_memory,
    memory_parts,
    run_summary,
    sample_answers,
    seconds_since_start,
)
from peftchat.training.throughput import TokenCounts
from peftchat.training.trainer import BudgetCallback, ChatTrainer, has_budget, sft_config
from peftchat.training.variant_hooks import trainer_hooks

if TYPE_CHECKING:
    from datasets import Dataset

    from peftchat.recipe import LoadedRecipe, Recipe


def make_trainer(
    recipe: "Recipe",
    folder: RunFolder,
    arguments: Any,
    built: TrainableModel,
    chat: ChatFormat,
    rows: dict[Split, EncodedSplit],
    checkpoint: Checkpoint | None,
    progress: ProgressCallback,
) -> ChatTrainer:
    """The trainer, with the attention settled and batches laid out for it.

    Args:
        arguments: TRL's arguments; told how to draw rows.
        progress: shows the run on the terminal.
    """
    layout = select_attention(recipe, built.model, built.causal_model)
    if layout == "padded":
        # Rows of like length share a batch, so that little of it is padding.
        arguments.train_sampling_strategy = "group_by_length"

    def collator(side: Split) -> ChatCollator:
        return ChatCollator(
            rows[side].store,
            loss_on=recipe.chat.loss_on,
            layout=layout,
            pad_token_id=chat.tokenizer.pad_token_id,
            pad_to_multiple_of=recipe.data.pad_to_multiple_of,
            watched=[token.id for token in chat.new_tokens],
        )

    return ChatTrainer(
        built.model,
        arguments,
        train_packs=_packs(recipe, rows["train"], layout),
        train_collator=collator("train"),
        eval_packs=_packs(recipe, rows["eval"], layout) if "eval" in rows else None,
        eval_collator=collator("eval") if "eval" in rows else None,
        tokenizer=chat.tokenizer,
        callbacks=[MetricsCallback(folder.metrics), progress],
        totals=_totals_so_far(checkpoint),
        parts=trainer_hooks(recipe, built.model),
    )


def _packs(recipe: "Recipe", rows: EncodedSplit, layout: BatchLayout) -> "Dataset":
    """The rows of each sequence as the data set that the trainer draws from."""
    from datasets import Dataset

    lengths = rows.store.lengths
    if recipe.data.packing:
        return Dataset.from_dict({"rows": pack(lengths, recipe.data.max_length, recipe.training.seed)})
    columns: dict[str, Any] = {"rows": [[index] for index in range(len(rows.store))]}
    if layout == "padded":
        columns["length"] = lengths
    return Dataset.from_dict(columns)


def _totals_so_far(checkpoint: Checkpoint | None) -> TokenCounts | None:
    """This process's counts at the checkpoint; with another number of processes, the first one takes all."""
    if checkpoint is None:
        return None
    everyone = [TokenCounts(**counts) for counts in checkpoint.token_counts()]
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if len(everyone) == world:
        return everyone[rank]
    together = TokenCounts.together(everyone)
    return (
        together
        if rank == 0
        else TokenCounts(seen=[0] * len(together.seen), seen_before_target=[0] * len(together.seen))
    )


@dataclass(frozen=True, slots=True)
class TrainOptions:
    """What the user asked for beside the recipe.

    Attributes:
        resume: go on from the last whole checkpoint, if there is one.
        questions: prompts to answer before and after training.
        command: the command line, for the record.
        choices: what was settled for the user.
    """

    resume: bool = False
    questions: Sequence[str] = ()
    command: str = ""
    choices: Sequence[AutoSetting] = ()


def run_training(loaded: "LoadedRecipe", placement: DistributedSetup, request: TrainOptions) -> RunSummary:
    """Train as the recipe says and leave a finished run folder.

    Returns:
        What was written to `run.json`.

    Raises:
        UserError: something the user gave cannot be used; the folder is then untouched.
        VerificationError: training or saving did not do what it should have.
    """
    folder = RunFolder(Path(loaded.recipe.output_dir))
    try:
        return _run(loaded, placement, request, folder)
    except Exception as error:
        folder.release()
        if is_disk_full(folder.path):
            # Every library says it in its own words.
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder.path)) from error
        raise


def _run(loaded: "LoadedRecipe", placement: DistributedSetup, request: TrainOptions, folder: RunFolder) -> RunSummary:
    recipe = loaded.recipe
    started = datetime.now(UTC)
    is_main = int(os.environ.get("RANK", "0")) == 0
    checkpoint = folder.check_usable(recipe, resume=request.resume)
    _start_processes(placement)
    chat = chat_format(recipe)
    rows = load_splits(recipe, chat)
    deepspeed = deepspeed_config(recipe, placement, row_elements=_row_elements(recipe, chat))
    os.environ.setdefault("TENSORBOARD_LOGGING_DIR", str(folder.tensorboard))
    # transformers has to know about ZeRO-3 before the model is loaded.
    arguments = sft_config(recipe, placement, folder.path, deepspeed=deepspeed, resuming=checkpoint is not None)
    at_start = baseline_memory()
    built = build_model(recipe, placement, chat, rows["train"].store, checkpoint.path if checkpoint else None)
    plain = recipe.method == "full"
    if isinstance(built.model, PeftModel) and not is_zero3():
        plain = 0 < fuse_lora_forward(built.model) == num_adapted_layers(built.model)
    compiling = compile_if_faster(loaded, placement, built, rows["train"].stats, plain=plain)
    if compiling is not None and is_main:
        stderr.print(f"Chosen: {compiling}", markup=False, highlight=False)
    progress = ProgressCallback()
    trainer = make_trainer(recipe, folder, arguments, built, chat, rows, checkpoint, progress)
    before = _BeforeTraining(trainer, chat, recipe, folder, checkpoint, request.questions)
    # The others write into the run folder when training begins; it is claimed only when nothing speaks against it.
    trainer.callback_handler.callbacks.insert(0, before)
    if has_budget(recipe.training):
        trainer.add_callback(BudgetCallback(trainer, recipe.training))
    if not placement.gpus:
        keep_large_blocks()
    try:
        result = trainer.train(resume_from_checkpoint=str(checkpoint.path) if checkpoint else None)
        if "eval" in rows and not _is_evaluated(trainer, result.global_step):
            trainer.evaluate()
    finally:
        progress.close()
    last_rows = snapshot_embeddings(built.causal_model, chat.new_tokens)
    totals = trainer.gathered_totals()
    after = sample_answers(trainer.causal_model, chat, request.questions)
    _save(recipe, trainer, chat, folder, is_main=is_main)
    written: list[RunSummary | None] = [None]
    if is_main:
        values = run_summary(loaded, placement, trainer, chat, rows, folder.metrics.read(), totals) | {
            "new_tokens": _new_tokens(chat, totals, built.first_rows, last_rows),
            "samples_before": before.answers,
            "samples_after": after,
            "command": request.command,
            "seconds_to_first_step": before.seconds_to_first_step,
            "auto_settings": (*request.choices, *([compiling] if compiling else ())),
            "started": started.isoformat(timespec="seconds"),
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        values["memory_bytes"] = memory_parts(trainer, at_start, values["peak_memory_bytes"])
        summary = RunSummary(**values)
        summary.write(folder)
        written = [summary]
    (result_of_main,) = broadcast_object_list(written)
    return result_of_main


def _start_processes(placement: DistributedSetup) -> None:
    if not placement.uses_deepspeed:
        return
    try:
        import deepspeed
    except ImportError as error:
        raise UserError(
            f"`{placement.strategy}` needs DeepSpeed, which is not installed",
            where="distributed.strategy",
            hint="pip install 'peftchat[deepspeed]'",
        ) from error
    # Left to itself on a CPU, DeepSpeed believes in a world of one while the model is loaded.
    deepspeed.init_distributed(dist_backend="nccl" if placement.gpus else "gloo", verbose=False)


def _row_elements(recipe: "Recipe", chat: ChatFormat) -> int:
    """Elements of the new tokens' rows, which ZeRO-3 must leave whole."""
    from peftchat.models.source import ModelSource

    if not chat.new_tokens:
        return 0
    config = ModelSource.of_recipe(recipe).config().get_text_config()
    beyond = max(token.id for token in chat.new_tokens) + 1 - int(config.vocab_size)
    return max(len(chat.new_tokens), beyond) * int(config.hidden_size)


class _BeforeTraining(TrainerCallback):
    """Looks at the model as training will use it, right before the first step, and claims the run folder."""

    def __init__(
        self,
        trainer: ChatTrainer,
        chat: ChatFormat,
        recipe: "Recipe",
        folder: RunFolder,
        checkpoint: Checkpoint | None,
        questions: Sequence[str],
    ) -> None:
        self._trainer = trainer
        self._chat = chat
        self._recipe = recipe
        self._folder = folder
        self._checkpoint = checkpoint
        self._questions = questions
        self.answers: list[SampleAnswer] = []
        self.seconds_to_first_step: float | None = None

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """Probe the loss and the isolation of packed conversations, claim the folder, answer the questions."""
        self._probe()
        check_space(self._folder.path, self._trainer.model, self._recipe)
        if self._trainer.args.should_save:
            self._folder.claim(self._recipe, self._checkpoint)
        self._trainer.accelerator.wait_for_everyone()
        self.answers = sample_answers(self._trainer.causal_model, self._chat, self._questions)

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Note how long it took until the first step was done."""
        if self.seconds_to_first_step is None:
            self.seconds_to_first_step = seconds_since_start()

    def _probe(self) -> None:
        try:
            self._look()
        except (UserError, RuntimeError) as error:
            # What was chosen for speed gives way; what the recipe asked for is reported.
            layout = fall_back(self._recipe, self._trainer.causal_model)
            if layout is None:
                raise
            self._trainer.lay_out(layout)
            if self._trainer.args.should_save:
                reason = str(error).splitlines()[0]
                stderr.print(
                    f"Chosen: model.attention: sdpa, slower ({VARLEN} does not work here: {reason})",
                    markup=False,
                    highlight=False,
                )
            self._look()

    def _look(self) -> None:
        trainer = self._trainer
        base, device = trainer.causal_model, trainer.args.device
        vocabulary = min(base.config.get_text_config().vocab_size, 1000)
        flat = trainer.layout == "flat"
        with trainer.compute_loss_context_manager():
            check_loss(trainer.model_wrapped, base, vocabulary, device, with_borders=flat)
            if flat or self._recipe.data.packing:
                check_isolation(trainer.model_wrapped, vocabulary, device, with_borders=flat)


def _is_evaluated(trainer: ChatTrainer, step: int) -> bool:
    return any(line.get("step") == step and "eval_loss" in line for line in trainer.state.log_history)


def _save(recipe: "Recipe", trainer: ChatTrainer, chat: ChatFormat, folder: RunFolder, *, is_main: bool) -> None:
    """The finished model into the run folder, in the recipe's dtype."""
    arguments: dict[str, Any] = {
        "dtype": recipe.model.dtype,
        "is_main": is_main,
        "wrapped": trainer.model_wrapped if trainer.is_deepspeed_enabled else None,
    }
    if not is_main:
        save_model_files(trainer.model, chat.tokenizer, folder.path, **arguments)
        return
    with folder.publish() as temporary:
        save_model_files(trainer.model, chat.tokenizer, temporary, **arguments)
        trainer.causal_model.generation_config.save_pretrained(str(temporary))


def _new_tokens(
    chat: ChatFormat, totals: TokenCounts, first: EmbeddingSnapshot | None, last: EmbeddingSnapshot | None
) -> list[AddedToken]:
    """What `run.json` says of each new token.

    A row that got a gradient and stayed where it was means that training misses it: the run is then a failure.

    Raises:
        VerificationError: naming the token.
    """
    if first is None or last is None:
        return []
    inputs, outputs = l2_distance(first, last)
    told = [
        AddedToken(token.token, token.id, seen, moved_in, moved_out)
        for token, seen, moved_in, moved_out in zip(chat.new_tokens, totals.seen, inputs, outputs, strict=True)
    ]
    for entry, with_gradient in zip(told, totals.seen_before_target, strict=True):
        still = [side for side in ("input", "output") if getattr(entry, f"{side}_moved") == 0.0]
        if with_gradient and still:
            raise VerificationError(
                f"the {still[0]} embedding of {entry.token} did not move, though the token occurs "
                f"{with_gradient} times before a target"
            )
    return told
