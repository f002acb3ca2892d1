"""Conversion of an adapter to plain LoRA: the smallest sufficient rank, its proof, and the files.

PEFT's own `convert_to_lora` (https://huggingface.co/docs/peft/package_reference/lora_conversion) decides which layers
can be converted. The update itself is the one that `peftchat merge` adds, which is exact where PEFT's is not: for DoRA
PEFT leaves out the trained magnitudes.
"""

import dataclasses
import json
import shutil
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from time import monotonic
from types import SimpleNamespace
from typing import Any

from peftchat.errors import UserError, VerificationError
from peftchat.export.lora_factors import factor_updates, linear_modules
from peftchat.export.lora_proof import Comparison, Proof
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
)
from peftchat.export.vllm import VllmSupport, vllm_support
from peftchat.merging import MergeOptions
from peftchat.merging.adapter_source import residual_init
from peftchat.merging.merge_job import MergeJob, prepare_merge
from peftchat.merging.output import COPIED
from peftchat.models.source import ADAPTER_CONFIG, ModelKind, ModelSource, read_json
from peftchat.output_paths import replace_folder

REPORT = "lora_conversion.json"
DEFAULT_TOLERANCE = 0.01
"""Nats per token."""

_MULTIPLIES = "it multiplies the weight, and PEFT converts what is added to it"
_PROMPTS = "it trains vectors that are put before the prompt, not weights"
UNCONVERTIBLE: dict[str, str] = {
    "ADALORA": "PEFT has no conversion of its three factors",
    "HIRA": _MULTIPLIES,
    "LILY": "a router mixes its matrices by the input, so no fixed weights do the same",
    "PEANUT": "PEFT has no conversion of its network",
    "OFT": _MULTIPLIES,
    "BOFT": _MULTIPLIES,
    "HRA": _MULTIPLIES,
    "ROAD": "it rotates and scales the layer's outputs, and PEFT converts what is added to a weight",
    "IA3": "it scales activations, and PEFT converts what is added to a weight",
    "LN_TUNING": "it trains the normalization layers, and a LoRA changes matrices",
    "SHIRA": "its update is sparse, which has no good approximation of low rank",
    "TRAINABLE_TOKENS": "it trains the embeddings of added tokens only, so there is no update to convert",
    "PROMPT_TUNING": _PROMPTS,
    "P_TUNING": _PROMPTS,
    "PREFIX_TUNING": _PROMPTS,
}
"""Why PEFT converts no adapter of a type to LoRA."""


@dataclass(frozen=True, slots=True)
class LoraOptions:
    """The user's options.

    Attributes:
        output: the LoRA's folder; None for `RUN/lora`.
        rank: of the LoRA; None for the smallest power of two within the tolerance.
        tolerance: the largest KL divergence, and the largest rise of the loss, in nats per token; None for 0.01.
        overwrite: replace an earlier conversion.
        base: folder or hub id of the base; None for the one that the run was trained on.
        allow_changed: convert although base, tokenizer or template changed since the run.
    """

    output: Path | None = None
    rank: int | None = None
    tolerance: float | None = None
    overwrite: bool = False
    base: str | None = None
    allow_changed: bool = False

    def check(self) -> None:
        """Check the numbers.

        Raises:
            UserError: one is out of range.
        """
        check_limits(self.rank, self.tolerance)

    @property
    def limit(self) -> float:
        """The tolerance in nats per token."""
        return limit_of(self.tolerance)


def check_limits(rank: int | None, tolerance: float | None) -> None:
    """Check the rank and the tolerance of a LoRA that stands for another adapter.

    Raises:
        UserError: one is out of range.
    """
    if rank is not None and rank < 1:
        raise UserError(f"the rank is {rank}, expected at least 1", where="--rank")
    if tolerance is not None and not 0 < tolerance < float("inf"):
        what = f"the tolerance is {tolerance:g}, expected a number of nats per token above 0"
        raise UserError(what, where="--tolerance", hint=f"The default is {DEFAULT_TOLERANCE:g}.")


def limit_of(tolerance: float | None) -> float:
    """Return a tolerance in nats per token, the default where none is given."""
    return DEFAULT_TOLERANCE if tolerance is None else tolerance


@dataclass(frozen=True)
class ConversionReport:
    """The report of a conversion; `lora_conversion.json` on disk.

    Attributes:
        source: the adapter's folder.
        method: its variant, or its PEFT type where no recipe names one.
        base: hub id or folder.
        base_weights: `original`, or `dequantized` for a QLoRA run: what both were computed on.
        rank, tolerance: as chosen, and the limit in nats per token.
        modules: number of adapted layers.
        parameters_before, parameters_after: numbers in the adapter's files and in the LoRA's.
        added_tokens: ids whose embeddings the LoRA holds.
        data: the conversations of the proof; `conversations` of them, with `tokens` compared tokens.
        proof: of the files in the folder.
        tried: each rank that was compared.
        vllm: the command that serves the folder; None where vLLM cannot.
        vllm_reasons: why it cannot.
        allowed_changes: what changed since the run was trained, and was allowed.
        versions: of the libraries.
        files: names of everything in the folder; `--overwrite` replaces a folder that holds nothing else.
        seconds: time of the conversion.
    """

    source: str
    method: str
    base: str
    base_weights: str
    rank: int
    tolerance: float
    modules: int
    parameters_before: int
    parameters_after: int
    added_tokens: list[int]
    data: str
    conversations: int
    tokens: int
    proof: Comparison
    tried: list[Comparison]
    seconds: float
    allowed_changes: tuple[str, ...] = ()
    versions: dict[str, str] = field(default_factory=dict)
    files: list[str] = field(default_factory=list)
    vllm: str | None = None
    vllm_reasons: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Return the report as plain values, for JSON."""
        return dataclasses.asdict(self)


def export_lora(run: Path, options: LoraOptions) -> tuple[Path, ConversionReport]:
    """Convert a run's adapter to plain LoRA and prove it; return the folder and the report.

    Raises:
        UserError: the run, its base or an option cannot be used, or PEFT does not convert such an adapter.
        VerificationError: no rank that may be used is within the tolerance. Nothing is left behind.
    """
    started = monotonic()
    options.check()
    source = ModelSource.open(str(run), local=True, base=options.base)
    config = _checked_config(source, options)
    output = options.output or run / "lora"
    check_lora_output(output, [source], REPORT, "a converted adapter", overwrite=options.overwrite)
    quantized = (recipe := source.recipe()) is not None and recipe.recipe.method == "qlora"
    job = prepare_merge(
        run,
        MergeOptions(
            base="dequantized" if quantized else "auto", base_model=options.base, allow_changed=options.allow_changed
        ),
    )
    writer = _writer(job, options, str(run))
    with working_folder(output) as partial:

        def compare(rank: int) -> Comparison:
            return writer.write_and_compare(partial, rank)

        tried = search_rank(compare, options.rank, options.limit, writer.largest, "the adapter")
        proof = compare(tried[-1].rank)
        if not proof.within(options.limit):
            raise VerificationError(refusal(proof, options.limit, "the adapter"))
        for name in COPIED:
            if (run / name).is_file():
                shutil.copyfile(run / name, partial / name)
        report = ConversionReport(
            source=str(run),
            method=_method(source, config),
            base=job.source.base.absolute_name,
            base_weights=job.selected_base.kind,
            rank=proof.rank,
            tolerance=options.limit,
            modules=len(writer.updates),
            parameters_before=sum(count_parameters(adapter.folder) for adapter in job.adapters),
            parameters_after=count_parameters(partial),
            added_tokens=writer.added_tokens,
            data=writer.proof.data.source,
            conversations=len(writer.proof.data.ids),
            tokens=writer.proof.tokens,
            proof=proof,
            tried=sorted(tried, key=lambda one: one.rank),
            seconds=monotonic() - started,
            allowed_changes=job.allowed_changes,
            versions={name: version(name) for name in ("peftchat", "peft", "transformers", "torch")},
            files=sorted([*(file.name for file in partial.iterdir()), REPORT]),
        )
        _write_report(partial, report)
        replace_folder(partial, output)
    support: VllmSupport = vllm_support(str(output))
    report = replace(report, vllm=support.command, vllm_reasons=_reasons(support))
    _write_report(output, report)
    return output, report


def _writer(job: MergeJob, options: LoraOptions, where: str) -> LoraWriter:
    """Factor the adapter of a job."""
    main, *added = [job.base.install(adapter) for adapter in job.adapters]
    modules = linear_modules(main, where)
    sizes = [min(module.slots[f"{module.path}.weight"].shape) for module in modules]
    if options.rank is not None and options.rank > max(sizes):
        what = f"the rank is {options.rank}, and no adapted matrix has one above {max(sizes)}"
        raise UserError(what, where="--rank", hint="Name a lower rank, or leave the option out.")
    largest = min(max(sizes), max(MAX_RANK, options.rank or 0))
    if type(main_config := job.adapters[0].config).__name__ == "LoraConfig" and _is_plain(main_config.to_dict()):
        largest = min(largest, main_config.r - 1)
    kept = KeptTensors.of([(1.0, adapter) for adapter in (main, *added)])
    targets = target_modules(main, [module.path for module in modules])
    updates = factor_updates(main, modules, job.weights, largest, where)
    return LoraWriter(job, Proof(job, job.source.base.name), updates, kept, targets, largest)


def unconvertible(peft_type: str) -> str | None:
    """Return why PEFT does not convert adapters of a type to LoRA; None if it does, or is not known to refuse."""
    return UNCONVERTIBLE.get(peft_type.upper())


def _checked_config(source: ModelSource, options: LoraOptions) -> dict[str, Any]:
    """Return the adapter's config as it is in its file.

    Raises:
        UserError: there is no adapter, PEFT does not convert it, or it is a plain LoRA already.
    """
    if source.kind is ModelKind.FULL:
        raise UserError(
            "this is a complete model, so there is no adapter to convert",
            where=source.where,
            hint=f"Serve it as it is: `peftchat export {source.name} --to vllm`.",
        )
    source.require_model()
    config = read_json(source.path / ADAPTER_CONFIG)
    check_convertible(config, source.where, f"Merge it instead: `peftchat merge {source.name}`.")
    if str(config.get("peft_type", "")).upper() == "LORA" and _is_plain(config):
        rank = int(config["r"])
        if rank == 1 or (options.rank is None and options.tolerance is None):
            hint = "Use the folder as it is"
            hint += "." if rank == 1 else ", or name a lower rank with --rank or a limit with --tolerance."
            raise UserError(f"the adapter is a plain LoRA of rank {rank} already", where=source.where, hint=hint)
        if options.rank is not None and options.rank >= rank:
            hint = "Use the folder as it is, or name a lower rank."
            raise UserError(f"the adapter has rank {rank} already, expected --rank below it", where="--rank", hint=hint)
    return config


def check_convertible(config: dict[str, Any], where: str, merge_hint: str) -> None:
    """Check that PEFT converts adapters of this kind to LoRA.

    Args:
        config: the adapter's config as it is in its file.
        where: the adapter, for messages.
        merge_hint: what to do where it can only be merged.

    Raises:
        UserError: with the reason.
    """
    kind = str(config.get("peft_type", "")).upper()
    because = unconvertible(kind)
    if because is not None:
        keep = because is _PROMPTS or kind == "LILY"
        hint = "Use the run folder as it is: `peftchat chat RUN`." if keep else merge_hint
        raise UserError(f"{kind} cannot become a LoRA: {because}", where=where, hint=hint)
    if config.get("bias", "none") not in ("none", None) or config.get("lora_bias"):
        what = "the adapter has trained biases, which a plain LoRA does not hold"
        raise UserError(what, where=where, hint=merge_hint)
    if config.get("target_parameters"):
        what = "the adapter changes stacked experts (target_parameters), which PEFT does not convert"
        raise UserError(what, where=where, hint=merge_hint)


def _method(source: ModelSource, config: dict[str, Any]) -> str:
    recipe = source.recipe()
    if recipe is not None and recipe.recipe.adapter is not None:
        return recipe.recipe.adapter.variant
    return "dora" if config.get("use_dora") else str(config["peft_type"]).lower()


def _is_plain(config: dict[str, Any]) -> bool:
    """Return whether a LoRA has one rank and one scale, two factors and nothing more, and an unchanged base."""
    if any(config.get(key) for key in ("use_dora", "rank_pattern", "alpha_pattern")):
        return False
    return residual_init(SimpleNamespace(init_lora_weights=config.get("init_lora_weights"))) is None


def _reasons(support: VllmSupport) -> tuple[str, ...]:
    return tuple(reason for reason in support.reasons if not reason.startswith("merge it first"))


def _write_report(folder: Path, report: ConversionReport) -> None:
    (folder / REPORT).write_text(json.dumps(report.as_dict(), indent=2) + "\n", encoding="utf-8")
