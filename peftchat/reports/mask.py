"""Mask report: the encoded examples of a recipe as readable text, with what each token is."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from peftchat.chat_template.chat_format import ChatFormat
from peftchat.chat_template.examples import EncodedExample
from peftchat.chat_template.loss_mask import IGNORE_INDEX, TurnPart, loss_mask_table, part_of, role_of
from peftchat.chat_template.text_encoder import special_tokens
from peftchat.conversation import Role
from peftchat.conversations import ProblemLog, read_sources
from peftchat.dataset.cache import EncodedSplit, Split, encode_splits, with_full_examples
from peftchat.dataset.pairs import LABELED_SIDES, SIDES
from peftchat.errors import UserError, VerificationError
from peftchat.models.source import ModelSource
from peftchat.recipe import Recipe
from peftchat.reports.mask_summary import MaskSummary, summarize, survey_mask, trained_tokens, turn_starts
from peftchat.training.context import chat_format_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class ShownToken:
    """One token, or several that together encode one character.

    Attributes:
        text: the decoded text.
        ids: the token ids.
        role: the role of its turn; None outside the turns.
        part: the part of that turn.
        trained: whether it is a target.
        special: whether it is a special token.
    """

    text: str
    ids: tuple[int, ...]
    role: Role | None
    part: TurnPart
    trained: bool
    special: bool


@dataclass(frozen=True, slots=True)
class ShownExample:
    """One example with the tokens that truncation removed.

    Attributes:
        source: the `file:line` of its conversation.
        tokens: the tokens of the example.
        removed: the tokens that truncation removed.
        removed_at: how many of `tokens` precede them.
    """

    source: str
    tokens: tuple[ShownToken, ...]
    removed: tuple[ShownToken, ...]
    removed_at: int

    @property
    def all_tokens(self) -> Iterator[tuple[ShownToken, bool]]:
        """The tokens of the full conversation in order, and whether each was removed."""
        yield from ((token, False) for token in self.tokens[: self.removed_at])
        yield from ((token, True) for token in self.removed)
        yield from ((token, False) for token in self.tokens[self.removed_at :])

    @property
    def length(self) -> int:
        """The number of tokens."""
        return sum(len(token.ids) for token in self.tokens)

    @property
    def trained(self) -> int:
        """The number of tokens that are targets."""
        return sum(len(token.ids) for token in self.tokens if token.trained)


class ExampleReader:
    """Decodes examples into readable ones.

    Args:
        tokenizer: the tokenizer that encoded them.
        table: the loss mask by token tag, bool, shape (256,).
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", table: npt.NDArray[np.bool_]) -> None:
        self._tokenizer = tokenizer
        self._table = table
        self._special = frozenset(special_tokens(tokenizer).values())

    def read(self, example: EncodedExample, full: EncodedExample) -> ShownExample:
        """Return the example with the tokens that truncation removed.

        Args:
            example: the example as it is trained.
            full: the same conversation before truncation; the example itself if nothing was removed.
        """
        start, stop = _removed_range(example, full)
        before = _slice(example, 0, start)
        removed = _slice(full, start, stop)
        trained = trained_tokens(example.token_tags, self._table)
        head = tuple(self._tokens(before, trained[:start]))
        return ShownExample(
            example.source,
            (*head, *self._tokens(_slice(example, start, len(example.ids)), trained[start:])),
            tuple(self._tokens(removed, np.zeros(len(removed.ids), dtype=bool))),
            len(head),
        )

    def _tokens(self, example: EncodedExample, trained: npt.NDArray[np.bool_]) -> Iterator[ShownToken]:
        start = 0
        for stop, text in self._texts(example.ids.tolist()):
            value = int(example.token_tags[stop - 1])
            ids = tuple(example.ids[start:stop].tolist())
            special = not self._special.isdisjoint(ids)
            yield ShownToken(text, ids, role_of(value), part_of(value), bool(trained[stop - 1]), special)
            start = stop

    def _texts(self, ids: Sequence[int]) -> Iterator[tuple[int, str]]:
        """Yield pieces of text, each with the index after its last token."""
        if not self._tokenizer.is_fast:
            yield from enumerate(self._tokenizer.convert_ids_to_tokens(list(ids)), start=1)
            return
        from tokenizers.decoders import DecodeStream

        stream = DecodeStream(skip_special_tokens=False)
        backend = self._tokenizer.backend_tokenizer
        decoded = 0
        for place, token_id in enumerate(ids, start=1):
            text = stream.step(backend, token_id)
            # None: the tokens so far are only the first bytes of a character.
            if text is not None:
                yield place, text
                decoded = place
        if decoded < len(ids):
            yield len(ids), "\N{REPLACEMENT CHARACTER}"


def _slice(example: EncodedExample, start: int, stop: int) -> EncodedExample:
    return EncodedExample(example.ids[start:stop], example.token_tags[start:stop], example.source, 0)


def _removed_range(example: EncodedExample, full: EncodedExample) -> tuple[int, int]:
    """Return the range of the full example that the truncated one lacks; it starts with a turn."""
    missing = len(full.ids) - len(example.ids)
    for start in (len(example.ids), *reversed(turn_starts(example.token_tags).tolist())):
        head_fits = np.array_equal(example.ids[:start], full.ids[:start])
        if missing >= 0 and head_fits and np.array_equal(example.ids[start:], full.ids[start + missing :]):
            return start, start + missing
    # Some templates format a shorter conversation differently.
    shared = min(len(example.ids), len(full.ids))
    differing = np.flatnonzero(example.ids[:shared] != full.ids[:shared])
    return (int(differing[0]) if len(differing) else shared), len(full.ids)


_REPLACEMENTS = {code: 0x2400 + code for code in range(0x20) if chr(code) not in "\n\t"}
_REPLACEMENTS |= {0x7F: 0x2421} | dict.fromkeys(
    [*range(0x80, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A)], 0xFFFD
)


def escape_control_chars(text: str) -> str:
    """Replace characters that would control a terminal or change the direction of a page's text."""
    return text.translate(_REPLACEMENTS)


@dataclass(frozen=True, slots=True)
class MaskReport:
    """The encoded examples of one split and their loss mask.

    Attributes:
        recipe: the recipe that they were encoded with.
        chat: its chat format.
        split: train or eval.
        examples: the examples as training reads them, before packing.
        summary: counts and checks over all of them.
    """

    recipe: Recipe
    chat: ChatFormat
    split: Split
    examples: EncodedSplit
    summary: MaskSummary

    @property
    def sides(self) -> tuple[str, str] | None:
        """What the two examples of a pair are called; None for conversations."""
        if not self.recipe.has_pairs:
            return None
        return LABELED_SIDES if self.recipe.has_labels else SIDES

    @property
    def _tables(self) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
        """The loss masks of the two sides of a pair. Beside a labeled answer stands another, which is never trained."""
        table = loss_mask_table(self.recipe.chat.loss_policy)
        return table, np.zeros_like(table) if self.recipe.has_labels else table

    def shown(self, limit: int | None) -> Iterator[ShownExample]:
        """Yield the first `limit` examples (None: all) and, if any were truncated, at least one of those.

        Of pairs, both examples of the first `limit`.
        """
        limit = limit if limit is None or self.sides is None else 2 * limit
        readers = [ExampleReader(self.chat.tokenizer, table) for table in self._tables]
        pairs: Iterable[tuple[EncodedExample, EncodedExample]]
        # A conversation that was split is complete in its examples.
        if not self.examples.stats.truncated or self.recipe.data.truncation == "split":
            pairs = ((example, example) for example in islice(self.examples.store, limit))
        else:
            pairs = with_full_examples(self.recipe, self.chat, self.split, self._with_a_truncated_one(limit))
        for reader, (example, full) in zip(cycle(readers), pairs, strict=False):
            yield reader.read(example, full)

    def _with_a_truncated_one(self, limit: int | None) -> Iterator[EncodedExample]:
        truncated = set(self.examples.stats.first_sources["truncated"])
        stream = iter(self.examples.store)
        for example in islice(stream, limit):
            truncated -= truncated if example.source in truncated else set()
            yield example
        if limit and truncated:
            yield from islice((example for example in stream if example.source in truncated), 1)

    def as_json(self, limit: int | None) -> Iterator[dict[str, Any]]:
        """Yield the first `limit` examples (None: all) as values for JSON: number, source and lists per token."""
        tables, sides = self._tables, self.sides
        for number, example in enumerate(islice(self.examples.store, limit)):
            ids = example.ids.tolist()
            trained = trained_tokens(example.token_tags, tables[number % 2])
            yield {
                "row": number,
                "source": example.source,
                **({} if sides is None else {"side": sides[number % 2]}),
                "input_ids": ids,
                "labels": [token_id if target else IGNORE_INDEX for token_id, target in zip(ids, trained, strict=True)],
                "tokens": self.chat.tokenizer.convert_ids_to_tokens(ids),
                "roles": [role_of(value) for value in example.token_tags.tolist()],
            }


def inspect_mask(recipe: Recipe, split: Split, progress: Callable[[int], None]) -> MaskReport:
    """Encode a recipe's data, or read it from the cache, and check the loss mask of every example.

    Args:
        recipe: the recipe; examples that it rejects are listed in the summary's failures.
        split: train or eval.
        progress: as in `encode_splits`.

    Raises:
        VerificationError: no conversation has an answer.
        UserError: the recipe has no held-out data, or a source cannot be read.
    """
    if split == "eval" and not recipe.data.has_eval:
        raise UserError("the recipe has no held-out data", where="data", hint="Set data.eval or data.eval_fraction.")
    chat = chat_format_of(recipe, ModelSource.of_recipe(recipe).tokenizer())
    lenient = _lenient(recipe)
    try:
        examples = encode_splits(lenient, chat, progress)[split]
    except UserError as error:
        if _has_no_answers(recipe):
            raise VerificationError(f"everything is masked: no conversation has an answer ({error})") from error
        raise
    survey = survey_mask(islice(examples.store, 0, None, 2 if recipe.has_labels else 1), recipe.chat.loss_policy)
    return MaskReport(lenient, chat, split, examples, summarize(recipe, split, examples, survey))


def _lenient(recipe: Recipe) -> Recipe:
    """Return the recipe without rejections, so that all rejected examples are found instead of the first."""
    chat = {"special_token_text": "escape", "untrainable_examples": "drop"}
    data = {"truncation": "drop"} if recipe.data.truncation == "error" else {}
    return recipe.model_copy(
        update={"chat": recipe.chat.model_copy(update=chat), "data": recipe.data.model_copy(update=data)}
    )


def _has_no_answers(recipe: Recipe) -> bool:
    """Return whether no conversation of the training sources has an answer."""
    log = ProblemLog()
    try:
        usable = any(
            True
            for _ in read_sources(
                recipe.data.train, recipe.training.seed, problems=log, consecutive=recipe.data.consecutive
            )
        )
    except UserError:
        return False
    return not usable and log.total > 0 and log.problems["no_answer"] == log.total
