"""Training: from a recipe to a finished run folder."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from peftchat.console import stderr
from peftchat.errors import UserError
from peftchat.interruption import CHECKPOINT, DeferredSignals
from peftchat.malloc import keep_large_blocks, return_large_blocks
from peftchat.models.added_tokens import snapshot_embeddings
from peftchat.models.saving import save_model_files
from peftchat.models.source import ModelSource
from peftchat.runs.claim import claimed
from peftchat.runs.run_folder import RunFolder
from peftchat.runs.run_summary import AutoSetting, RunSummary, SampleAnswer
from peftchat.training.autotune import choose_fastest, present_choice, threads_restored
from peftchat.training.best_checkpoint import best_callbacks, load_best
from peftchat.training.build_trainer import build_trainer, sft_config
from peftchat.training.context import TrainContext, TrainOptions, open_context
from peftchat.training.failed_writes import disk_error
from peftchat.training.hang_watch import watch_hangs
from peftchat.training.hints import tell_hints
from peftchat.training.kept_choices import write_choice
from peftchat.training.model import TrainableModel, load_trainable_model
from peftchat.training.number_checks import check_moved, check_trend
from peftchat.training.out_of_memory import telling_out_of_memory
from peftchat.training.preflight import check_model, preflight
from peftchat.training.progress import ProgressCallback
from peftchat.training.questions import sample_answers
from peftchat.training.recipe_questions import read_questions
from peftchat.training.several_processes import is_main_process
from peftchat.training.stopping import EvaluationStopped, StopCallback
from peftchat.training.summary import FitResult, added_tokens, seconds_since_start, summarize
from peftchat.training.trainer import ChatTrainer
from peftchat.training.weightwise import uses_little_memory

if TYPE_CHECKING:
    from peftchat.recipe import LoadedRecipe
    from peftchat.training.distributed import DistributedSetup


def train(
    loaded: "LoadedRecipe",
    options: TrainOptions = TrainOptions(),
    distributed: "DistributedSetup | None" = None,
) -> RunSummary:
    """Train a model as the recipe says, and leave a finished run folder.

    Every process of a distributed run calls it and gets the same summary.

    Args:
        loaded: the recipe.
        options: resume, sample prompts, and what the summary records.
        distributed: the resolved `distributed` section of the recipe; resolved here by default.

    Raises:
        UserError: an input cannot be used; the run folder is then untouched.
        VerificationError: training or saving went wrong.
    """
    run_folder = RunFolder(Path(loaded.recipe.output_dir))
    with claimed_by_run(run_folder) as check_claim, _released_on_failure(run_folder), threads_restored():
        context = open_context(loaded, options, distributed)
        with telling_out_of_memory(context.position, context.name_sources):
            return _train(context, check_claim)


def _train(context: TrainContext, check_claim: Callable[[], None]) -> RunSummary:
    """Train, check and save a run whose folder is claimed."""
    config = sft_config(context)  # Before the model is loaded: transformers has to know about ZeRO-3.
    model = load_trainable_model(context)
    trainer = build_trainer(context, model, config)
    prompts = tuple(dict.fromkeys((*context.options.prompts, *read_questions(context.loaded))))
    longest = context.recipe.evaluation.max_new_tokens
    tell_hints(context, model, sequences=len(trainer.train_dataset))

    chosen: list[AutoSetting] = []

    def start() -> list[SampleAnswer]:
        context.position.enter("the checks before the first step", 0)
        preflight(trainer, context)
        chosen.extend(_choose(trainer, context, model))
        begin(trainer, context)
        trainer.prepare()
        return sample_answers(trainer.causal_model, context.chat, prompts, longest)

    fitted = fit(trainer, context, start, check_claim)
    check(trainer, context, model, fitted)
    context.position.enter("answering questions", trainer.state.global_step)
    samples_after = sample_answers(trainer.causal_model, context.chat, prompts, longest)
    context.position.enter("writing the model", trainer.state.global_step)
    save(trainer, context)
    return summarize(context, trainer, model, fitted, samples_after, chosen)


def _choose(trainer: ChatTrainer, context: TrainContext, model: TrainableModel) -> Sequence[AutoSetting]:
    """Choose how the steps are computed, and tell it."""
    attention = trainer.causal_model.config._attn_implementation
    settings = choose_fastest(trainer, context, model)
    if trainer.causal_model.config._attn_implementation != attention:
        check_model(trainer, context.recipe)
    if context.is_main:
        for setting in settings:
            stderr.print(f"Chosen: {setting}", markup=False, highlight=False)
    return settings


@contextmanager
def claimed_by_run(run_folder: RunFolder) -> Iterator[Callable[[], None]]:
    """Claim the run folder in the main process until the end of the block (`peftchat.runs.claim.claimed`).

    Raises:
        UserError: another run is writing to the folder.
    """
    if not is_main_process():
        yield lambda: None
        return
    with claimed(run_folder.path, option="output_dir") as check:
        yield check


def begin(trainer: ChatTrainer, context: TrainContext) -> None:
    """Prepare the run folder, in the main process; the others wait for it."""
    if context.is_main:
        context.run_folder.begin(context.recipe, context.checkpoint)
        context.content.write(context.run_folder)
        write_choice(context.run_folder.choices, present_choice(trainer))
        context.content.read_base(ModelSource.of_recipe(context.recipe), context.run_folder)
    trainer.accelerator.wait_for_everyone()


def fit(
    trainer: ChatTrainer,
    context: TrainContext,
    start: Callable[[], list[SampleAnswer]],
    check_claim: Callable[[], None],
) -> FitResult:
    """Train, evaluate the last step if there is held-out data, and load the best weights if the recipe says so.

    Args:
        trainer: the trainer.
        context: the run.
        start: called right before the first step, with the model as training calls it. Only `Trainer.train` wraps a
            model for DDP or ZeRO, and a model that ZeRO-3 shards cannot be called before that.
        check_claim: called after every step; raises if another run has taken the folder.
    """
    checkpoint = context.checkpoint
    stopping = StopCallback(
        trainer,
        context.run_folder,
        _resume_command(context),
        saves=context.recipe.training.save_strategy != "no",
        saved_step=checkpoint.step if checkpoint else 0,
    )
    callback = _StartCallback(start, check_claim, stopping.signals)
    # The other callbacks write into the run folder when training begins, so it has to be claimed first.
    trainer.callback_handler.callbacks.insert(0, callback)
    for one in best_callbacks(context):
        trainer.add_callback(one)
    progress = ProgressCallback()
    trainer.add_callback(progress)
    trainer.add_callback(stopping)
    hang_watch = watch_hangs(trainer, context)
    if not context.distributed.gpus:
        # Blocks that are kept are faster to take again, but seldom fit: weights are updated one by one.
        return_large_blocks() if uses_little_memory(context.recipe) else keep_large_blocks()
    try:
        with suppress(EvaluationStopped):
            output = trainer.train(resume_from_checkpoint=str(checkpoint.path) if checkpoint else None)
            if checkpoint is not None and output.global_step == checkpoint.step and not stopping.is_stopping:
                _tell_nothing_trained(context, checkpoint.step)
            if not stopping.is_stopping and "eval" in context.splits and not trainer.has_evaluated(output.global_step):
                trainer.evaluate()
        stopping.raise_if_stopped()
    except Exception as error:
        if stopping.has_lost_data_worker(error):
            stopping.raise_if_stopped()
        interrupted = stopping.interrupted(error)
        if interrupted is None:
            raise
        raise interrupted from error
    finally:
        stopping.signals.end()
        progress.close()
        if hang_watch is not None:
            hang_watch.end()
    kept = load_best(trainer, context)
    return FitResult(
        token_counts=trainer.gather_token_counts(),
        final_embeddings=snapshot_embeddings(trainer.causal_model, context.chat.new_tokens),
        samples_before=callback.samples,
        seconds_to_first_step=callback.seconds_to_first_step,
        kept=kept,
    )


def check(trainer: ChatTrainer, context: TrainContext, model: TrainableModel, fitted: FitResult) -> None:
    """Check the trained model before anything of it is saved; every process must call it.

    Raises:
        VerificationError: a weight is not finite, the loss exploded, or training did not move what it had to move.
    """
    trainer.checks.check_weights(trainer.model, trainer.state.global_step)
    if fitted.kept is None or fitted.kept.step == fitted.kept.last_step:
        check_trend(trainer.checks.counts.losses, len(context.chat.tokenizer))
    tokens = added_tokens(context.chat, model.initial_embeddings, fitted)
    check_moved(trainer.checks.counts, tokens, fitted.token_counts.seen_before_target)


class _StartCallback(TrainerCallback):
    """Calls a function before the first step, and measures the time until that step is done.

    Args:
        start: the function; it returns sample answers.
        check_claim: called after every step.
        signals: taken over once the function is done.
    """

    def __init__(
        self, start: Callable[[], list[SampleAnswer]], check_claim: Callable[[], None], signals: DeferredSignals
    ) -> None:
        self._start = start
        self._check_claim = check_claim
        self._signals = signals
        self.samples: list[SampleAnswer] = []
        self.seconds_to_first_step: float | None = None

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """Call the function."""
        self.samples = self._start()
        CHECKPOINT.begin()
        self._signals.begin()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Note the time at the end of the first step, and check that the folder is still this run's."""
        self._check_claim()
        if self.seconds_to_first_step is None:
            self.seconds_to_first_step = seconds_since_start()


def _tell_nothing_trained(context: TrainContext, step: int) -> None:
    """Tell that a resumed run was at its end already, or beyond an end that the recipe has moved."""
    asked = context.recipe.training.max_steps
    beyond = f", more than training.max_steps: {asked}" if 0 < asked < step else ""
    context.notes.tell(
        f"Nothing was trained: the run has made its {step} steps already{beyond}. For more, raise "
        "`training.max_steps` (or the setting that ends the run)."
    )


def _resume_command(context: TrainContext) -> str:
    command = context.options.command or f"peftchat train {context.loaded.path}"
    return command if context.options.resume else f"{command} --resume"


def save(trainer: ChatTrainer, context: TrainContext) -> None:
    """Write the finished model into the run folder, in the recipe's dtype; every process must call it."""

    def save_to(folder: Path) -> None:
        save_model_files(
            trainer.model,
            context.chat.tokenizer,
            folder,
            adapter=context.recipe.adapter,
            dtype=context.recipe.model.dtype,
            is_main=context.is_main,
            wrapped=trainer.model_wrapped if trainer.is_deepspeed_enabled else None,
        )

    if not context.is_main:
        save_to(context.run_folder.path)
        return
    with context.run_folder.publish() as folder:
        save_to(folder)
        trainer.causal_model.generation_config.save_pretrained(str(folder))


@contextmanager
def _released_on_failure(run_folder: RunFolder) -> Iterator[None]:
    """Release the run folder if the run fails, and report a full disk or a file that is too large as such."""
    try:
        yield
    except BaseException as error:
        run_folder.release()
        # What the user can mend has its message already.
        if not isinstance(error, Exception) or isinstance(error, UserError):
            raise
        of_disk = disk_error(error, run_folder.path)
        if of_disk is not None:
            raise of_disk from error
        raise
