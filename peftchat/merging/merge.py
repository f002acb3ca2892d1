"""The merge from end to end: plan, write shards, check, verify, and only then rename the folder."""

import shutil
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from time import monotonic

from peftchat.errors import UserError, VerificationError
from peftchat.malloc import return_large_blocks
from peftchat.merging.adapter_source import AdapterSource
from peftchat.merging.byte_progress import ByteProgress
from peftchat.merging.merge_job import MergeJob, MergeOptions, prepare_merge
from peftchat.merging.merge_plan import ResumeState, ShardBuilder
from peftchat.merging.output import (
    MergedBase,
    MergeReport,
    check_written,
    with_other_modalities,
    write_config_and_tokenizer,
    write_index,
    write_report,
)
from peftchat.merging.output_folder import (
    LOCK,
    beside,
    check_output_folder,
    keep_failed,
    publish,
    working_folder,
    written_files,
)
from peftchat.merging.safetensors_io import ShardWriter
from peftchat.merging.verify import verify_merged
from peftchat.models.source import ModelSource
from peftchat.output_paths import InputPath


@dataclass(frozen=True)
class MergeResult:
    """A merged model's folder and report."""

    folder: Path
    report: MergeReport


def merge_run(folder: Path, options: MergeOptions) -> MergeResult:
    """Merge the adapter of the run in `folder` into its base.

    The merged model is written to `OUTPUT.partial`. That folder has no `config.json`, so no loader accepts it before
    everything is written, checked and verified. An interrupted merge is resumed there.

    Raises:
        UserError: the run, its base, an adapter or an option cannot be used.
        VerificationError: the result is not what was planned or trained; it is left in `OUTPUT.failed`.
    """
    started = monotonic()
    return_large_blocks()
    output = options.output or folder / "merged"
    check_output_folder(output, folder, _inputs(folder, options), overwrite=options.overwrite)
    job = prepare_merge(folder, options)
    partial = beside(output, "partial")
    try:
        with working_folder(partial):
            try:
                resumed = _write_shards(job, partial, options.block_bytes)
            except UserError:  # a layer that PEFT cannot merge: resuming would fail too
                shutil.rmtree(partial)
                raise
            write_index(partial, job.plan)
            check_written(partial, job.plan)
            _write_small_files(job, partial, options)
            report = _report(job, options, resumed, started, written_files(partial))
            if options.verify:
                report = replace(report, verification=verify_merged(job, partial, options))
            report = replace(report, seconds=monotonic() - started)
            write_report(partial, report)
            if report.verification is not None and not report.verification.passed:
                raise VerificationError(report.verification.verdict)
    except VerificationError as error:
        failed = keep_failed(partial, output)
        raise VerificationError(f"{error} The result is in {failed}, not in {output}.") from error
    except OSError as error:
        hint = "Free disk space and start again to resume, or choose another folder with -o."
        raise UserError(f"cannot write: {error.strerror or error}", where=str(partial), hint=hint) from error
    try:
        publish(partial, output)
    except OSError as error:
        what = f"the merged model in {partial} cannot get its name: {error.strerror or error}"
        raise UserError(what, where=str(output), hint="Choose another folder with -o.") from error
    return MergeResult(output, report)


def _inputs(folder: Path, options: MergeOptions) -> list[InputPath]:
    """Return everything that a merge reads.

    Raises:
        UserError: the run or its base cannot be used.
    """
    source = AdapterSource.open(folder, options.base_model)
    recipe = source.recipe
    others = [InputPath(other, "an adapter") for other, _ in options.adapters]
    # The run itself may lie among its data, and its default output with it.
    recipes = [recipe, *(ModelSource.open(str(other), local=True).recipe() for other, _ in options.adapters)]
    read = [entry for one in recipes if one is not None for entry in one.inputs()]
    named = [replace(entry, is_read_recursively=False) for entry in read]
    return [InputPath(folder, "the run"), InputPath(source.base.path, "the base model"), *others, *named]


def _write_shards(job: MergeJob, partial: Path, block_bytes: int) -> int:
    """Write every shard that is not there yet and return how many were."""
    state = ResumeState.open(partial, job.fingerprint)
    for file in partial.iterdir():
        if file.name not in (*state.done, LOCK):
            file.unlink()
    state.save()
    resumed = len(state.done)
    sizes = {name: sum(tensor.spec.bytes for tensor in tensors) for name, tensors in job.plan.shards.items()}
    builder = ShardBuilder(job.plan, job.weights, block_bytes, job.rounding)
    with ByteProgress("Merging", sum(sizes.values()), sum(sizes[name] for name in state.done)) as progress:
        for name, tensors in job.plan.shards.items():
            if name in state.done:
                continue
            with ShardWriter(partial / name, [tensor.spec for tensor in tensors]) as writer:
                for tensor in tensors:
                    for rows in builder.rows(tensor):
                        writer.append(rows)
                        progress.advance(rows.nbytes)
            state.record(name, writer.digest)
    return resumed


def _write_small_files(job: MergeJob, partial: Path, options: MergeOptions) -> None:
    config = with_other_modalities(job.weights.empty_model.model.config, job.base.config)
    dtype = options.dtype or job.base.config.dtype
    write_config_and_tokenizer(
        partial, config, job.source.folder, job.base.folder, untied=bool(job.plan.untied), dtype=dtype
    )


def _report(job: MergeJob, options: MergeOptions, resumed: int, started: float, files: list[str]) -> MergeReport:
    tensors = [tensor for shard in job.plan.shards.values() for tensor in shard]
    vocabulary = job.weights.empty_model.model.get_input_embeddings().weight.shape[0]
    base_vocabulary = job.base.config.get_text_config().vocab_size
    selected = job.selected_base
    adapters = [adapter for adapter in job.adapters if not adapter.is_added_tokens]
    return MergeReport(
        base=MergedBase(job.source.base.name, selected.kind, selected.distance_original, selected.distance_dequantized),
        adapters=[(str(adapter.folder), adapter.weight) for adapter in adapters],
        method=[str(adapter.config.peft_type).rpartition(".")[2].lower() for adapter in adapters],
        dtype=str(options.dtype or job.base.config.dtype).removeprefix("torch."),
        tensors=len(tensors),
        bytes=job.plan.bytes,
        changed_bytes=job.plan.changed_bytes,
        shards=len(job.plan.shards),
        resumed_shards=resumed,
        vocabulary=vocabulary,
        added_rows=max(0, vocabulary - base_vocabulary),
        tied=bool(job.weights.empty_model.ties) and not job.plan.untied,
        seconds=monotonic() - started,
        allowed_changes=job.allowed_changes,
        combination=job.combination,
        versions={name: version(name) for name in ("peftchat", "peft", "transformers", "torch", "safetensors")},
        files=files,
    )
