"""The small files of a model folder: everything that is not a weight comes from the trained side."""

import dataclasses
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from peftchat.errors import UserError, VerificationError
from peftchat.merging.merge_plan import MergePlan
from peftchat.merging.qlora_base import SelectedBase
from peftchat.merging.safetensors_io import SafetensorsCheckpoint
from peftchat.models.source import GENERATION_CONFIG, MODEL_CONFIG, WEIGHTS, WEIGHTS_INDEX

_TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "chat_template.jinja",
)

_HIDDEN_CONFIG = "config.unproved.json"
"""The config's name until the merge is proved: no loader takes a folder without `config.json` for a model."""


def write_index(folder: Path, plan: MergePlan) -> None:
    """The index of the shards; a single `model.safetensors` needs none."""
    if tuple(plan.shards) == (WEIGHTS,):
        return
    weight_map = {tensor.spec.name: file for file, tensors in plan.shards.items() for tensor in tensors}
    index = {"metadata": {"total_size": plan.bytes}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / WEIGHTS_INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def write_companions(
    folder: Path, config: Any, run: Path, base: Path, *, untied: bool, dtype: torch.dtype | None
) -> None:
    """Write the config (see `make_loadable`), `generation_config.json`, tokenizer, chat template and remote code.

    A bare adapter that was saved without a tokenizer was trained with the base's, and only then that one is taken.

    Args:
        folder: the merged model.
        config: the model's config, already grown to the merged vocabulary.
        run: where the trained side's files are.
        base: where remote code is.
        untied: the output head no longer shares the embedding's weight.
        dtype: type of the merged weights.
    """
    trained = [name for name in _TOKENIZER if (run / name).is_file()]
    for name in _TOKENIZER:
        source = (run if trained else base) / name
        if source.is_file():
            shutil.copyfile(source, folder / name)
    for code in base.glob("*.py"):
        shutil.copyfile(code, folder / code.name)
    generation = next((side / GENERATION_CONFIG for side in (run, base) if (side / GENERATION_CONFIG).is_file()), None)
    if generation is not None:
        shutil.copyfile(generation, folder / GENERATION_CONFIG)
        for name, value in _special_ids(generation).items():
            setattr(config, name, value)
    if untied:
        config.tie_word_embeddings = False
    config.dtype = dtype
    config.save_pretrained(folder)
    (folder / MODEL_CONFIG).rename(folder / _HIDDEN_CONFIG)


def read_model_config(folder: Path) -> Any:
    """The config of a merged folder that is not yet proved."""
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(str(folder / _HIDDEN_CONFIG))


def make_loadable(folder: Path) -> None:
    """Give `config.json` its name, which makes the folder a model."""
    (folder / _HIDDEN_CONFIG).rename(folder / MODEL_CONFIG)


def _special_ids(generation: Path) -> dict[str, Any]:
    """End and padding ids as the trained side stops and pads."""
    settings = json.loads(generation.read_text(encoding="utf-8"))
    return {name: settings[name] for name in ("eos_token_id", "pad_token_id") if settings.get(name) is not None}


def check_written(folder: Path, plan: MergePlan) -> None:
    """Open index and shards of the merged folder as any reader would: names, types, shapes, sizes.

    Values were checked for being finite on their way into the file.

    Raises:
        VerificationError: says what differs.
    """
    try:
        written = SafetensorsCheckpoint.open(folder).entries
    except UserError as error:
        raise VerificationError(f"what was written cannot be read back: {error}") from error
    planned = {tensor.spec.name: tensor.spec for tensors in plan.shards.values() for tensor in tensors}
    if written.keys() != planned.keys():
        first = sorted(written.keys() ^ planned.keys())[0]
        raise VerificationError(f"{folder}: the tensors written are not those planned, first {first}")
    for name, spec in planned.items():
        entry = written[name]
        if (entry.dtype, entry.shape) != (spec.dtype, spec.shape):
            raise VerificationError(
                f"{folder}: {name} is {entry.dtype} {list(entry.shape)}, planned {spec.dtype} {spec.shape}"
            )
        if entry.bytes == 0:
            raise VerificationError(f"{folder}: {name} has no elements")


REPORT_NAME = "merge_report.json"


@dataclass(frozen=True)
class Verification:
    """The merged model against base + adapter, both computed in float32, on the same prompts.

    Attributes:
        passed: every figure is within its tolerance.
        verdict: one sentence.
        reference: what stood for base + adapter.
        prompts, positions: how much was compared.
        special_tokens: ids with trained rows that occur in the prompts.
        max_difference, mean_difference: of two logits, as a share of the range of the reference's logits.
        logit_range: largest minus smallest logit of the reference.
        kl: mean Kullback-Leibler divergence, reference to merged, in nats a position.
        same_greedy: share of positions where both sides would choose the same next token.
        tolerance_max, tolerance_kl: the limits for `max_difference` and `kl`, by the type of the merged weights.
    """

    passed: bool
    verdict: str
    reference: str
    prompts: int
    positions: int
    special_tokens: list[int]
    max_difference: float
    mean_difference: float
    logit_range: float
    kl: float
    same_greedy: float
    tolerance_max: float
    tolerance_kl: float
    seconds: float


@dataclass(frozen=True)
class MergeReport:
    """A merge.

    Attributes:
        base: hub id or folder of the base.
        adapters: folder and weight of each adapter.
        choice: which weights of the base, with the measured distances for a quantized run.
        dtype: type of the merged weights.
        tensors, bytes: all that was written; `folded_bytes` of it changed.
        shards: how many files; `resumed_shards` of them were there from an earlier start.
        vocabulary: rows of the input embedding; `grown` of them the base did not have.
        tied: the output head shares the embedding's weight.
        method: the PEFT method of each adapter.
        verification: None if it was switched off.
    """

    base: str
    adapters: list[tuple[str, float]]
    method: list[str]
    choice: SelectedBase
    dtype: str
    tensors: int
    bytes: int
    folded_bytes: int
    shards: int
    resumed_shards: int
    vocabulary: int
    grown: int
    tied: bool
    seconds: float
    versions: dict[str, str]
    verification: Verification | None = None

    def as_dict(self) -> dict[str, object]:
        """Plain values, for JSON."""
        return dataclasses.asdict(self)


def write_report(folder: Path, report: MergeReport) -> None:
    """Write `merge_report.json` into `folder`."""
    (folder / REPORT_NAME).write_text(json.dumps(report.as_dict(), indent=2) + "\n", encoding="utf-8")
