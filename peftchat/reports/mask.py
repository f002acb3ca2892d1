"""Rows as people look at them: readable text, and what each stretch of it is."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from peftchat.chat_template.chat_format import ChatFormat, make_format
from peftchat.chat_template.examples import EncodedExample
from peftchat.chat_template.loss_mask import IGNORE_INDEX, TurnPart, loss_mask_table, part_of, role_of
from peftchat.chat_template.text_encoder import special_tokens
from peftchat.conversation import Role
from peftchat.conversations import ProblemLog, read_sources
from peftchat.dataset.cache import EncodedSplit, Split, encode_splits, with_full_examples
from peftchat.errors import UserError, VerificationError
from peftchat.models.source import ModelSource
from peftchat.recipe import Recipe
from peftchat.reports.mask_summary import MaskSummary, summarize, survey_mask, trained_tokens, turn_starts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class ShownToken:
    """One token; several, where only together they spell a character.

    Attributes:
        text: what it reads as.
        ids: its id or ids.
        role: of the turn it belongs to, None outside the turns.
        part: of that turn.
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
    """One row.

    Attributes:
        source: where its conversation came from.
        tokens: what is in the row.
        cut: what the conversation held besides, before it was made to fit.
        cut_at: how many of `tokens` stood before that.
    """

    source: str
    tokens: tuple[ShownToken, ...]
    cut: tuple[ShownToken, ...]
    cut_at: int

    @property
    def laid_out(self) -> Iterator[tuple[ShownToken, bool]]:
        """The tokens of the whole conversation, in order, and whether each is cut."""
        yield from ((token, False) for token in self.tokens[: self.cut_at])
        yield from ((token, True) for token in self.cut)
        yield from ((token, False) for token in self.tokens[self.cut_at :])

    @property
    def length(self) -> int:
        """Tokens in the row."""
        return sum(len(token.ids) for token in self.tokens)

    @property
    def trained(self) -> int:
        """Tokens in the row that are targets."""
        return sum(len(token.ids) for token in self.tokens if token.trained)


class ExampleReader:
    """Turns encoded rows into readable ones.

    Args:
        tokenizer: the one that encoded them.
        table: of the policy, bool, shape (256,).
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", table: npt.NDArray[np.bool_]) -> None:
        self._tokenizer = tokenizer
        self._table = table
        self._special = frozenset(special_tokens(tokenizer).values())

    def read(self, row: EncodedExample, whole: EncodedExample) -> ShownExample:
        """The row, and what it lost.

        Args:
            row: as it is trained.
            whole: the same conversation before it was made to fit; the row itself where nothing was cut.
        """
        start, stop = _cut(row, whole)
        before = _part(row, 0, start)
        lost = _part(whole, start, stop)
        trained = trained_tokens(row.codes, self._table)
        head = tuple(self._tokens(before, trained[:start]))
        return ShownExample(
            row.source,
            (*head, *self._tokens(_part(row, start, len(row.ids)), trained[start:])),
            tuple(self._tokens(lost, np.zeros(len(lost.ids), dtype=bool))),
            len(head),
        )

    def _tokens(self, row: EncodedExample, trained: npt.NDArray[np.bool_]) -> Iterator[ShownToken]:
        start = 0
        for stop, text in self._texts(row.ids.tolist()):
            value = int(row.codes[stop - 1])
            ids = tuple(row.ids[start:stop].tolist())
            special = not self._special.isdisjoint(ids)
            yield ShownToken(text, ids, role_of(value), part_of(value), bool(trained[stop - 1]), special)
            start = stop

    def _texts(self, ids: Sequence[int]) -> Iterator[tuple[int, str]]:
        """Stretches of text, each with the place behind its last token."""
        if not self._tokenizer.is_fast:
            yield from enumerate(self._tokenizer.convert_ids_to_tokens(list(ids)), start=1)
            return
        from tokenizers.decoders import DecodeStream

        stream = DecodeStream(skip_special_tokens=False)
        backend = self._tokenizer.backend_tokenizer
        spelled = 0
        for place, token_id in enumerate(ids, start=1):
            text = stream.step(backend, token_id)
            # None: so far these are only the first bytes of a character.
            if text is not None:
                yield place, text
                spelled = place
        if spelled < len(ids):
            yield len(ids), "\N{REPLACEMENT CHARACTER}"


def _part(row: EncodedExample, start: int, stop: int) -> EncodedExample:
    return EncodedExample(row.ids[start:stop], row.codes[start:stop], row.source, 0)


def _cut(row: EncodedExample, whole: EncodedExample) -> tuple[int, int]:
    """The stretch of the whole row that the row lacks, from the start of a turn on."""
    missing = len(whole.ids) - len(row.ids)
    for start in (len(row.ids), *reversed(turn_starts(row.codes).tolist())):
        head_fits = np.array_equal(row.ids[:start], whole.ids[:start])
        if missing >= 0 and head_fits and np.array_equal(row.ids[start:], whole.ids[start + missing :]):
            return start, start + missing
    # A template that writes a conversation differently once it is shorter.
    shared = min(len(row.ids), len(whole.ids))
    differing = np.flatnonzero(row.ids[:shared] != whole.ids[:shared])
    return (int(differing[0]) if len(differing) else shared), len(whole.ids)


_PICTURES = {code: 0x2400 + code for code in range(0x20) if chr(code) not in "\n\t"}
_PICTURES |= {0x7F: 0x2421} | dict.fromkeys(
    [*range(0x80, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A)], 0xFFFD
)


def escape_control_chars(text: str) -> str:
    """The text without characters that would command a terminal or turn the direction of a page's text."""
    return text.translate(_PICTURES)


@dataclass(frozen=True, slots=True)
class MaskReport:
    """The rows of one side and their mask.

    Attributes:
        recipe: what they were encoded by.
        chat: its format.
        side: train or eval.
        rows: as training gets them, before packing.
        summary: counts and checks over all of them.
    """

    recipe: Recipe
    chat: ChatFormat
    side: Split
    rows: EncodedSplit
    summary: MaskSummary

    def shown(self, limit: int | None) -> Iterator[ShownExample]:
        """The first `limit` rows (None: all) and, if rows were shortened, at least one of those."""
        reader = ExampleReader(self.chat.tokenizer, loss_mask_table(self.recipe.chat.loss_on))
        pairs: Iterable[tuple[EncodedExample, EncodedExample]]
        # A divided conversation stands whole in its rows.
        if not self.rows.stats.truncated or self.recipe.data.truncation == "split":
            pairs = ((row, row) for row in islice(self.rows.store, limit))
        else:
            pairs = with_full_examples(self.recipe, self.chat, self.side, self._with_a_shortened_one(limit))
        for row, whole in pairs:
            yield reader.read(row, whole)

    def _with_a_shortened_one(self, limit: int | None) -> Iterator[EncodedExample]:
        shortened = set(self.rows.stats.first_sources["truncated"])
        stream = iter(self.rows.store)
        for row in islice(stream, limit):
            shortened -= shortened if row.source in shortened else set()
            yield row
        if limit and shortened:
            yield from islice((row for row in stream if row.source in shortened), 1)

    def as_json(self, limit: int | None) -> Iterator[dict[str, Any]]:
        """The first `limit` rows (None: all): four lists of one length, with the row's number, from 0, and source."""
        table = loss_mask_table(self.recipe.chat.loss_on)
        for number, row in enumerate(islice(self.rows.store, limit)):
            ids = row.ids.tolist()
            trained = trained_tokens(row.codes, table)
            yield {
                "row": number,
                "source": row.source,
                "input_ids": ids,
                "labels": [token_id if target else IGNORE_INDEX for token_id, target in zip(ids, trained, strict=True)],
                "tokens": self.chat.tokenizer.convert_ids_to_tokens(ids),
                "roles": [role_of(value) for value in row.codes.tolist()],
            }


def inspect_mask(recipe: Recipe, side: Split, progress: Callable[[int], None]) -> MaskReport:
    """Encode a recipe's data, or take what is encoded already, and check the mask of every row.

    Args:
        recipe: nothing of what it refuses ends the look; it is named in the summary's failures.
        side: train or eval.
        progress: as in `encode_splits`.

    Raises:
        VerificationError: no conversation has an answer.
        UserError: the recipe holds nothing out, or a source cannot be read.
    """
    if side == "eval" and not recipe.data.has_eval:
        raise UserError("the recipe holds nothing out", where="data", hint="Set data.eval or data.eval_fraction.")
    chat = make_format(recipe.chat.template, recipe.chat.system, ModelSource.of_recipe(recipe).tokenizer())
    lenient = _lenient(recipe)
    try:
        rows = encode_splits(lenient, chat, progress)[side]
    except UserError as error:
        if _nobody_answers(recipe):
            raise VerificationError(f"everything is masked: no conversation has an answer ({error})") from error
        raise
    survey = survey_mask(iter(rows.store), recipe.chat.loss_on)
    return MaskReport(lenient, chat, side, rows, summarize(recipe, side, rows, survey))


def _lenient(recipe: Recipe) -> Recipe:
    """The recipe with nothing refused, so that one sees all there is to refuse instead of the first of it."""
    chat = {"special_text": "text", "empty_rows": "drop"}
    data = {"truncation": "drop"} if recipe.data.truncation == "refuse" else {}
    return recipe.model_copy(
        update={"chat": recipe.chat.model_copy(update=chat), "data": recipe.data.model_copy(update=data)}
    )


def _nobody_answers(recipe: Recipe) -> bool:
    """Whether the training sources hold nothing but conversations without an answer."""
    log = ProblemLog()
    try:
        usable = any(True for _ in read_sources(recipe.data.train, recipe.training.seed, problems=log))
    except UserError:
        return False
    return not usable and log.total > 0 and log.problems["no_answer"] == log.total
