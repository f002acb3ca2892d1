"""Encoding: conversations as examples that fit and have something to learn, with counts of the others."""

import gc
import itertools
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from peftchat.chat_template.encoder import ChatEncoder
from peftchat.chat_template.examples import EncodedExample, ExampleBatch
from peftchat.chat_template.loss_mask import loss_mask_table, text_table
from peftchat.chat_template.message_text import message_text
from peftchat.conversation import Conversation, Role
from peftchat.conversations.dataset_card import SKIPPED, printable_name
from peftchat.conversations.problems import NOTES
from peftchat.dataset.truncation import truncate_to_fit
from peftchat.errors import UserError
from peftchat.forked_worker import ForkedWorker, usable_cores

if TYPE_CHECKING:
    from peftchat.recipe import Recipe


_MAX_SOURCES = 5
_ROLE_NOTES = {"merge_into_user": "written as text of the user's turns", "drop": "dropped"}


@dataclass(slots=True)
class EncodingStats:
    """Counts of the conversations of one split.

    Attributes:
        examples: examples kept; of preference pairs, the pairs.
        by_source: those of each source of the split, in the order of the recipe.
        tokens: their tokens.
        supervised: their tokens with a target.
        dropped: conversations and examples left out, by reason.
        first_sources: the first few sources of each reason, and of `truncated` and `split`.
        truncated: conversations that lost rounds to fit `data.max_length`.
        rounds_dropped: rounds lost that way.
        split: conversations that became several examples to fit.
        split_examples: those examples.
        expanded: conversations that became several examples because the template rewrites earlier turns.
        expanded_examples: those examples.
        special_token_text: stretches of text spelled like a special token, encoded as ordinary text.
        unsupported_roles: messages that the template cannot write, by role and what was done with them.
        ends_only: examples in which the recipe leaves nothing but end tokens to train.
        formats: the format of each source file.
        notes: records that reading changed, by kind of change.
        left_out: records and conversations that a rule of the recipe or a flag of their own leaves out, by rule.
        unused: fields that nothing is trained on, with the number of records that have them and the first.
        remarks: what else a user should know about the data, in sentences.
        labels: of each example kept, whether its answer is a good one; empty where answers have no labels.
    """

    examples: int = 0
    by_source: list[int] = field(default_factory=list)
    tokens: int = 0
    supervised: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    first_sources: dict[str, list[str]] = field(default_factory=dict)
    truncated: int = 0
    rounds_dropped: int = 0
    split: int = 0
    split_examples: int = 0
    expanded: int = 0
    expanded_examples: int = 0
    special_token_text: int = 0
    unsupported_roles: dict[str, int] = field(default_factory=dict)
    ends_only: int = 0
    formats: dict[str, str] = field(default_factory=dict)
    notes: dict[str, int] = field(default_factory=dict)
    left_out: dict[str, int] = field(default_factory=dict)
    unused: dict[str, str] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)
    labels: list[bool] = field(default_factory=list)

    def reading_notes(self) -> Iterator[str]:
        """Yield what reading left out, changed and did not use, each with its count."""
        for rule, number in self.left_out.items():
            yield f"left out: {number} {SKIPPED.get(rule, rule.replace('_', ' '))}"
        for name, number in self.notes.items():
            if name in NOTES:
                yield f"changed: {number} times {NOTES[name]}"
        together: dict[str, list[str]] = {}
        for name, records in self.unused.items():
            together.setdefault(records, []).append(printable_name(name))
        for records, found in together.items():
            yield f"not used: field{'s' if len(found) > 1 else ''} {', '.join(found)} in {records}"
        for kind, number in self.unsupported_roles.items():
            who, policy = kind.rsplit(maxsplit=1)
            who = who.removesuffix("s") if number == 1 else who
            yield f"{_ROLE_NOTES[policy]}: {number} {who}, which the template cannot write"
        if self.ends_only:
            yield f"only end tokens are trained in {self.ends_only:,} of {self.examples:,} examples"
        yield from self.remarks

    def count_dropped(self, reason: str, source: str) -> None:
        """Count an example that is left out."""
        self.dropped[reason] = self.dropped.get(reason, 0) + 1
        self._note_source(reason, source)

    def count_truncated(self, rounds: int, source: str) -> None:
        """Count a conversation that lost rounds."""
        self.truncated += 1
        self.rounds_dropped += rounds
        self._note_source("truncated", source)

    def count_split(self, examples: int, source: str) -> None:
        """Count a conversation that became several examples."""
        self.split += 1
        self.split_examples += examples
        self._note_source("split", source)

    def count_expanded(self, examples: ExampleBatch) -> None:
        """Count the conversations with several examples."""
        for _, found in examples.by_conversation():
            if len(found) > 1:
                self.expanded += 1
                self.expanded_examples += len(found)
                self._note_source("expanded", found[0].source)

    def count_roles(self, batch: Iterable[Conversation], roles: frozenset[Role], policy: str) -> None:
        """Count the messages that the template cannot write, and the calls that go with them."""
        for conversation in batch:
            for message in conversation.messages:
                calls = policy == "drop" and bool(message.tool_calls) and "tool" in roles
                if message.role in roles or calls:
                    kind = f"{'calling' if calls else message.role} messages {policy}"
                    self.unsupported_roles[kind] = self.unsupported_roles.get(kind, 0) + 1

    def _note_source(self, key: str, source: str) -> None:
        sources = self.first_sources.setdefault(key, [])
        if len(sources) < _MAX_SOURCES:
            sources.append(source)


_BATCH = 1024
_RENDERED_BATCH = 128
"""Conversations of a batch that are rendered, which takes about a second."""
_BATCH_CHARACTERS = 2**21
"""Characters of a batch: it then ends even with few conversations, so that long ones do not fill the memory."""
_NEW_OBJECTS = 100_000
_WORKERS = 2
"""Batches in flight: the tokenizer's threads work on one while Python works on the other."""
_SECONDS_ALONE = 2
"""Seconds of encoding after which processes are worth their start."""
_MOST_PROCESSES = 16
"""One process reads and writes what this many encode."""


def encode_conversations(
    recipe: "Recipe", encoder: ChatEncoder, conversations: Iterable[Conversation], stats: EncodingStats
) -> Iterator[ExampleBatch]:
    """Yield batches of examples, in the order of their conversations.

    Args:
        recipe: its `data` and `chat` sections.
        encoder: the encoder of the recipe's chat format.
        conversations: read while earlier ones are encoded.
        stats: the counts to add to.

    Raises:
        UserError: a conversation has something that the recipe makes an error.
    """
    loss_mask = loss_mask_table(recipe.chat.loss_policy)
    text_mask = loss_mask & text_table()
    for batch, examples in encode_ahead(encoder, conversations, encoder.batch):
        if recipe.chat.special_token_text == "error" and examples.special_token_text.any():
            raise special_token_text(examples.sources[int(examples.special_token_text.argmax())])
        if encoder.missing_roles:
            stats.count_roles(batch, encoder.missing_roles, recipe.chat.unsupported_roles)
        if len(examples) > len(batch):
            stats.count_expanded(examples)
        if examples.lengths.max() > recipe.data.max_length:
            examples = _fit_max_length(recipe, encoder, batch, examples, stats)
        supervised = examples.counts(loss_mask)
        if recipe.chat.loss_policy.untrained_parts:
            stats.ends_only += int(((supervised > 0) & (examples.counts(text_mask) == 0)).sum())
        if not supervised.all():
            examples = _keep_trainable(recipe, examples, supervised > 0, stats)
        stats.examples += len(examples)
        stats.tokens += len(examples.ids)
        stats.supervised += int(supervised.sum())
        stats.special_token_text += int(examples.special_token_text.sum())
        yield examples


def encode_ahead(
    encoder: ChatEncoder,
    conversations: Iterable[Conversation],
    encode: Callable[[Sequence[Conversation]], ExampleBatch],
) -> Iterator[tuple[Sequence[Conversation], ExampleBatch]]:
    """Yield each batch with its examples, in order, while the next ones are read and encoded.

    A template that is rendered answer by answer keeps Python at work, which threads do not share. Where it takes more
    than a moment, several processes go on with it.

    Args:
        encoder: tells whether batches can be encoded at the same time, and what keeps it at work.
        conversations: read while earlier ones are encoded.
        encode: encodes a batch.

    Raises:
        UserError: the template cannot write one of them, or a process was ended from outside.
    """
    batches = _batches(conversations, _RENDERED_BATCH if encoder.renders else _BATCH)
    processes = usable_cores() if encoder.renders else 1
    began = time.monotonic()

    def is_long() -> bool:
        return processes > 1 and time.monotonic() - began > _SECONDS_ALONE

    with _seldom_collected():
        yield from _in_threads(encode, batches, _WORKERS if encoder.parallel else 1, is_long)
        # No thread is at work here, so that a fork finds no lock held.
        first = next(batches, None)
        if first is not None:
            with _EncodingProcesses(encode, min(processes, _MOST_PROCESSES)) as pool:
                yield from _in_threads(pool.encode, itertools.chain([first], batches), pool.size)


def _in_threads(
    encode: Callable[[Sequence[Conversation]], ExampleBatch],
    batches: Iterator[list[Conversation]],
    workers: int,
    is_over: Callable[[], bool] = lambda: False,
) -> Iterator[tuple[Sequence[Conversation], ExampleBatch]]:
    """Yield batches with their examples; no more of them are taken once `is_over`."""
    waiting: deque[tuple[Sequence[Conversation], Future[ExampleBatch]]] = deque()
    with ThreadPoolExecutor(workers) as pool:
        try:
            for batch in batches:
                waiting.append((batch, pool.submit(encode, batch)))
                if len(waiting) > workers:
                    done, examples = waiting.popleft()
                    yield done, examples.result()
                if is_over():
                    break
            while waiting:
                done, examples = waiting.popleft()
                yield done, examples.result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


class _EncodingProcesses:
    """Forks of this process that encode batches.

    Args:
        encode: encodes a batch.
        size: how many there are at most.
    """

    def __init__(self, encode: Callable[[Sequence[Conversation]], ExampleBatch], size: int) -> None:
        self.size = size
        self._encode = encode
        self._workers: list[ForkedWorker[Sequence[Conversation], ExampleBatch]] = []
        self._free: SimpleQueue[ForkedWorker[Sequence[Conversation], ExampleBatch]] = SimpleQueue()

    def __enter__(self) -> "_EncodingProcesses":
        with suppress(OSError):  # a limit of processes or memory: those that could be started do
            while len(self._workers) < self.size:
                self._workers.append(ForkedWorker(self._in_worker, "encodes conversations"))
                self._free.put(self._workers[-1])
        self.size = max(1, len(self._workers))
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._workers:
            worker.end()

    def _in_worker(self, batch: Sequence[Conversation]) -> ExampleBatch:
        # The threads of the tokenizer were not forked, and the other processes need the cores.
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        return self._encode(batch)

    def encode(self, batch: Sequence[Conversation]) -> ExampleBatch:
        """Return the examples of a batch, which a process that is free makes."""
        if not self._workers:
            return self._encode(batch)
        worker = self._free.get()
        try:
            worker.ask(batch)
            found = worker.fetch()
        finally:
            self._free.put(worker)
        # Whatever it is that fails there shall say so here.
        return self._encode(batch) if found is None else found


@contextmanager
def _seldom_collected() -> Iterator[None]:
    """Let the garbage collector look less often: a batch is tens of thousands of small objects, none in a cycle.

    It looked at all objects of the process again and again, which was up to two fifths of the time.
    """
    before = gc.get_threshold()
    gc.set_threshold(_NEW_OBJECTS, *before[1:])
    try:
        yield
    finally:
        gc.set_threshold(*before)


def _batches(conversations: Iterable[Conversation], size: int) -> Iterator[list[Conversation]]:
    batch: list[Conversation] = []
    characters = 0
    for conversation in conversations:
        batch.append(conversation)
        for message in (*conversation.messages, *(conversation.rejected or ())):
            characters += len(message.content)
            if message.reasoning or message.tool_calls:
                characters += len(message_text(message)) - len(message.content)
        if len(batch) == size or characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _fit_max_length(
    recipe: "Recipe", encoder: ChatEncoder, batch: Sequence[Conversation], examples: ExampleBatch, stats: EncodingStats
) -> ExampleBatch:
    """Return the examples that fit, and the others cut by `data.truncation`."""
    limit, policy = recipe.data.max_length, recipe.data.truncation
    kept: list[EncodedExample] = []
    for number, whole in examples.by_conversation():
        conversation, length = batch[number], max(len(example.ids) for example in whole)
        if length <= limit:
            kept += whole
            continue
        if policy == "error":
            raise UserError(
                f"the conversation has {length} tokens, and data.max_length is {limit}",
                where=conversation.source or None,
                hint="Raise data.max_length, or set data.truncation: turns, drop_first_turns, split or drop.",
            )
        if policy == "drop":
            stats.count_dropped("too_long", conversation.source)
            continue
        truncated = truncate_to_fit(conversation, length, encoder, limit, policy)
        kept += truncated.examples
        if not truncated.examples:
            stats.count_dropped("too_long", conversation.source)
        elif truncated.lost:
            stats.count_truncated(truncated.lost, conversation.source)
        if policy == "split" and len(truncated.examples) > 1:
            stats.count_split(len(truncated.examples), conversation.source)
    return ExampleBatch.of(kept)


def _keep_trainable(
    recipe: "Recipe", examples: ExampleBatch, has_targets: npt.NDArray[np.bool_], stats: EncodingStats
) -> ExampleBatch:
    """Return the examples with a target."""
    kept: list[EncodedExample] = []
    for example, trainable in zip(examples, has_targets, strict=True):
        if trainable:
            kept.append(example)
        elif recipe.chat.untrainable_examples == "error":
            raise UserError(
                f"the conversation has no token to train on by chat.loss_on: {recipe.chat.loss_policy}",
                where=example.source or None,
                hint="Remove the conversation, or set chat.untrainable_examples: drop.",
            )
        else:
            stats.count_dropped("nothing_to_learn", example.source)
    return ExampleBatch.of(kept)


def special_token_text(source: str) -> UserError:
    """Return the error of a message with text spelled like a special token."""
    return UserError(
        "a message has text spelled like a special token, and chat.special_token_text is `error`",
        where=source or None,
        hint="Remove the text, or set chat.special_token_text: escape to train on it as ordinary text.",
    )
