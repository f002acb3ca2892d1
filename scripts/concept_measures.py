"""What the pictures of the concept pages show, as peftchat's own functions give it (`make_concept_pictures.py`)."""

import gc
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from peftchat.chat_template.chat_format import ChatFormat
from peftchat.chat_template.examples import EncodedExample
from peftchat.chat_template.loss_mask import labels_for, loss_mask_table
from peftchat.conversation import Conversation, Message
from peftchat.dataset.cache import EncodedSplit, load_splits
from peftchat.dataset.collator import ChatCollator
from peftchat.dataset.packing import pack
from peftchat.evaluating.evaluated_model import EvaluatedModel
from peftchat.evaluating.paired import paired_ratio
from peftchat.merging import MergeOptions
from peftchat.merging.merge import merge_run
from peftchat.merging.verify import compare_logits
from peftchat.models.added_tokens import resize_embeddings
from peftchat.recipe import Recipe, load_recipe
from peftchat.reports.mask import ExampleReader
from peftchat.runs.eval_losses import read_eval_losses
from peftchat.runs.run_folder import RunFolder
from peftchat.runs.run_summary import RunSummary
from peftchat.training.context import load_chat_format

RECIPE = Path("recipes/demo_cpu.yaml")
PACKED_CONVERSATIONS = 4
"""Of the pack whose isolation is measured."""

CONVERSATION = Conversation(
    (
        Message("user", "Who wrote Emma?"),
        Message("assistant", "Jane Austen, in 1815."),
        Message("user", "Is <|end|> a word?"),
        Message("assistant", "No, it ends a turn."),
    )
)


@cache
def _encoded(path: Path = RECIPE) -> tuple[Recipe, ChatFormat, EncodedSplit]:
    """Return the recipe of a file, its chat format and its held-out conversations."""
    recipe = load_recipe(path, (), to_train=False).recipe
    chat = load_chat_format(recipe)
    return recipe, chat, load_splits(recipe, chat)["eval"]


def shown_tokens(loss_on: Any) -> list[tuple[str, bool]]:
    """Return the text of each token of the conversation, and whether it is trained."""
    _, chat, _ = _encoded()
    (example,) = chat.encoder().encode([CONVERSATION])
    shown = ExampleReader(chat.tokenizer, loss_mask_table(loss_on)).read(example, example)
    return [(token.text.replace("\n", "↵"), token.trained) for token in shown.tokens]


@dataclass(frozen=True)
class PackedExamples:
    """The held-out conversations of the demo: their lengths in tokens, and the packs that hold them."""

    lengths: np.ndarray
    packs: list[list[int]]
    capacity: int


def packed_examples() -> PackedExamples:
    """Pack the demo's held-out conversations."""
    recipe, _, split = _encoded()
    lengths = np.asarray(split.store.lengths, dtype=np.int64)
    packs = pack(lengths, recipe.data.max_length, recipe.training.seed)
    return PackedExamples(lengths, list(packs), recipe.data.max_length)


@dataclass(frozen=True)
class Leak:
    """What a change of the first conversation of a pack does to the logits of each position.

    Attributes:
        positions: the position ids.
        starts: where each conversation begins.
        isolated: the largest change of a logit, with the batch as it is trained.
        one_sequence: the same without position ids, so that all of it counts as one sequence.
    """

    positions: list[int]
    starts: list[int]
    isolated: np.ndarray
    one_sequence: np.ndarray


def leak() -> Leak:
    """Replace the first conversation of a pack and compare the logits."""
    recipe, chat, split = _encoded()
    packs = [one for one in packed_examples().packs if len(one) >= PACKED_CONVERSATIONS]
    examples = packs[0][:PACKED_CONVERSATIONS]
    collator = ChatCollator(
        split.store, loss_on=recipe.chat.loss_policy, layout="packed", pad_token_id=int(chat.tokenizer.pad_token_id)
    )
    batch = collator([{"examples": examples}])
    ids, positions = batch["input_ids"], batch["position_ids"]
    starts = (positions[0] == 0).nonzero().flatten().tolist()
    other = ids.clone()
    other[0, : starts[1]] = (ids[0, : starts[1]] + 1000) % 40000
    model = _base(recipe, chat)
    with torch.no_grad():
        isolated, together = (
            (model(input_ids=other, use_cache=False, **arguments).logits
             - model(input_ids=ids, use_cache=False, **arguments).logits)[0].abs().amax(dim=-1).numpy()
            for arguments in ({"position_ids": positions}, {})
        )  # fmt: skip
    return Leak(positions[0].tolist(), starts, isolated, together)


def _base(recipe: Recipe, chat: ChatFormat) -> Any:
    """Load the base with the added tokens as before the first step, in float32."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(recipe.model.name, dtype=torch.float32).eval()
    resize_embeddings(model, chat.tokenizer, chat.new_tokens, recipe.chat.new_token_init)
    return model


@dataclass(frozen=True)
class TokenMoves:
    """What a run did to the rows of added tokens.

    Attributes:
        moved: for each added token, and for all others together, how far their rows moved.
        before, after: probability of the end token where each held-out answer ends.
    """

    moved: list[tuple[str, float]]
    before: list[float]
    after: list[float]


def token_moves(folder: Path) -> TokenMoves:
    """Compare a run with its base."""
    recipe, chat, split = _encoded(RunFolder(folder).recipe)
    summary = RunSummary.read(RunFolder(folder))
    with tempfile.TemporaryDirectory() as out:
        merged = merge_run(folder, MergeOptions(output=Path(out, "merged"), dtype=torch.float32, verify=False))
        from transformers import AutoModelForCausalLM

        tuned = AutoModelForCausalLM.from_pretrained(merged.folder, dtype=torch.float32).eval()
    base = _base(recipe, chat)
    ids = [token.id for token in summary.new_tokens]
    with torch.no_grad():
        rows = (tuned.get_input_embeddings().weight - base.get_input_embeddings().weight).norm(dim=1)
    others = torch.ones(len(rows), dtype=torch.bool)
    others[ids] = False
    moved = [(f"{token.token} ({token.seen})", token.input_moved or 0.0) for token in summary.new_tokens]
    moved.append((f"{int(others.sum()):,} other rows", float(rows[others].max())))
    end = next(token.id for token in chat.new_tokens if token.token == "<|end|>")
    examples = [split.store[place] for place in range(len(split.store))]
    probabilities = [[p for one in examples for p in _end_probabilities(model, one, end)] for model in (base, tuned)]
    return TokenMoves(moved, *probabilities)


def _end_probabilities(model: Any, example: EncodedExample, end: int) -> list[float]:
    labels = labels_for(example.ids, example.token_tags, loss_mask_table("answers"))
    places = np.flatnonzero(labels == end)
    with torch.no_grad():
        logits = model(input_ids=torch.tensor(example.ids, dtype=torch.int64)[None], use_cache=False).logits[0]
    return [float(logits[place - 1].softmax(-1)[end]) for place in places]


@dataclass(frozen=True)
class Distance:
    """A distance of two sets of logits, and the limit of a merge, if it has one."""

    name: str
    value: float
    limit: float | None


@dataclass(frozen=True)
class MergeDistances:
    """The distances that a merge of a run measures."""

    rows: list[Distance]
    positions: int


def merge_distances(folder: Path) -> MergeDistances:
    """Merge a run in two dtypes, and compare the base with base and adapter."""
    rows, positions = [], 0
    for dtype in (torch.float32, torch.bfloat16):
        with tempfile.TemporaryDirectory() as out:
            report = merge_run(folder, MergeOptions(output=Path(out, "merged"), dtype=dtype)).report
        check = report.verification
        assert check is not None
        positions = check.positions
        rows.append(Distance(f"merged, {report.dtype}", check.max_difference, check.tolerance_max))
    return MergeDistances([Distance("base without adapter", _effect(folder), None), *rows], positions)


def _effect(folder: Path) -> float:
    """Return how far the adapter moves the logits, over held-out conversations."""
    recipe, chat, split = _encoded(RunFolder(folder).recipe)
    logits = []
    for model in (EvaluatedModel.open(str(folder)).load(), _base(recipe, chat)):
        with torch.no_grad():
            found = [model(input_ids=torch.tensor(split.store[n].ids, dtype=torch.int64)[None, :64], use_cache=False)
                     for n in range(min(20, len(split.store)))]  # fmt: skip
        logits.append(torch.cat([one.logits[0].float() for one in found]))
        del model
        gc.collect()
    return compare_logits(*logits).max_difference


@dataclass(frozen=True)
class PairedRuns:
    """Held-out losses by conversation of two runs; each interval is a mean with both ends.

    Attributes:
        first, second: nats per token of each conversation.
        differences: the second minus the first.
        alone: the interval of each run.
        paired: the interval of the difference.
    """

    first: np.ndarray
    second: np.ndarray
    differences: np.ndarray
    alone: list[tuple[float, float, float]]
    paired: tuple[float, float, float]


def paired_losses(first: Path, second: Path) -> PairedRuns:
    """Read the losses that two runs on the same held-out conversations left."""
    runs = [read_eval_losses(RunFolder(folder).eval_losses) for folder in (first, second)]
    assert [one.source for one in runs[0]] == [one.source for one in runs[1]]
    sizes = [one.tokens for one in runs[0]]
    sums = [[sum(part.loss for part in one.parts) for one in run] for run in runs]
    losses = [np.array(total) / np.array(sizes) for total in sums]

    def interval(ours: list[float], theirs: list[float]) -> tuple[float, float, float]:
        found = paired_ratio(ours, theirs, sizes)
        assert found.low is not None and found.high is not None
        return found.mean, found.low, found.high

    alone = [interval(total, [0.0] * len(sizes)) for total in sums]
    return PairedRuns(losses[0], losses[1], losses[1] - losses[0], alone, interval(sums[1], sums[0]))


@dataclass(frozen=True)
class HeldBytes:
    """What the first process of a run held, as the run measured it.

    Attributes:
        name: the strategy and the number of processes.
        weights, optimizer: bytes.
    """

    name: str
    weights: int
    optimizer: int


def held_bytes(folders: list[Path]) -> list[HeldBytes]:
    """Read what runs of several strategies held."""
    found = []
    for folder in folders:
        summary = RunSummary.read(RunFolder(folder))
        assert summary.memory_bytes is not None
        size = summary.world_size or 1
        name = f"{folder.name}, {size} process{'es' if size > 1 else ''}"
        found.append(HeldBytes(name, summary.memory_bytes.trained_weights, summary.memory_bytes.optimizer))
    return found
