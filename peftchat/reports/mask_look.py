"""Everything `peftchat mask` can tell about one side of a recipe's data."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

from peftchat.chat_template.examples import EncodedExample
from peftchat.chat_template.loss_mask import IGNORE_INDEX, loss_mask_table, role_of
from peftchat.chat_template.registry import ChatFormat, make_format
from peftchat.conversations import ProblemLog, read_sources
from peftchat.dataset.cache import EncodedSplit, Split, encode_splits, reject_truncation
from peftchat.errors import UserError, VerificationError
from peftchat.models.loading import load_tokenizer
from peftchat.recipe import Recipe
from peftchat.reports.mask_rows import RowReader, ShownRow
from peftchat.reports.mask_summary import MaskSummary, summarise
from peftchat.training.mask_survey import survey_mask, trained_tokens


@dataclass(frozen=True, slots=True)
class MaskLook:
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

    def shown(self, limit: int | None) -> Iterator[ShownRow]:
        """The first `limit` rows (None: all) and, if rows were shortened, at least one of those."""
        reader = RowReader(self.chat.tokenizer, loss_mask_table(self.recipe.chat.loss_on))
        pairs: Iterable[tuple[EncodedExample, EncodedExample]]
        # A divided dialogue stands whole in its rows.
        if not self.rows.stats.shortened or self.recipe.data.truncation == "split":
            pairs = ((row, row) for row in islice(self.rows.store, limit))
        else:
            pairs = reject_truncation(self.recipe, self.chat, self.side, self._with_a_shortened_one(limit))
        for row, whole in pairs:
            yield reader.read(row, whole)

    def _with_a_shortened_one(self, limit: int | None) -> Iterator[EncodedExample]:
        shortened = set(self.rows.stats.named["shortened"])
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


def look_at_mask(recipe: Recipe, side: Split, progress: Callable[[int], None]) -> MaskLook:
    """Encode a recipe's data, or take what is encoded already, and check the mask of every row.

    Args:
        recipe: nothing of what it refuses ends the look; it is named in the summary's failures.
        side: train or eval.
        progress: as in `encode_splits`.

    Raises:
        CheckFailed: no dialogue has an answer.
        InputError: the recipe holds nothing out, or a source cannot be read.
    """
    if side == "eval" and not recipe.data.has_eval:
        raise UserError("the recipe holds nothing out", where="data", cure="Set data.eval or data.eval_fraction.")
    chat = make_format(recipe.chat.template, recipe.chat.system, load_tokenizer(recipe))
    lenient = _lenient(recipe)
    try:
        rows = encode_splits(lenient, chat, progress)[side]
    except UserError as error:
        if _nobody_answers(recipe):
            raise VerificationError(f"everything is masked: no dialogue has an answer ({error})") from error
        raise
    survey = survey_mask(iter(rows.store), recipe.chat.loss_on)
    return MaskLook(lenient, chat, side, rows, summarise(recipe, side, rows, survey))


def _lenient(recipe: Recipe) -> Recipe:
    """The recipe with nothing refused, so that one sees all there is to refuse instead of the first of it."""
    chat = {"special_text": "text", "empty_rows": "drop"}
    data = {"truncation": "drop"} if recipe.data.truncation == "refuse" else {}
    return recipe.model_copy(
        update={"chat": recipe.chat.model_copy(update=chat), "data": recipe.data.model_copy(update=data)}
    )


def _nobody_answers(recipe: Recipe) -> bool:
    """Whether the training sources hold nothing but dialogues without an answer."""
    log = ProblemLog()
    try:
        usable = any(True for _ in read_sources(recipe.data.train, recipe.training.seed, problems=log))
    except UserError:
        return False
    return not usable and log.total > 0 and log.problems["no_answer"] == log.total
