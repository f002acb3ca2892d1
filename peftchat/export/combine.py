"""Several adapters of one base combined into one plain LoRA, or into merged weights, with the proof of it.

PEFT's `add_weighted_adapter` is exact for `cat` and `svd` only: its other rules combine LoRA's factors one by one. Here
every rule applies to the updates, and the LoRA is made from the result.
"""

import dataclasses
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any

from peftchat.errors import UserError, VerificationError
from peftchat.export.combined_updates import CombinedUpdates, InstalledInput
from peftchat.export.lora import check_convertible, check_limits, limit_of
from peftchat.export.lora_proof import Comparison, DataPart, Proof
from peftchat.export.lora_writer import (
    MAX_RANK,
    KeptTensors,
    LoraWriter,
    check_lora_output,
    count_parameters,
    refusal,
    search_rank,
    target_modules,
    working_folder,
    written_factors,
)
from peftchat.merging import MergeOptions, MergeResult, merge_run
from peftchat.merging.combination import Combination
from peftchat.merging.combined_inputs import check_content, check_weights_given, open_inputs
from peftchat.merging.merge_job import MergeJob, prepare_merge
from peftchat.merging.output import COPIED
from peftchat.models.source import ADAPTER_CONFIG, read_json
from peftchat.output_paths import replace_folder

if TYPE_CHECKING:
    import torch

    from peftchat.merging.merge_plan import Rounding
    from peftchat.merging.qlora_base import BaseMode

REPORT = "combination.json"
EXACT = 1e-5
"""Largest relative error of a layer where the rank holds the update exactly: some roundings to float32."""

_SUBJECT = "the combination"
_AS_MODEL = "Write merged weights instead: `--as model`."


@dataclass(frozen=True, slots=True)
class CombineOptions:
    """The user's options.

    Attributes:
        output: the folder of the result.
        rule: `linear`, `ties`, `dare_linear`, `dare_ties` or `magnitude_prune`.
        weights: of each adapter; None for those that give the mean.
        density: fraction of entries that are kept; None for 0.5. Not for `linear`.
        seed: of random entries; None for 0. Only for `dare_linear` and `dare_ties`.
        rank: of the LoRA; None for the one that is exact, or else the smallest power of two within the tolerance.
        tolerance: the largest KL divergence, and the largest rise of the loss, in nats per token; None for 0.01.
        overwrite: replace an earlier combination.
        base: folder or hub id of the base; None for the one that the adapters were trained on.
        allow_changed: combine although base, tokenizer or template changed since a run.
    """

    output: Path
    rule: str = "linear"
    weights: Sequence[float] | None = None
    density: float | None = None
    seed: int | None = None
    rank: int | None = None
    tolerance: float | None = None
    overwrite: bool = False
    base: str | None = None
    allow_changed: bool = False

    def check(self, count: int) -> Combination:
        """Check the numbers for `count` adapters, and return how they are combined.

        Raises:
            UserError: one is out of range.
        """
        check_weights_given(self.weights, count)
        check_limits(self.rank, self.tolerance)
        return Combination.of(self.rule, self.density, self.seed)

    @property
    def limit(self) -> float:
        """The tolerance in nats per token."""
        return limit_of(self.tolerance)


@dataclass(frozen=True)
class DataLosses:
    """Losses on the conversations of one run, or of several runs with the same ones, in nats per token.

    Attributes:
        data: which conversations.
        adapters: the loss of each adapter alone, in their order.
        combined: the loss of the exact combination.
        written: the loss of what was written.
    """

    data: DataPart
    adapters: list[float]
    combined: float
    written: float


@dataclass(frozen=True)
class CombinationReport:
    """The report of a combined adapter; `combination.json` on disk.

    Attributes:
        adapters: folder and weight of each adapter.
        combination: how they were combined.
        base: hub id or folder.
        base_weights: `original`, or `dequantized` where all are QLoRA runs: what the proof was computed on.
        rank, tolerance: of the LoRA, and the limit in nats per token.
        is_exact: the rank holds the combined updates without loss.
        parameters: numbers in the LoRA's file.
        added_tokens: ids whose embeddings the LoRA holds: the mean of the adapters', by weight.
        layer_errors: for each layer, the norm of what the file misses per norm of the exact combined update (float64).
        losses: of each adapter and of the result, on each run's own conversations.
        proof: the files compared with the exact combination, on all of these conversations.
        tried: each rank that was compared.
        allowed_changes: what changed since a run was trained, and was allowed.
        versions: of the libraries.
        files: names of everything in the folder; `--overwrite` replaces a folder that holds nothing else.
        seconds: time of the combination.
    """

    adapters: list[tuple[str, float]]
    combination: Combination
    base: str
    base_weights: str
    rank: int
    tolerance: float
    is_exact: bool
    parameters: int
    added_tokens: list[int]
    layer_errors: dict[str, float]
    losses: list[DataLosses]
    proof: Comparison
    tried: list[Comparison]
    seconds: float
    allowed_changes: tuple[str, ...] = ()
    versions: dict[str, str] = field(default_factory=dict)
    files: list[str] = field(default_factory=list)

    @property
    def worst_layer(self) -> tuple[str, float]:
        """The layer with the largest error, and its error."""
        return max(self.layer_errors.items(), key=lambda item: item[1])

    def as_dict(self) -> dict[str, Any]:
        """Return the report as plain values, for JSON."""
        return dataclasses.asdict(self)


def combine_into_adapter(runs: Sequence[Path], options: CombineOptions) -> CombinationReport:
    """Combine adapters into one plain LoRA in `options.output`, and prove it.

    Raises:
        UserError: an adapter, the base or an option cannot be used, or a LoRA cannot hold what an adapter does.
        VerificationError: no rank that may be used is within the tolerance. Nothing is left behind.
    """
    started = monotonic()
    combination = options.check(len(runs))
    sources = open_inputs(runs, options.base)
    for source in sources:
        check_convertible(read_json(source.model.path / ADAPTER_CONFIG), source.model.where, _AS_MODEL)
    models = [source.model for source in sources]
    check_lora_output(options.output, models, REPORT, "a combined adapter", overwrite=options.overwrite)
    changes = check_content(sources, allow_changed=options.allow_changed)
    quantized = [source.quantization is not None for source in sources]
    job = prepare_merge(
        runs[0], _merge_options(runs, options, combination, "dequantized" if all(quantized) else "original")
    )
    updates, adapters = _installed(job, combination)
    exact_rank = updates.exact_rank
    # No rank above the exact one is of use.
    largest = max(exact_rank or min(updates.largest_rank, MAX_RANK), options.rank or 0)
    if options.rank is not None and options.rank > updates.largest_rank:
        what = f"the rank is {options.rank}, and no adapted matrix has one above {updates.largest_rank}"
        raise UserError(what, where="--rank", hint="Name a lower rank, or leave the option out.")
    rank = exact_rank if options.rank is None and options.tolerance is None else options.rank
    kept = KeptTensors.of([(one.weight, one.adapter) for one in adapters])
    targets = target_modules(adapters[0].adapter, updates.paths)
    proof = Proof(job, job.source.base.name, sources)
    writer = LoraWriter(job, proof, updates.factored(largest), kept, targets, largest)
    with working_folder(options.output) as partial:

        def compare(one: int) -> Comparison:
            return writer.write_and_compare(partial, one)

        tried = _search(compare, rank, options.limit, largest)
        found = compare(tried[-1].rank) if len(tried) > 1 else tried[-1]
        errors = updates.errors(written_factors(partial))
        is_exact = exact_rank is not None and found.rank >= exact_rank
        _check(found, errors, options.limit, is_exact=is_exact)
        for name in COPIED:
            if (runs[0] / name).is_file():
                shutil.copyfile(runs[0] / name, partial / name)
        report = CombinationReport(
            adapters=[(str(main.folder), main.weight) for main, _ in job.groups()],
            combination=combination,
            base=job.source.base.absolute_name,
            base_weights=job.selected_base.kind,
            rank=found.rank,
            tolerance=options.limit,
            is_exact=is_exact,
            parameters=count_parameters(partial),
            added_tokens=writer.added_tokens,
            layer_errors=errors,
            losses=_losses(proof, proof.losses_of_lora(partial)),
            proof=found,
            tried=sorted(tried, key=lambda one: one.rank),
            seconds=monotonic() - started,
            allowed_changes=(*job.allowed_changes, *changes),
            versions={name: version(name) for name in ("peftchat", "peft", "transformers", "torch")},
            files=sorted([*(file.name for file in partial.iterdir()), REPORT]),
        )
        (partial / REPORT).write_text(json.dumps(report.as_dict(), indent=2) + "\n", encoding="utf-8")
        replace_folder(partial, options.output)
    return report


def combine_into_model(
    runs: Sequence[Path],
    options: CombineOptions,
    *,
    base: "BaseMode" = "auto",
    verify: bool = True,
    memory_budget: int | None = None,
    dtype: "torch.dtype | None" = None,
    rounding: "Rounding" = "stochastic",
) -> tuple[MergeResult, list[DataLosses]]:
    """Combine adapters and merge them into their base, in `options.output`.

    Args:
        runs: the adapters.
        options: how they are combined; rank and tolerance are for a LoRA alone.
        base, verify, memory_budget, dtype, rounding: see `MergeOptions`.

    Returns:
        The merge, and the losses of each adapter and of the merged weights; none without `verify`.

    Raises:
        UserError: an adapter, the base or an option cannot be used.
        VerificationError: the merged weights are not the combination.
    """
    combination = options.check(len(runs))
    if options.rank is not None or options.tolerance is not None:
        raise UserError("merged weights have no rank", where="--rank, --tolerance", hint="Leave the options out.")
    sources = open_inputs(runs, options.base)
    check_content(sources, allow_changed=options.allow_changed)
    merge_options = replace(
        _merge_options(runs, options, combination, base),
        output=options.output,
        overwrite=options.overwrite,
        verify=verify,
        memory_budget=memory_budget,
        dtype=dtype,
        rounding=rounding,
    )
    result = merge_run(runs[0], merge_options)
    if not verify:
        return result, []
    job = prepare_merge(runs[0], merge_options)
    proof = Proof(job, job.source.base.name, sources)
    return result, _losses(proof, proof.losses_of_model(options.output))


def _merge_options(
    runs: Sequence[Path], options: CombineOptions, combination: Combination, base: "BaseMode"
) -> MergeOptions:
    weights = list(options.weights or combination.default_weights(len(runs)))
    return MergeOptions(
        base=base,
        base_model=options.base,
        allow_changed=options.allow_changed,
        scale=weights[0],
        adapters=tuple(zip(runs[1:], weights[1:], strict=True)),
        combination=combination,
    )


def _installed(job: MergeJob, combination: Combination) -> tuple[CombinedUpdates, list[InstalledInput]]:
    """Install every adapter of a job; those that hold added tokens change no layer."""
    installed = [
        InstalledInput(number, adapter.weight, str(adapter.folder), job.base.install(adapter))
        for number, adapter in enumerate(job.adapters)
    ]
    main = [one for one, adapter in zip(installed, job.adapters, strict=True) if not adapter.is_added_tokens]
    return CombinedUpdates(main, job.weights, combination, _AS_MODEL), installed


def _search(compare: Any, rank: int | None, limit: float, largest: int) -> list[Comparison]:
    try:
        return search_rank(compare, rank, limit, largest, _SUBJECT)
    except VerificationError as error:
        raise VerificationError(f"{error} {_AS_MODEL}") from error


def _check(found: Comparison, errors: dict[str, float], limit: float, *, is_exact: bool) -> None:
    if not found.within(limit):
        raise VerificationError(refusal(found, limit, _SUBJECT))
    worst = max(errors, key=lambda path: errors[path])
    if is_exact and not errors[worst] <= EXACT:
        what = f"the LoRA's update of {worst} is off by {errors[worst]:.1e} of its norm, expected at most {EXACT:.0e}"
        raise VerificationError(f"{what}. Nothing was written.")


def _losses(proof: Proof, written: list[float]) -> list[DataLosses]:
    adapters = proof.losses_of_adapters()
    return [
        DataLosses(part, [losses[index] for losses in adapters], proof.losses[index], written[index])
        for index, part in enumerate(proof.data.parts)
    ]
