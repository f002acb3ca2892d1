"""Answer the questions of a file with several models: batches, kept as they come, continued after an interruption."""

import dataclasses
import gc
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from peftchat.answering.answer_file import Answer, AnswerFile, TurnAnswer
from peftchat.answering.answer_progress import CountProgress
from peftchat.answering.prompting import (
    DialoguePrompting,
    Prompting,
    PromptingKind,
    TemplatePrompting,
    dialogue_text,
)
from peftchat.answering.questions import Question
from peftchat.answering.records import QuestionId
from peftchat.console import stderr
from peftchat.conversation import Message
from peftchat.errors import UserError
from peftchat.hashing import digest_files
from peftchat.models.source import ModelKind, ModelSource
from peftchat.serving.chat_model import ChatModel, context_length_of, load_for_chat, open_for_chat
from peftchat.serving.sampling import Sampling, apply_sampling

if TYPE_CHECKING:
    from transformers import GenerationConfig

DEFAULT_SEED = 0


@dataclass(frozen=True, slots=True)
class AnswerOptions:
    """How questions are answered.

    Attributes:
        sampling: as for `chat`; its seed, 0 if there is none, gives each answer random numbers of its own.
        batch_size: prompts that are answered together.
        dialogue_file: the text that begins a dialogue; None for our own.
        dtype: `float32` to compute in it; None for the dtype of the model.
        base: folder or hub id of an adapter's base that has moved.
        allow_changed: load although base, tokenizer or template changed since the run.
    """

    sampling: Sampling = field(default_factory=Sampling)
    batch_size: int = 16
    dialogue_file: Path | None = None
    dtype: str | None = None
    base: str | None = None
    allow_changed: bool = False


@dataclass(frozen=True)
class ModelAnswers:
    """The answers of one model.

    Attributes:
        name: of the model, in the file and in tables.
        answers: in the order of the questions.
        seconds: time of those that were made in this call.
        made: how many were made in this call.
    """

    name: str
    prompting: PromptingKind
    path: Path
    answers: list[Answer]
    seconds: float = 0.0
    made: int = 0

    @property
    def turns(self) -> list[TurnAnswer]:
        """The answers to all turns."""
        return [turn for answer in self.answers for turn in answer.turns]

    def as_dict(self) -> dict[str, Any]:
        """Return the numbers of a table."""
        turns = self.turns
        finishes = Counter(turn.finish for turn in turns)
        return {
            "model": self.name,
            "prompting": self.prompting,
            "answers": str(self.path),
            "questions": len(self.answers),
            "turns": len(turns),
            "prompt_tokens_per_turn": fmean(turn.prompt_tokens for turn in turns),
            "answer_tokens_per_turn": fmean(turn.tokens for turn in turns),
            "ended_by_itself": finishes["end"] / len(turns),
            "stopped_at_another_turn": finishes["turn"] / len(turns),
            "cut_at_the_limit": finishes["length"] / len(turns),
            "dropped_rounds": sum(turn.dropped for turn in turns),
            "made_now": self.made,
            "seconds": self.seconds,
        }


@dataclass
class Candidate:
    """A model that is going to answer, checked before any weights are loaded.

    Attributes:
        model: what the user named.
        name: of its file.
        settings: what its answers depend on.
    """

    model: str
    name: str
    source: ModelSource
    prompting: Prompting
    generation: "GenerationConfig"
    context: int
    file: AnswerFile
    settings: dict[str, Any]
    kept: dict[QuestionId, Answer] = field(default_factory=dict)

    @property
    def new_tokens(self) -> int:
        """The most tokens of an answer: half of the context is left for the prompt."""
        return min(self.generation.max_new_tokens, self.context // 2)

    def encode(self, messages: Sequence[Message]) -> Any:
        """Encode a conversation."""
        return self.prompting.encode(messages, self.context - self.new_tokens)


def answer_questions(
    questions: Sequence[Question],
    models: Sequence[tuple[str, PromptingKind]],
    output: Path,
    options: AnswerOptions,
    *,
    source: str = "",
) -> list[ModelAnswers]:
    """Answer questions with several models, one after the other, and keep each answer as it comes.

    Args:
        questions: from `read_questions`.
        models: folder or hub id, and how it is asked.
        output: the folder of the answers; what is there is continued.
        source: where the questions are from, for the record.

    Raises:
        UserError: a model cannot be used, a question does not fit, or the answers there are others; raised before any
            weights are loaded.
    """
    text = dialogue_text(options.dialogue_file)
    names = file_names([model for model, _ in models])
    candidates = [
        _open(model, kind, AnswerFile(output / f"{name}.jsonl"), name, text, options)
        for (model, kind), name in zip(models, names, strict=True)
    ]
    for candidate in candidates:
        candidate.settings["questions"] = source
        candidate.kept = candidate.file.kept(candidate.settings, questions)
        _check_fit(candidate, questions)
    return [_answer(candidate, questions, options) for candidate in candidates]


def file_names(models: Sequence[str]) -> list[str]:
    """Return a short name for each model, no two the same: the last parts of its path or hub id.

    Raises:
        UserError: one model is there twice.
    """
    paths = [tuple(part for part in Path(model).resolve().parts if part != "/") for model in models]
    repeated = next((model for model, path in zip(models, paths, strict=True) if paths.count(path) > 1), None)
    if repeated is not None:
        raise UserError("the model is named twice", where=f"--models {repeated}", hint="Name it once.")
    names = []
    for path in paths:
        length = 1
        while sum(other[-length:] == path[-length:] for other in paths) > 1:
            length += 1
        names.append("-".join(path[-length:]))
    return names


def _open(model: str, kind: PromptingKind, file: AnswerFile, name: str, text: str, options: AnswerOptions) -> Candidate:
    source, tokenizer = open_for_chat(model, base=_base_of(model, options), needs_template=kind == "template")
    own = source.generation_config()
    generation = apply_sampling(own, options.sampling)
    prompting: Prompting = TemplatePrompting(tokenizer, own)
    if kind == "dialogue":
        prompting = DialoguePrompting(tokenizer, own, text)
    if not prompting.end_ids and prompting.stop_text is None:
        raise UserError("the model has no token that ends an answer", where=model, hint="Name a chat model.")
    settings = {
        "model": model,
        "content": _content_of(source),
        "prompting": kind,
        "dialogue": text if kind == "dialogue" else None,
        "generation": _plain(generation.to_diff_dict()),
        "seed": _seed(options) if generation.do_sample else None,
        "dtype": options.dtype,
        "batch_size": options.batch_size,
        "versions": {name: version(name) for name in ("peftchat", "torch", "transformers", "peft")},
    }
    context = context_length_of(source.config(), tokenizer)
    return Candidate(model, name, source, prompting, generation, context, file, settings)


def _base_of(model: str, options: AnswerOptions) -> str | None:
    """Return `--base` for an adapter; other models need none."""
    return options.base if ModelSource.open(model).kind is ModelKind.ADAPTER else None


def _seed(options: AnswerOptions) -> int:
    return DEFAULT_SEED if options.sampling.seed is None else options.sampling.seed


def _content_of(source: ModelSource) -> dict[str, str] | str | None:
    """Return quick digests of the weight files of a folder; the revision of a hub model."""
    if source.kind is ModelKind.HUB:
        return source.revision
    files = {path.name: path for path in sorted(source.path.glob("*.safetensors"))}
    return {name: digest.sample for name, digest in digest_files(files, exact=False).items()}


def _plain(value: Any) -> Any:
    """Return a value as JSON can hold it."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items() if key != "transformers_version"}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def _check_fit(candidate: Candidate, questions: Sequence[Question]) -> None:
    """Encode every first turn: one that does not fit is told before anything is loaded."""
    for question in questions:
        try:
            candidate.encode((*question.before, Message("user", question.turns[0])))
        except UserError as error:
            where = f"question {question.id}, {candidate.name}"
            hint = error.hint
            if candidate.prompting.kind == "dialogue":
                hint = "Shorten it, or begin the dialogue with a shorter text (--dialogue-file)."
            raise UserError(error.message, where=where, hint=hint) from error


def _answer(candidate: Candidate, questions: Sequence[Question], options: AnswerOptions) -> ModelAnswers:
    file = candidate.file
    seconds, before = 0.0, len(candidate.kept)
    missing = sum(question.id not in candidate.kept for question in questions)
    with file.lines.claimed(str(file.path)):
        if missing:
            file.begin(candidate.settings)
            started = time.monotonic()
            try:
                _make_missing(candidate, questions, options)
            except BaseException:
                kept = len(candidate.kept)
                if kept:
                    stderr.print(
                        f"{kept:,} of {len(questions):,} answers are kept; the same command continues.", markup=False
                    )
                raise
            seconds = time.monotonic() - started
        else:
            stderr.print(f"{candidate.name}: all {len(questions):,} answers are there already.", markup=False)
        answers = [candidate.kept[question.id] for question in questions]
        asked = {question.id for question in questions}
        others = [answer for key, answer in candidate.kept.items() if key not in asked]
        file.lines.rewrite(answer.as_record() for answer in (*answers, *others))
    made = len(candidate.kept) - before
    return ModelAnswers(candidate.name, candidate.prompting.kind, file.path, answers, seconds, made)


def _make_missing(candidate: Candidate, questions: Sequence[Question], options: AnswerOptions) -> None:
    from peftchat.models.padded_prompts import needs_single_prompts

    size = options.batch_size
    single = needs_single_prompts(candidate.generation)
    if single is not None and size > 1:
        size = 1
        note = f"{candidate.name}: its {single} looks at padding too, so prompts are answered one by one."
        stderr.print(note, style="dim", markup=False)
    batches = [
        batch
        for batch in plan_batches(candidate, questions, size)
        if any(question.id not in candidate.kept for question in batch)
    ]
    stderr.print(f"Loading {candidate.model} …", style="dim", markup=False)
    chat = _load(candidate, options)
    with CountProgress(candidate.name, len(questions), len(candidate.kept)) as progress:
        for batch in batches:
            new = []
            for answer in answer_batch(chat, candidate, batch, _seed(options)):
                # A batch is computed as a whole, also where some of it is kept: so it is the same batch as before.
                if answer.question.id not in candidate.kept:
                    new.append(answer)
            candidate.file.lines.append(answer.as_record() for answer in new)
            candidate.kept |= {answer.question.id: answer for answer in new}
            progress.advance(len(new), sum(turn.tokens for answer in new for turn in answer.turns))
    del chat
    gc.collect()


def _load(candidate: Candidate, options: AnswerOptions) -> ChatModel:
    chat = load_for_chat(
        candidate.model,
        base=_base_of(candidate.model, options),
        allow_changed=options.allow_changed,
        needs_template=candidate.prompting.kind == "template",
    )
    if options.dtype != "float32":
        return chat
    if getattr(chat.model, "is_quantized", False) or getattr(chat.model.config, "quantization_config", None):
        hint = "Leave --dtype out."
        raise UserError("the model is quantized and stays in its own dtype", where="--dtype float32", hint=hint)
    return dataclasses.replace(chat, model=chat.model.float())


def plan_batches(candidate: Candidate, questions: Sequence[Question], size: int) -> list[list[Question]]:
    """Divide questions into batches of similar length; the plan does not depend on what is answered already."""
    lengths = [len(candidate.encode((*item.before, Message("user", item.turns[0]))).ids) for item in questions]
    order = sorted(range(len(questions)), key=lambda index: (len(questions[index].turns), lengths[index]))
    return [[questions[index] for index in order[start : start + size]] for start in range(0, len(order), size)]


def answer_batch(chat: ChatModel, candidate: Candidate, questions: Sequence[Question], seed: int) -> Iterator[Answer]:
    """Answer the turns of several questions, turn by turn.

    Raises:
        UserError: a later turn does not fit into the model's context.
    """
    from peftchat.answering.batch import generate_batch, seed_of

    started = time.monotonic()
    histories = [list(question.before) for question in questions]
    given: list[list[TurnAnswer]] = [[] for _ in questions]
    for turn in range(max(len(question.turns) for question in questions)):
        rows = [row for row, question in enumerate(questions) if turn < len(question.turns)]
        for row in rows:
            histories[row].append(Message("user", questions[row].turns[turn]))
        prompts = [candidate.encode(histories[row]) for row in rows]
        seeds = [seed_of(seed, questions[row].id, turn) for row in rows]
        answers = generate_batch(
            chat, candidate.prompting, [prompt.ids for prompt in prompts], candidate.generation,
            candidate.new_tokens, seeds,
        )  # fmt: skip
        for row, prompt, answer in zip(rows, prompts, answers, strict=True):
            histories[row].append(Message("assistant", answer.text))
            given[row].append(TurnAnswer(answer.text, answer.finish, len(answer.ids), len(prompt.ids), prompt.dropped))
    share = (time.monotonic() - started) / len(questions)
    for question, turns in zip(questions, given, strict=True):
        yield Answer(question, candidate.name, tuple(turns), share)
