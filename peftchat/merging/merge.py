"""The merge from end to end: plan, fold, write, check, verify, and only then give the folder its name."""

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
from peftchat.merging.merge_plan import JOURNAL_NAME, ResumeState, ShardBuilder
from peftchat.merging.output import (
    MergeReport,
    check_written,
    make_loadable,
    write_companions,
    write_index,
    write_report,
)
from peftchat.merging.prepare import MergeJob, MergeOptions, prepare
from peftchat.merging.safetensors_io import ShardWriter
from peftchat.merging.verify import verify_merged

_LOCK = ".lock"


@dataclass(frozen=True)
class MergeResult:
    """Where the merged model is, and what is known about it."""

    folder: Path
    report: MergeReport


def merge_run(folder: Path, options: MergeOptions) -> MergeResult:
    """Merge the run in `folder`.

    Work goes on in `OUT.partial`, which holds no `config.json`, and so is no model to any loader, until everything is
    written, checked and proved. A second start continues there.

    Raises:
        UserError: something the user gave cannot be used.
        VerificationError: the result is not what was planned or trained; it lies in `OUT.failed`.
    """
    started = monotonic()
    return_large_blocks()
    out = options.out or folder / "merged"
    if out.exists() and not options.overwrite:
        raise UserError("the folder is already there", where=str(out), hint="Choose another with -o, or --overwrite.")
    job = prepare(folder, options)
    partial = _beside(out, "partial")
    try:
        with _working_folder(partial, out):
            try:
                resumed = _write_shards(job, partial, options.block)
            except UserError:  # a layer that PEFT will not merge: no second start would do better
                shutil.rmtree(partial)
                raise
            write_index(partial, job.plan)
            check_written(partial, job.plan)
            _write_small_files(job, partial, options)
            made = _report(job, options, resumed, started)
            if options.verify:
                made = replace(made, verification=verify_merged(job, partial, options))
            made = replace(made, seconds=monotonic() - started)
            write_report(partial, made)
            if made.verification is not None and not made.verification.passed:
                raise VerificationError(made.verification.verdict)
    except VerificationError as error:
        failed = _beside(out, "failed")
        shutil.rmtree(failed, ignore_errors=True)
        partial.rename(failed)
        raise VerificationError(f"{error} The result is in {failed}, not in {out}.") from error
    except OSError as error:
        hint = "What is written stays for a second start; free space or choose another folder with -o."
        raise UserError(f"cannot write: {error.strerror or error}", where=str(partial), hint=hint) from error
    _publish(partial, out)
    return MergeResult(out, made)


def _beside(out: Path, suffix: str) -> Path:
    return out.with_name(f"{out.name}.{suffix}")


@contextmanager
def _working_folder(partial: Path, out: Path) -> Iterator[None]:
    """Make the folder and keep a second merge out of it."""
    partial.mkdir(parents=True, exist_ok=True)
    lock_file = partial / _LOCK
    lock = FileLock(lock_file, timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        raise UserError("another merge is writing there", where=str(partial)) from error
    try:
        yield
    finally:
        lock.release()
        lock_file.unlink(missing_ok=True)


def _write_shards(job: MergeJob, partial: Path, block: int) -> int:
    """Write every shard that is not there yet; returns how many were."""
    kept = ResumeState.open(partial, job.fingerprint)
    for left in partial.iterdir():
        if left.name not in (*kept.done, _LOCK):
            left.unlink()
    kept.save()
    resumed = len(kept.done)
    sizes = {file: sum(tensor.spec.bytes for tensor in tensors) for file, tensors in job.plan.shards.items()}
    producer = ShardBuilder(job.plan, job.weights, block)
    with ByteProgress("Merging", sum(sizes.values()), sum(sizes[file] for file in kept.done)) as progress:
        for file, tensors in job.plan.shards.items():
            if file in kept.done:
                continue
            with ShardWriter(partial / file, [tensor.spec for tensor in tensors]) as writer:
                for tensor in tensors:
                    for rows in producer.rows(tensor):
                        writer.append(rows)
                        progress.advance(rows.nbytes)
            kept.record(file, writer.digest)
    return resumed


def _write_small_files(job: MergeJob, partial: Path, options: MergeOptions) -> None:
    config = job.weights.hollow.model.config
    dtype = options.dtype or job.base.config.dtype
    write_companions(partial, config, job.run.folder, job.base.folder, untied=bool(job.plan.untied), dtype=dtype)


def _report(job: MergeJob, options: MergeOptions, resumed: int, started: float) -> MergeReport:
    tensors = [tensor for shard in job.plan.shards.values() for tensor in shard]
    embedding = job.weights.hollow.model.get_input_embeddings().weight.shape[0]
    before = job.base.config.get_text_config().vocab_size
    named = [member for member in job.members if not member.is_rows]
    return MergeReport(
        base=job.run.base.name,
        adapters=[(str(member.folder), member.weight) for member in named],
        method=[str(member.config.peft_type).rpartition(".")[2].lower() for member in named],
        choice=job.choice,
        dtype=str(options.dtype or job.base.config.dtype).removeprefix("torch."),
        tensors=len(tensors),
        bytes=job.plan.bytes,
        folded_bytes=job.plan.folded_bytes,
        shards=len(job.plan.shards),
        resumed_shards=resumed,
        vocabulary=embedding,
        grown=max(0, embedding - before),
        tied=bool(job.weights.hollow.ties) and not job.plan.untied,
        seconds=monotonic() - started,
        versions={name: version(name) for name in ("peftchat", "peft", "transformers", "torch", "safetensors")},
    )


def _publish(partial: Path, out: Path) -> None:
    """Rename the finished folder; an old one that may be replaced is moved away first and removed last."""
    old = _beside(out, "old")
    if out.exists():
        shutil.rmtree(old, ignore_errors=True)
        out.rename(old)
    (partial / JOURNAL_NAME).unlink()
    make_loadable(partial)
    partial.rename(out)
    shutil.rmtree(old, ignore_errors=True)
