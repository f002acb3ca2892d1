"""The files of a merged model beside its weights, the check of what was written, and the report."""

import copy
import dataclasses
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from peftchat.console import stderr
from peftchat.errors import UserError, VerificationError
from peftchat.merging.combination import Combination
from peftchat.merging.merge_plan import MergePlan
from peftchat.merging.qlora_base import BaseKind
from peftchat.models.safetensors_files import SafetensorsCheckpoint
from peftchat.models.savable import mend_generation_settings
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

COPIED = (*_TOKENIZER, GENERATION_CONFIG)
"""Files that come from the run or the base as they are."""

UNVERIFIED_CONFIG = "config.unverified.json"
"""The config's name until the merge is verified: no loader accepts a folder without `config.json`."""


def write_index(folder: Path, plan: MergePlan) -> None:
    """Write the index of the shards; a single `model.safetensors` needs none."""
    if tuple(plan.shards) == (WEIGHTS,):
        return
    weight_map = {tensor.spec.name: file for file, tensors in plan.shards.items() for tensor in tensors}
    index = {"metadata": {"total_size": plan.bytes}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / WEIGHTS_INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def with_other_modalities(config: Any, base: Any) -> Any:
    """Return the base's config with this one as its text part, where the base is more than its language model.

    Its weights keep their names, those of the other parts among them. The text part alone names no architecture.

    Args:
        config: of the causal language model, with the merged vocabulary size.
        base: the base's config.
    """
    part = next((name for name in base.sub_configs if type(getattr(base, name, None)) is type(config)), None)
    if type(config) is type(base) or part is None:
        return config
    whole = copy.deepcopy(base)
    setattr(whole, part, config)
    return whole


def write_config_and_tokenizer(
    folder: Path, config: Any, run: Path, base: Path, *, untied: bool, dtype: torch.dtype | None
) -> None:
    """Write the config (see `make_loadable`), `generation_config.json`, tokenizer, chat template and remote code.

    They come from the run. An adapter without a tokenizer was trained with the base's, so that one is copied.

    Args:
        folder: the merged model.
        config: the model's config, with the merged vocabulary size.
        run: the adapter's folder.
        base: the base's folder, which may hold remote code.
        untied: the output head no longer shares the embedding's weight.
        dtype: dtype of the merged weights.
    """
    has_tokenizer = any((run / name).is_file() for name in _TOKENIZER)
    for name in _TOKENIZER:
        source = (run if has_tokenizer else base) / name
        if source.is_file():
            shutil.copyfile(source, folder / name)
    for code in base.glob("*.py"):
        shutil.copyfile(code, folder / code.name)
    generation = next((path for path in (run / GENERATION_CONFIG, base / GENERATION_CONFIG) if path.is_file()), None)
    _pad_on_left(folder / "tokenizer_config.json")
    _write_generation_settings(folder, config, generation)
    if generation is not None:
        for name, value in _special_ids(generation).items():
            setattr(config, name, value)
            setattr(config.get_text_config(), name, value)
    if untied:
        config.tie_word_embeddings = config.get_text_config().tie_word_embeddings = False
    config.dtype = dtype
    config.save_pretrained(folder)
    (folder / MODEL_CONFIG).rename(folder / UNVERIFIED_CONFIG)


def _pad_on_left(tokenizer_config: Path) -> None:
    """Let the merged model's tokenizer pad on the left, whatever saved it: batched generation needs it."""
    if not tokenizer_config.is_file():
        return
    settings = json.loads(tokenizer_config.read_text(encoding="utf-8"))
    if settings.get("padding_side") != "left":
        settings["padding_side"] = "left"
        tokenizer_config.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _write_generation_settings(folder: Path, config: Any, source: Path | None) -> None:
    """Write the generation settings, mended where transformers would not save them, and tell what was mended."""
    from transformers import GenerationConfig

    settings = GenerationConfig() if source is None else GenerationConfig.from_pretrained(str(source.parent))
    notes = mend_generation_settings(config, settings)
    for note in notes:
        stderr.print(f"Note: {note}", markup=False, highlight=False)
    if notes:
        settings.save_pretrained(str(folder))
    elif source is not None:
        shutil.copyfile(source, folder / GENERATION_CONFIG)


def read_model_config(folder: Path) -> Any:
    """Load the config of a merged folder, whether it is verified yet or not."""
    from transformers import AutoConfig

    unverified = folder / UNVERIFIED_CONFIG
    return AutoConfig.from_pretrained(str(unverified if unverified.is_file() else folder / MODEL_CONFIG))


def make_loadable(folder: Path) -> None:
    """Rename the config to `config.json`, so that loaders accept the folder."""
    (folder / UNVERIFIED_CONFIG).rename(folder / MODEL_CONFIG)


def _special_ids(generation: Path) -> dict[str, Any]:
    """Return the end and padding ids of the run's generation settings."""
    settings = json.loads(generation.read_text(encoding="utf-8"))
    return {name: settings[name] for name in ("eos_token_id", "pad_token_id") if settings.get(name) is not None}


def check_written(folder: Path, plan: MergePlan) -> None:
    """Check names, dtypes, shapes and sizes of all tensors in the merged folder.

    `ShardBuilder` has already checked that all values are finite.

    Raises:
        VerificationError: names the first tensor that differs from the plan.
    """
    try:
        written = SafetensorsCheckpoint.open(folder).entries
    except UserError as error:
        raise VerificationError(f"the merged folder cannot be read back: {error}") from error
    planned = {tensor.spec.name: tensor.spec for tensors in plan.shards.values() for tensor in tensors}
    if written.keys() != planned.keys():
        first = sorted(written.keys() ^ planned.keys())[0]
        raise VerificationError(f"{folder}: the written tensors are not the planned ones, the first is {first}")
    for name, spec in planned.items():
        entry = written[name]
        if (entry.dtype, entry.shape) != (spec.dtype, spec.shape):
            raise VerificationError(
                f"{folder}: {name} is {entry.dtype} {list(entry.shape)}, expected {spec.dtype} {list(spec.shape)}"
            )
        if entry.bytes == 0:
            raise VerificationError(f"{folder}: {name} has no elements")


REPORT_NAME = "merge_report.json"


@dataclass(frozen=True)
class Verification:
    """Comparison of the merged model with base + adapter: logits in float32, on the same prompts.

    Attributes:
        passed: `max_difference` and `kl` are within their tolerances.
        verdict: the result in one sentence.
        reference: how base + adapter were computed.
        prompts, positions: number of prompts and of compared positions.
        special_tokens: ids of trained tokens that occur in the prompts.
        max_difference, mean_difference: of two logits, as a fraction of `logit_range`.
        logit_range: largest minus smallest logit of the reference.
        kl: mean Kullback-Leibler divergence, reference to merged, in nats per position.
        top1_agreement: fraction of positions where both have the same most likely token.
        tolerance_max, tolerance_kl: the limits for `max_difference` and `kl`, by the dtype of the merged weights.
        seconds: time of the comparison.
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
    top1_agreement: float
    tolerance_max: float
    tolerance_kl: float
    seconds: float


@dataclass(frozen=True)
class MergedBase:
    """The base of a merge.

    Attributes:
        name: hub id or folder.
        kind: the original weights, or those that a QLoRA run was trained on.
        distance_original, distance_dequantized: relative distance of each merged result to the trained weights; None
            for a run that was not quantized.
    """

    name: str
    kind: BaseKind
    distance_original: float | None = None
    distance_dequantized: float | None = None


@dataclass(frozen=True)
class MergeReport:
    """The report of a merge; `merge_report.json` on disk.

    Attributes:
        base: the base that the adapters were merged into.
        adapters: folder and weight of each adapter.
        method: PEFT type of each adapter.
        dtype: dtype of the merged weights.
        tensors, bytes: number and size of the written tensors; `changed_bytes` of them differ from the base.
        shards: number of files; `resumed_shards` of them are from an interrupted merge.
        vocabulary: rows of the input embedding; `added_rows` of them are not in the base.
        tied: the output head shares the embedding's weight.
        seconds: time of the merge.
        versions: of the libraries.
        files: names of everything in the folder; `--overwrite` replaces a folder that holds nothing else.
        verification: None if it was switched off.
        allowed_changes: what changed since the run was trained, and was allowed.
        combination: how several adapters were combined; None for their weighted sum.
    """

    base: MergedBase
    adapters: list[tuple[str, float]]
    method: list[str]
    dtype: str
    tensors: int
    bytes: int
    changed_bytes: int
    shards: int
    resumed_shards: int
    vocabulary: int
    added_rows: int
    tied: bool
    seconds: float
    versions: dict[str, str]
    files: list[str]
    verification: Verification | None = None
    allowed_changes: tuple[str, ...] = ()
    combination: Combination | None = None

    def as_dict(self) -> dict[str, object]:
        """Return the report as plain values, for JSON."""
        return dataclasses.asdict(self)


def write_report(folder: Path, report: MergeReport) -> None:
    """Write `merge_report.json` into `folder`."""
    (folder / REPORT_NAME).write_text(json.dumps(report.as_dict(), indent=2) + "\n", encoding="utf-8")
