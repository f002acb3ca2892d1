"""A plain LoRA on disk: its tensors and config, the rank that suffices, and the folder that it is written to."""

import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from peftchat.errors import UserError, VerificationError, first_line
from peftchat.export.lora_factors import FactoredUpdate, relative_error
from peftchat.export.lora_proof import Comparison, Proof
from peftchat.merging.adapter_file import ADAPTER_WEIGHTS_NAME
from peftchat.merging.adapter_source import InstalledAdapter
from peftchat.merging.delta_rules import trained_token_rows
from peftchat.merging.deltas import ReplaceRows, mean_rows, weighted_mean
from peftchat.merging.merge_job import MergeJob
from peftchat.models.safetensors_files import read_header
from peftchat.models.saving import TOKEN_ROWS
from peftchat.models.source import ModelSource
from peftchat.output_paths import InputPath, check_output, check_replaceable, free_name

MAX_RANK = 512
"""The largest rank that the search tries; vLLM serves none above it."""
_FIRST_RANK = 8
"""Where the search begins."""
_ROOT = "base_model.model."


@dataclass(frozen=True)
class KeptTensors:
    """What a LoRA holds unchanged beside its factors.

    Attributes:
        tensors: by their names in the adapter's file.
        token_ids: the tokens whose embeddings are held, by module.
        modules_to_save: modules that were trained as a whole.
    """

    tensors: dict[str, torch.Tensor]
    token_ids: dict[str, list[int]]
    modules_to_save: list[str]

    @classmethod
    def of(cls, adapters: Sequence[tuple[float, InstalledAdapter]]) -> "KeptTensors":
        """Collect what one adapter holds, or the mean of several by weight.

        Args:
            adapters: with their weights; an adapter that holds another's added tokens has the weight of that one.

        Raises:
            UserError: the weights of adapters that trained the same add up to 0 or less.
        """
        from peft.utils.other import ModulesToSaveWrapper

        rows: dict[str, list[tuple[float, ReplaceRows]]] = {}
        whole: dict[str, list[tuple[float, torch.Tensor]]] = {}
        saved: set[str] = set()
        for weight, adapter in adapters:
            for name, value in adapter.saved.items():
                whole.setdefault(name, []).append((weight, value))
            for module in adapter.modules:
                found = trained_token_rows(module)
                # A tied head has the rows of the embedding.
                if found is not None and f"{module.path}.weight" not in adapter.empty_model.ties:
                    rows.setdefault(module.path, []).append((weight, found))
                elif isinstance(module.layer, ModulesToSaveWrapper):
                    saved.add(module.path)
                    for name, value in module.layer.modules_to_save["default"].state_dict().items():
                        whole.setdefault(f"{module.path}.{name}", []).append((weight, value))
        tensors = {f"{_ROOT}{name}": weighted_mean(values) for name, values in whole.items()}
        kept = {name: value.clone().contiguous() for name, value in tensors.items() if value is not None}
        ids: dict[str, list[int]] = {}
        for path, parts in rows.items():
            means = mean_rows(parts)
            ids[path] = sorted(means)
            stacked = torch.stack([means[index] for index in ids[path]])
            kept[f"{_ROOT}{path}.token_adapter.trainable_tokens_delta"] = stacked
        return cls(kept, ids, sorted(saved))


@dataclass(frozen=True)
class LoraWriter:
    """Writes a LoRA of any rank and compares what is then in the files.

    Attributes:
        job: the base, and what the LoRA stands for.
        updates: the factored update of each layer.
        targets: PEFT's `target_modules`.
        largest: the largest rank that may be tried.
    """

    job: MergeJob
    proof: Proof
    updates: list[FactoredUpdate]
    kept: KeptTensors
    targets: list[str]
    largest: int

    @property
    def added_tokens(self) -> list[int]:
        """The ids whose embeddings the LoRA holds."""
        return sorted({token for ids in self.kept.token_ids.values() for token in ids})

    def write_and_compare(self, folder: Path, rank: int) -> Comparison:
        """Write the LoRA of a rank and compare what is then in the files."""
        from peft import LoraConfig
        from safetensors.torch import save_file

        tensors = dict(self.kept.tensors)
        for update in self.updates:
            lora_b, lora_a = update.at_rank(rank)
            tensors[f"{_ROOT}{update.path}.lora_B.weight"] = lora_b
            tensors[f"{_ROOT}{update.path}.lora_A.weight"] = lora_a
        save_file(tensors, str(folder / ADAPTER_WEIGHTS_NAME), metadata={"format": "pt"})
        base = self.job.source.base
        LoraConfig(
            task_type="CAUSAL_LM",
            base_model_name_or_path=base.absolute_name,
            revision=base.revision,
            r=rank,
            lora_alpha=rank,
            target_modules=self.targets,
            fan_in_fan_out=self.updates[0].is_conv1d,
            trainable_token_indices=self.kept.token_ids or None,
            modules_to_save=self.kept.modules_to_save or None,
            inference_mode=True,
        ).save_pretrained(str(folder))
        return self.proof.compare(folder, rank, relative_error(self.updates, rank))


def target_modules(adapter: InstalledAdapter, paths: Sequence[str]) -> list[str]:
    """Return the last parts of the layers' names if those name no other layer, else the names themselves."""
    endings = {path.rpartition(".")[2] for path in paths}
    outer = {name.removesuffix(".weight").removesuffix(".bias") for name in adapter.empty_model.slots}
    named = {path for path in outer if path.rpartition(".")[2] in endings}
    return sorted(endings if named == set(paths) else paths)


def written_factors(folder: Path) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Read B, shape (outputs, rank), and A, shape (rank, inputs), of each layer of a LoRA, by the layer's path."""
    from safetensors.torch import load_file

    tensors = load_file(folder / ADAPTER_WEIGHTS_NAME)
    ending = ".lora_B.weight"
    paths = [name.removesuffix(ending) for name in tensors if name.endswith(ending)]
    return {path.removeprefix(_ROOT): (tensors[f"{path}{ending}"], tensors[f"{path}.lora_A.weight"]) for path in paths}


def search_rank(
    compare: Callable[[int], Comparison], rank: int | None, limit: float, largest: int, subject: str
) -> list[Comparison]:
    """Return the comparisons that were made; the last one is within the tolerance, at the rank to use.

    Args:
        compare: writes and compares a rank.
        rank: the user's; None for the smallest power of two within the tolerance.
        limit: the tolerance in nats per token.
        largest: the largest rank that may be tried.
        subject: what the LoRA stands for, for messages: `the adapter`.

    Raises:
        VerificationError: none that may be used is.
    """
    tried: dict[int, Comparison] = {}

    def passes(one: int) -> bool:
        tried[one] = compare(one)
        return tried[one].within(limit)

    if rank is not None and passes(rank):
        return [tried[rank]]
    ladder = [2**power for power in range(largest.bit_length()) if 2**power < largest] + [largest]
    ladder = [one for one in ladder if one > (rank or 0)]
    # Large ranks are written and compared only where small ones fail.
    low, high = 0, next((index for index, one in enumerate(ladder) if one >= _FIRST_RANK), len(ladder) - 1)
    while ladder and not passes(ladder[high]):
        if high == len(ladder) - 1:
            ladder = []
        low, high = high + 1, min(high + 1, len(ladder) - 1)
    if not ladder:
        closest = min(tried.values(), key=lambda one: one.kl)
        raise VerificationError(refusal(closest, limit, subject) + " No rank up to it is within the tolerance.")
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if passes(ladder[middle]) else (middle + 1, high)
    needed = ladder[low]
    if rank is not None:
        raise VerificationError(refusal(tried[rank], limit, subject) + f" Rank {needed} is within the tolerance.")
    chosen = tried.pop(needed)
    return [*tried.values(), chosen]


def refusal(found: Comparison, limit: float, subject: str) -> str:
    """Return why a LoRA is not written."""
    return (
        f"A LoRA of rank {found.rank} does not compute what {subject} computes: KL {found.kl:.2e} and loss "
        f"{found.loss_before:.4f} → {found.loss_after:.4f} nats per token (allowed: {limit:g}), same next token at "
        f"{found.top1_agreement:.1%}. Nothing was written."
    )


def check_lora_output(output: Path, runs: Sequence[ModelSource], report: str, kind: str, *, overwrite: bool) -> None:
    """Check that a LoRA may be written to a folder.

    Args:
        output: the folder.
        runs: the runs that are read.
        report: name of the report by which a folder of this kind is known.
        kind: what the command writes, with its article.
        overwrite: whether an earlier result may be replaced; nothing else is, ever.

    Raises:
        UserError: it may not.
    """
    where = str(output)
    inputs = []
    for run in runs:
        recipe = run.recipe()
        named = [] if recipe is None else [replace(entry, is_read_recursively=False) for entry in recipe.inputs()]
        inputs += [InputPath(run.path, "the run"), InputPath(Path(run.base().name), "the base model"), *named]
    check_output(output, inputs, where)
    is_inside = any(os.path.realpath(output.parent) == os.path.realpath(run.path) for run in runs)
    if output.name == TOKEN_ROWS and is_inside:
        what = "the output would be taken for the run's own embeddings of added tokens"
        raise UserError(what, where=where, hint="Choose another output.")
    if not os.path.lexists(output):
        return
    if not output.is_dir():
        raise UserError("the output is a file, expected a folder", where=where, hint="Choose another with -o.")
    if not overwrite:
        raise UserError("the output already exists", where=where, hint="Choose another with -o, or --overwrite.")
    check_replaceable(output, kind, _foreign(output, report), where)


def _foreign(folder: Path, report: str) -> str | None:
    """Return a file that the command did not write; "" if the folder is none of its; None if it may be replaced."""
    names = sorted(entry.name for entry in folder.iterdir())
    if not names:
        return None
    try:
        known = json.loads((folder / report).read_text(encoding="utf-8"))["files"]
    except (OSError, ValueError, KeyError, TypeError):
        return ""
    return next((name for name in names if name not in known or not (folder / name).is_file()), None)


@contextmanager
def working_folder(output: Path) -> Iterator[Path]:
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


def count_parameters(folder: Path) -> int:
    """Return the numbers in an adapter's file."""
    total = 0
    for entry in read_header(folder / ADAPTER_WEIGHTS_NAME).values():
        count = 1
        for size in entry.shape:
            count *= size
        total += count
    return total
