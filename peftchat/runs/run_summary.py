"""Run summary: the results of a finished run, kept in `run.json`."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, ValidationError, model_validator

from peftchat.errors import UserError
from peftchat.files import write_text
from peftchat.runs.eval_labels import LabelSummary
from peftchat.runs.eval_losses import GroupLoss
from peftchat.runs.eval_pairs import PairSummary
from peftchat.runs.fingerprints import Fingerprints
from peftchat.runs.run_folder import RunFolder


@dataclass(frozen=True, slots=True)
class AutoSetting:
    """A setting that the recipe left open and that was chosen automatically.

    Attributes:
        key: its recipe key.
        value: the chosen value, as text.
        reason: why, in a few words.
    """

    key: str
    value: str
    reason: str

    def __str__(self) -> str:
        return f"{self.key}: {self.value} ({self.reason})"


@dataclass(frozen=True, slots=True)
class SampleAnswer:
    """A prompt and the model's answer.

    Attributes:
        prompt: the user's message.
        answer: the text up to the end token.
        stopped: whether the model ended its turn before the length limit.
    """

    prompt: str
    answer: str
    stopped: bool | None = None


@dataclass(frozen=True, slots=True)
class AddedToken:
    """A token that the run added to the vocabulary.

    Attributes:
        token: its text.
        id: its token id.
        seen: occurrences in the training data.
        input_moved: L2 distance between the first and the last input embedding; None without one.
        output_moved: the same for the output embedding.
    """

    token: str
    id: int
    seen: int | None = None
    input_moved: float | None = None
    output_moved: float | None = None

    @property
    def verdict(self) -> str:
        """Return whether the token was learned, in a few words."""
        moves = [move for move in (self.input_moved, self.output_moved) if move is not None]
        if not self.seen:
            return "not in the data" if self.seen == 0 else "not measured"
        if not moves:
            return "not measured"
        return "learned" if all(move > 0 for move in moves) else "did not move"


class SpikeRecord(BaseModel):
    """A step whose loss was far above those before, in nats per target.

    Attributes:
        step: its number, from 1 on.
        loss: its loss.
        median: of the steps before.
        limit: what it exceeded.
        skipped: whether its update was left out.
        conversations: `file:line` -> loss, highest first; only those above the limit if there are any.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    step: int
    loss: float
    median: float
    limit: float
    skipped: bool = False
    conversations: dict[str, float] = {}


class OutlierRecord(BaseModel):
    """A conversation whose training loss was far above those of its length, in nats per target.

    Attributes:
        step: the step that it was part of, from 1 on.
        loss: its loss.
        typical: the median at that time for its length.
        limit: what it exceeded.
        tokens: its targets.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    step: int
    loss: float
    typical: float
    limit: float
    tokens: int


class SourceLoss(BaseModel):
    """The training loss on the conversations of one file, in nats per target.

    Attributes:
        conversations: how often one of them was trained.
        tokens: targets that were trained.
        first: the mean loss of the first third of the steps; None where the file had no target in them.
        last: the same of the last third.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    conversations: int
    tokens: int
    first: float | None = None
    last: float | None = None


@dataclass(frozen=True, slots=True)
class KeptStep:
    """The step whose weights the run folder holds, where a run compares its evaluations.

    Attributes:
        step: after which the model had these weights.
        metric: what was compared.
        value: the metric after that step.
        last_step: the last step of the run.
        last_value: the metric after it.
        stopped_early: whether the run ended because the metric no longer improved.
    """

    step: int
    metric: str
    value: float
    last_step: int
    last_value: float
    stopped_early: bool = False

    def __str__(self) -> str:
        extreme = "highest" if self.metric == "eval_accuracy" else "lowest"
        value = f"{self.metric} {self.value:.4f}"
        if self.step == self.last_step:
            return f"The run folder holds the last step's weights (step {self.step}, {value}, the {extreme})."
        last = f"the last step ({self.last_step}) has {self.last_value:.4f}"
        return f"The run folder holds the weights of step {self.step}: {value} is the {extreme}; {last}."


class MemoryParts(BaseModel):
    """The peak memory of the main process by part, in bytes.

    Attributes:
        baseline: held before the model was loaded; 0 on a GPU.
        frozen_weights: parameters without a gradient, and buffers.
        trained_weights: parameters with a gradient.
        gradients: their gradients.
        optimizer: optimizer states, and DeepSpeed's float32 master weights.
        activations_and_other: the rest: activations, logits, gathered weights, communication buffers and memory that
            allocators keep.
    """

    model_config = ConfigDict(frozen=True, extra="ignore", populate_by_name=True)

    baseline: int = Field(0, validation_alias=AliasChoices("baseline", "start"))
    frozen_weights: int = 0
    trained_weights: int = 0
    gradients: int = 0
    optimizer: int = 0
    activations_and_other: int = Field(
        0, validation_alias=AliasChoices("activations_and_other", "activations_and_rest")
    )


class RunSummary(BaseModel):
    """The results of a finished run.

    Training writes every key. A key that an older version did not write reads as None, meaning "not measured"; a key
    that a newer version adds is ignored. Losses are means over supervised tokens in nats, `seconds` is training time,
    memory is in bytes, fractions are between 0 and 1.

    Attributes:
        objective: what was learned: `sft`, or from pairs of answers; `train_loss` and `eval_loss` are then means over
            pairs, and `train_examples` and `eval_examples` count pairs.
        optimizer: its name in transformers.
        master_weights: the dtype in which it keeps the trained weights.
        optimizer_in_backward: whether weights were updated, and gradients freed, in the backward pass.
        first_stage: the run folder that it began at; None for one that began at the base.
        base_vocabulary_size: rows of the base model's embedding before tokens were added.
        train_examples: encoded conversations trained on.
        examples_per_epoch: those of one epoch; others than `train_examples` where `data.resample` draws them again.
        dropped: conversations left out, by reason.
        unused_fields: fields of records that nothing was trained on, with the number of records that have them.
        unsupported_roles: messages that the template cannot write, by role and what was done with them.
        expanded: conversations that became several examples because the template rewrites earlier turns.
        expanded_examples: those examples.
        truncated: conversations that lost turns to fit `data.max_length`.
        eval_by: held-out losses by `source` (file), `role`, `kind` of text (content, reasoning, tool calls, and other
            text that answers consist of), `turn` among those of its role, and `length` of the conversation in tokens.
        eval_pairs: the held-out pairs of an objective with pairs.
        eval_labels: the held-out answers of an objective with labels.
        special_token_text: stretches of text spelled like a special token and encoded as ordinary text.
        formats: the format of each data file.
        new_tokens: the tokens added to the vocabulary.
        warnings: what its numbers say against it, one sentence each.
        spikes: steps whose loss was far above those before, since the run was started or resumed.
        outliers: `file:line` of conversations whose loss was far above those of their length, where they first were.
        train_by_source: training losses by file, since the run was started or resumed.
        kept: the step whose weights the run folder holds, where evaluations were compared.
        notes: what it changed or found by itself, as told while it went on.
        auto_settings: settings chosen automatically.
        fingerprints: what the run was trained on and with.
        allowed_changes: what changed since the run was started, and was allowed by `--allow-changed`.
        command: the command line.
    """

    model_config = ConfigDict(frozen=True, extra="ignore", populate_by_name=True)

    method: str | None = None
    objective: str = "sft"
    optimizer: str | None = None
    master_weights: str | None = None
    optimizer_in_backward: bool | None = None
    base_model: str | None = Field(None, validation_alias=AliasChoices("base_model", "base"))
    first_stage: str | None = None
    base_vocabulary_size: int | None = None
    steps: int | None = None
    epochs: float | None = None
    train_examples: int | None = Field(None, validation_alias=AliasChoices("train_examples", "rows"))
    examples_per_epoch: int | None = None
    eval_examples: int | None = Field(None, validation_alias=AliasChoices("eval_examples", "eval_rows"))
    dropped: dict[str, int] | None = None
    unused_fields: dict[str, str] | None = None
    unsupported_roles: dict[str, int] | None = None
    expanded: int | None = None
    expanded_examples: int | None = None
    truncated: int | None = Field(None, validation_alias=AliasChoices("truncated", "shortened"))
    special_token_text: int | None = Field(None, validation_alias=AliasChoices("special_token_text", "special_text"))
    formats: dict[str, str] | None = Field(None, validation_alias=AliasChoices("formats", "forms"))
    tokens: int | None = None
    supervised_tokens: int | None = None
    padding_fraction: float | None = None
    seconds: float | None = None
    seconds_to_first_step: float | None = None
    tokens_per_second: float | None = None
    peak_memory_bytes: int | None = None
    memory_bytes: MemoryParts | None = None
    parameters: int | None = None
    trainable_parameters: int | None = None
    train_loss: float | None = None
    eval_loss_before: float | None = None
    eval_loss: float | None = None
    eval_by: dict[str, dict[str, GroupLoss]] | None = None
    eval_pairs: PairSummary | None = None
    eval_labels: LabelSummary | None = None
    spikes: tuple[SpikeRecord, ...] = ()
    outliers: dict[str, OutlierRecord] = {}
    train_by_source: dict[str, SourceLoss] | None = None
    kept: KeptStep | None = None
    model_flops_utilisation: float | None = None
    attention: str | None = None
    template: str | None = None
    end_token: str | None = None
    strategy: str | None = None
    world_size: int | None = None
    device: str | None = None
    versions: dict[str, str | None] = {}
    new_tokens: tuple[AddedToken, ...] = ()
    samples_before: tuple[SampleAnswer, ...] = ()
    samples_after: tuple[SampleAnswer, ...] = ()
    warnings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    auto_settings: tuple[AutoSetting, ...] = Field((), validation_alias=AliasChoices("auto_settings", "choices"))
    fingerprints: Fingerprints | None = None
    allowed_changes: tuple[str, ...] = ()
    command: str | None = None
    started: str | None = None
    finished: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, content: Any) -> Any:
        """Treat `null` like an absent key."""
        if not isinstance(content, dict):
            return content
        return {key: value for key, value in content.items() if value is not None}

    @classmethod
    def read(cls, folder: RunFolder) -> Self:
        """Read the summary of a finished run.

        Raises:
            UserError: `run.json` is missing, or is not a run's summary.
        """
        path = folder.summary
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise UserError(
                f"this folder has no {path.name}",
                where=str(folder.path),
                hint="Give the folder of a run that has finished.",
            ) from None
        except ValueError as error:
            raise UserError(f"not a JSON file ({error})", where=str(path)) from None
        if not isinstance(content, dict):
            raise UserError("not a JSON object", where=str(path))
        try:
            return cls.model_validate(content)
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(map(str, first["loc"]))
            raise UserError(f"`{key}` has an unexpected value: {first['msg']}", where=str(path)) from None

    def write(self, folder: RunFolder) -> None:
        """Write the summary into a run folder."""
        text = json.dumps(self.model_dump(), indent=2, ensure_ascii=False)
        write_text(folder.summary, text + "\n")

    @property
    def unit(self) -> str:
        """What an example is, in the plural."""
        return {"sft": "conversations", "kto": "labeled answers"}.get(self.objective, "pairs")

    @property
    def answer_lengths(self) -> tuple[float | None, float] | None:
        """The mean number of words of the sample answers before training and after it; None without samples."""
        before, after = (_mean_words(answers) for answers in (self.samples_before, self.samples_after))
        return None if after is None else (before, after)

    @property
    def supervised_share(self) -> float | None:
        """The fraction of the tokens that the loss is computed on."""
        if not self.tokens or self.supervised_tokens is None:
            return None
        return self.supervised_tokens / self.tokens

    @property
    def dropped_examples(self) -> int:
        """The number of conversations left out, for any reason."""
        return sum((self.dropped or {}).values())


def _mean_words(answers: Sequence[SampleAnswer]) -> float | None:
    return sum(len(one.answer.split()) for one in answers) / len(answers) if answers else None
