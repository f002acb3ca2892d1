"""The merge from end to end: plan, write shards, check, verify, and only then rename the folder."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from time import monotonic

from filelock import FileLock, Timeout

from peftchat.errors import UserError, VerificationError
from peftchat.malloc import return_large_blocks
from peftchat.merging.byte_progress import ByteProgress
from peftchat.merging.merge_job import MergeJob, MergeOptions, prepare_merge
from peftchat.merging.merge_plan import RESUME_STATE_NAME, ResumeState, ShardBuilder
from peftchat.merging.output import (
    MergedBase,
    MergeReport,
    check_written,
    make_loadable,
    write_config_and_tokenizer,
    write_index,
    write_report,
)
from peftchat.merging.safetensors_io import ShardWriter
from peftchat.merging.verify import verify_merged

_LOCK = ".lock"


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
    if output.exists() and not options.overwrite:
        raise UserError(
            "the output folder is already there", where=str(output), hint="Choose another with -o, or --overwrite."
        )
    job = prepare_merge(folder, options)
    partial = _beside(output, "partial")
    try:
        with _working_folder(partial):
            try:
                resumed = _write_shards(job, partial, options.block_bytes)
            except UserError:  # a layer that PEFT cannot merge: resuming would fail too
                shutil.rmtree(partial)
                raise
            write_index(partial, job.plan)
            check_written(partial, job.plan)
            _write_small_files(job, partial, options)
            report = _report(job, options, resumed, started)
            if options.verify:
                report = replace(report, verification=verify_merged(job, partial, options))
            report = replace(report, seconds=monotonic() - started)
            write_report(partial, report)
            if report.verification is not None and not report.verification.passed:
                raise VerificationError(report.verification.verdict)
    except VerificationError as error:
        failed = _beside(output, "failed")
        shutil.rmtree(failed, ignore_errors=True)
        partial.rename(failed)
        raise VerificationError(f"{error} The result is in {failed}, not in {output}.") from error
    except OSError as error:
        hint = "Free disk space and start again to resume, or choose another folder with -o."
        raise UserError(f"cannot write: {error.strerror or error}", where=str(partial), hint=hint) from error
    _publish(partial, output)
    return MergeResult(output, report)


def _beside(output: Path, suffix: str) -> Path:
    return output.with_name(f"{output.name}.{suffix}")


@contextmanager
def _working_folder(partial: Path) -> Iterator[None]:
    """Create the folder and lock it against a second merge."""
    partial.mkdir(parents=True, exist_ok=True)
    lock_file = partial / _LOCK
    lock = FileLock(lock_file, timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        raise UserError("another merge is writing to this folder", where=str(partial)) from error
    try:
        yield
    finally:
        lock.release()
        lock_file.unlink(missing_ok=True)


def _write_shards(job: MergeJob, partial: Path, block_bytes: int) -> int:
    """Write every shard that is not there yet and return how many were."""
    state = ResumeState.open(partial, job.fingerprint)
    for file in partial.iterdir():
        if file.name not in (*state.done, _LOCK):
            file.unlink()
    state.save()
    resumed = len(state.done)
    sizes = {name: sum(tensor.spec.bytes for tensor in tensors) for name, tensors in job.plan.shards.items()}
    builder = ShardBuilder(job.plan, job.weights, block_bytes)
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
    config = job.weights.empty_model.model.config
    dtype = options.dtype or job.base.config.dtype
    write_config_and_tokenizer(
        partial, config, job.source.folder, job.base.folder, untied=bool(job.plan.untied), dtype=dtype
    )


def _report(job: MergeJob, options: MergeOptions, resumed: int, started: float) -> MergeReport:
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
        versions={name: version(name) for name in ("peftchat", "peft", "transformers", "torch", "safetensors")},
    )


def _publish(partial: Path, output: Path) -> None:
    """Rename the finished folder; a folder that it replaces is moved away first and removed last."""
    old = _beside(output, "old")
    if output.exists():
        shutil.rmtree(old, ignore_errors=True)
        output.rename(old)
    (partial / RESUME_STATE_NAME).unlink()
    make_loadable(partial)
    partial.rename(output)
    shutil.rmtree(old, ignore_errors=True)
