"""Conversion of an adapter to plain LoRA: the smallest sufficient rank, its proof, and the files.

PEFT's own `convert_to_lora` (https://huggingface.co/docs/peft/package_reference/lora_conversion) decides which layers
can be converted. The update itself is the one that `peftchat merge` adds, which is exact where PEFT's is not: for DoRA
PEFT leaves out the trained magnitudes.
"""

import dataclasses
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from time import monotonic
from types import SimpleNamespace
from typing import Any

from peftchat.errors import UserError, VerificationError, first_line
from peftchat.export.lora_factors import FactoredUpdate, factor_updates, linear_modules, relative_error
from peftchat.export.lora_proof import Comparison, Proof
from peftchat.export.vllm import VllmSupport, vllm_support
from peftchat.merging import MergeOptions
from peftchat.merging.adapter_source import ADAPTER_WEIGHTS_NAME, InstalledAdapter, residual_init
from peftchat.merging.delta_rules import trained_token_rows
from peftchat.merging.merge_job import MergeJob, prepare_merge
from peftchat.merging.output import COPIED
from peftchat.models.safetensors_files import read_header
from peftchat.models.saving import TOKEN_ROWS
from peftchat.models.source import ADAPTER_CONFIG, ModelKind, ModelSource, read_json
from peftchat.output_paths import InputPath, check_output, check_replaceable, free_name, replace_folder

REPORT = "lora_conversion.json"
DEFAULT_TOLERANCE = 0.01
"""Nats per token."""
_MAX_RANK = 512
"""The largest rank that the search tries; vLLM serves none above it."""
_FIRST_RANK = 8
"""Where the search begins."""
_ROOT = "base_model.model."

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
        if self.rank is not None and self.rank < 1:
            raise UserError(f"the rank is {self.rank}, expected at least 1", where="--rank")
        if self.tolerance is not None and not 0 < self.tolerance < float("inf"):
            what = f"the tolerance is {self.tolerance:g}, expected a number of nats per token above 0"
            raise UserError(what, where="--tolerance", hint=f"The default is {DEFAULT_TOLERANCE:g}.")

    @property
    def limit(self) -> float:
        """The tolerance in nats per token."""
        return DEFAULT_TOLERANCE if self.tolerance is None else self.tolerance


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
    _check_output(output, source, overwrite=options.overwrite)
    quantized = (recipe := source.recipe()) is not None and recipe.recipe.method == "qlora"
    job = prepare_merge(
        run,
        MergeOptions(
            base="dequantized" if quantized else "auto", base_model=options.base, allow_changed=options.allow_changed
        ),
    )
    conversion = _Conversion.of(job, options, str(run))
    with _working_folder(output) as partial:
        tried = _search(lambda rank: conversion.write_and_compare(partial, rank), options, conversion.largest)
        proof = conversion.write_and_compare(partial, tried[-1].rank)
        if not proof.within(options.limit):
            raise VerificationError(_refusal(proof, options.limit))
        for name in COPIED:
            if (run / name).is_file():
                shutil.copyfile(run / name, partial / name)
        report = ConversionReport(
            source=str(run),
            method=_method(source, config),
            base=job.source.base.name,
            base_weights=job.selected_base.kind,
            rank=proof.rank,
            tolerance=options.limit,
            modules=len(conversion.updates),
            parameters_before=sum(_parameters(adapter.folder) for adapter in job.adapters),
            parameters_after=_parameters(partial),
            added_tokens=conversion.added_tokens,
            data=conversion.proof.data.source,
            conversations=len(conversion.proof.data.ids),
            tokens=conversion.proof.tokens,
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
    kind = str(config.get("peft_type", "")).upper()
    because = unconvertible(kind)
    merge = f"Merge it instead: `peftchat merge {source.name}`."
    if because is not None:
        hint = "Use the run folder as it is: `peftchat chat RUN`." if because is _PROMPTS or kind == "LILY" else merge
        raise UserError(f"{kind} cannot become a LoRA: {because}", where=source.where, hint=hint)
    if config.get("bias", "none") not in ("none", None) or config.get("lora_bias"):
        raise UserError(
            "the adapter has trained biases, which a plain LoRA does not hold", where=source.where, hint=merge
        )
    if config.get("target_parameters"):
        what = "the adapter changes stacked experts (target_parameters), which PEFT does not convert"
        raise UserError(what, where=source.where, hint=merge)
    if kind == "LORA" and _is_plain(config):
        rank = int(config["r"])
        if rank == 1 or (options.rank is None and options.tolerance is None):
            hint = "Use the folder as it is"
            hint += "." if rank == 1 else ", or name a lower rank with --rank or a limit with --tolerance."
            raise UserError(f"the adapter is a plain LoRA of rank {rank} already", where=source.where, hint=hint)
        if options.rank is not None and options.rank >= rank:
            hint = "Use the folder as it is, or name a lower rank."
            raise UserError(f"the adapter has rank {rank} already, expected --rank below it", where="--rank", hint=hint)
    return config


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


def _check_output(output: Path, source: ModelSource, *, overwrite: bool) -> None:
    where = str(output)
    recipe = source.recipe()
    named = [] if recipe is None else [replace(entry, is_read_recursively=False) for entry in recipe.inputs()]
    inputs = [InputPath(source.path, "the run"), InputPath(Path(source.base().name), "the base model"), *named]
    check_output(output, inputs, where)
    if output.name == TOKEN_ROWS and os.path.realpath(output.parent) == os.path.realpath(source.path):
        what = "the output would be taken for the run's own embeddings of added tokens"
        raise UserError(what, where=where, hint="Choose another output.")
    if not os.path.lexists(output):
        return
    if not output.is_dir():
        raise UserError("the output is a file, expected a folder", where=where, hint="Choose another with -o.")
    if not overwrite:
        raise UserError("the output already exists", where=where, hint="Choose another with -o, or --overwrite.")
    check_replaceable(output, "a converted adapter", _foreign(output), where)


def _foreign(folder: Path) -> str | None:
    """Return a file that no conversion wrote; "" if the folder is none; None if it may be replaced."""
    names = sorted(entry.name for entry in folder.iterdir())
    if not names:
        return None
    try:
        known = json.loads((folder / REPORT).read_text(encoding="utf-8"))["files"]
    except (OSError, ValueError, KeyError, TypeError):
        return ""
    return next((name for name in names if name not in known or not (folder / name).is_file()), None)


@contextmanager
def _working_folder(output: Path) -> Iterator[Path]:
    """Create a folder beside the output; it is gone afterwards, whatever happens."""
    from safetensors import SafetensorError

    partial = free_name(output, "partial")
    try:
        partial.mkdir(parents=True)
        yield partial
    except (OSError, SafetensorError) as error:
        hint = "Free disk space, or choose another folder with -o."
        what = error.strerror if isinstance(error, OSError) and error.strerror else first_line(error)
        raise UserError(f"cannot write: {what}", where=str(output), hint=hint) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@dataclass(frozen=True)
class _Conversion:
    """An adapter's factored update, and what is written beside it.

    Attributes:
        largest: the largest rank that any layer can have.
    """

    job: MergeJob
    proof: Proof
    updates: list[FactoredUpdate]
    tensors: dict[str, Any]
    token_ids: dict[str, list[int]]
    modules_to_save: list[str]
    targets: list[str]
    largest: int

    @classmethod
    def of(cls, job: MergeJob, options: LoraOptions, where: str) -> "_Conversion":
        """Factor the adapter of a job."""
        main, *added = [job.base.install(adapter) for adapter in job.adapters]
        modules = linear_modules(main, where)
        sizes = [min(module.slots[f"{module.path}.weight"].shape) for module in modules]
        if options.rank is not None and options.rank > max(sizes):
            what = f"the rank is {options.rank}, and no adapted matrix has one above {max(sizes)}"
            raise UserError(what, where="--rank", hint="Name a lower rank, or leave the option out.")
        largest = min(max(sizes), max(_MAX_RANK, options.rank or 0))
        if type(main_config := job.adapters[0].config).__name__ == "LoraConfig" and _is_plain(main_config.to_dict()):
            largest = min(largest, main_config.r - 1)
        tensors, token_ids, saved = _kept_tensors(main, added)
        targets = _target_modules(main, [module.path for module in modules])
        updates = factor_updates(main, modules, job.weights, largest, where)
        return cls(job, Proof(job, job.source.base.name), updates, tensors, token_ids, saved, targets, largest)

    @property
    def added_tokens(self) -> list[int]:
        """The ids whose embeddings the LoRA holds."""
        return sorted({token for ids in self.token_ids.values() for token in ids})

    def write_and_compare(self, folder: Path, rank: int) -> Comparison:
        """Write the LoRA of a rank and compare what is then in the files."""
        from peft import LoraConfig
        from safetensors.torch import save_file

        tensors = dict(self.tensors)
        for update in self.updates:
            lora_b, lora_a = update.at_rank(rank)
            tensors[f"{_ROOT}{update.path}.lora_B.weight"] = lora_b
            tensors[f"{_ROOT}{update.path}.lora_A.weight"] = lora_a
        save_file(tensors, str(folder / ADAPTER_WEIGHTS_NAME), metadata={"format": "pt"})
        base = self.job.source.base
        LoraConfig(
            task_type="CAUSAL_LM",
            base_model_name_or_path=base.name,
            revision=base.revision,
            r=rank,
            lora_alpha=rank,
            target_modules=self.targets,
            fan_in_fan_out=self.updates[0].is_conv1d,
            trainable_token_indices=self.token_ids or None,
            modules_to_save=self.modules_to_save or None,
            inference_mode=True,
        ).save_pretrained(str(folder))
        return self.proof.compare(folder, rank, relative_error(self.updates, rank))


def _kept_tensors(
    main: InstalledAdapter, added: Sequence[InstalledAdapter]
) -> tuple[dict[str, Any], dict[str, list[int]], list[str]]:
    """Return what a LoRA holds unchanged: tensors by their names in its file, token ids by module, saved modules."""
    from peft.utils.other import ModulesToSaveWrapper

    tensors: dict[str, Any] = {f"{_ROOT}{name}": value.contiguous() for name, value in main.saved.items()}
    token_ids: dict[str, list[int]] = {}
    saved: list[str] = []
    for adapter in (main, *added):
        for module in adapter.modules:
            rows = trained_token_rows(module)
            # A tied head has the rows of the embedding.
            if rows is not None and f"{module.path}.weight" not in adapter.empty_model.ties:
                token_ids[module.path] = list(rows.ids)
                key = f"{_ROOT}{module.path}.token_adapter.trainable_tokens_delta"
                tensors[key] = rows.values.clone().contiguous()
            elif isinstance(module.layer, ModulesToSaveWrapper):
                saved.append(module.path)
                trained = module.layer.modules_to_save["default"].state_dict()
                tensors |= {f"{_ROOT}{module.path}.{name}": value.clone() for name, value in trained.items()}
    return tensors, token_ids, saved


def _target_modules(adapter: InstalledAdapter, paths: Sequence[str]) -> list[str]:
    """Return the last parts of the layers' names if those name no other layer, else the names themselves."""
    endings = {path.rpartition(".")[2] for path in paths}
    outer = {name.removesuffix(".weight").removesuffix(".bias") for name in adapter.empty_model.slots}
    named = {path for path in outer if path.rpartition(".")[2] in endings}
    return sorted(endings if named == set(paths) else paths)


def _search(compare: Callable[[int], Comparison], options: LoraOptions, largest: int) -> list[Comparison]:
    """Return the comparisons that were made; the last one is within the tolerance, at the rank to use.

    Raises:
        VerificationError: none that may be used is.
    """
    limit = options.limit
    tried: dict[int, Comparison] = {}

    def passes(rank: int) -> bool:
        tried[rank] = compare(rank)
        return tried[rank].within(limit)

    if options.rank is not None and passes(options.rank):
        return [tried[options.rank]]
    ladder = [2**power for power in range(largest.bit_length()) if 2**power < largest] + [largest]
    ladder = [rank for rank in ladder if rank > (options.rank or 0)]
    # Large ranks are written and compared only where small ones fail.
    low, high = 0, next((index for index, rank in enumerate(ladder) if rank >= _FIRST_RANK), len(ladder) - 1)
    while ladder and not passes(ladder[high]):
        if high == len(ladder) - 1:
            ladder = []
        low, high = high + 1, min(high + 1, len(ladder) - 1)
    if not ladder:
        closest = min(tried.values(), key=lambda one: one.kl)
        raise VerificationError(_refusal(closest, limit) + " No rank up to it is within the tolerance.")
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if passes(ladder[middle]) else (middle + 1, high)
    needed = ladder[low]
    if options.rank is not None:
        raise VerificationError(_refusal(tried[options.rank], limit) + f" Rank {needed} is within the tolerance.")
    chosen = tried.pop(needed)
    return [*tried.values(), chosen]


def _refusal(found: Comparison, limit: float) -> str:
    return (
        f"A LoRA of rank {found.rank} does not compute what the adapter computes: KL {found.kl:.2e} and loss "
        f"{found.loss_before:.4f} → {found.loss_after:.4f} nats per token (allowed: {limit:g}), same next token at "
        f"{found.top1_agreement:.1%}. Nothing was written."
    )


def _reasons(support: VllmSupport) -> tuple[str, ...]:
    return tuple(reason for reason in support.reasons if not reason.startswith("merge it first"))


def _parameters(folder: Path) -> int:
    total = 0
    for entry in read_header(folder / ADAPTER_WEIGHTS_NAME).values():
        count = 1
        for size in entry.shape:
            count *= size
        total += count
    return total


def _write_report(folder: Path, report: ConversionReport) -> None:
    (folder / REPORT).write_text(json.dumps(report.as_dict(), indent=2) + "\n", encoding="utf-8")
