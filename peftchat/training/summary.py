"""Summary of a run: sample answers, added tokens, memory by part, and the rest of `run.json`."""

import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

import psutil
import torch
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn

from peftchat.chat_template.chat_format import ChatFormat
from peftchat.dataset.mixture import examples_per_epoch
from peftchat.models.added_tokens import (
    MODULE_NAME,
    EmbeddingSnapshot,
    find_added_tokens,
    is_tied,
    l2_distance,
    vocabulary_size,
)
from peftchat.models.base_config import attention_shape
from peftchat.models.experts import active_shares
from peftchat.models.saving import is_adapted
from peftchat.runs.eval_losses import ConversationLoss, group_losses
from peftchat.runs.run_summary import AddedToken, AutoSetting, KeptStep, MemoryParts, RunSummary, SampleAnswer
from peftchat.training.context import TrainContext
from peftchat.training.model import TrainableModel
from peftchat.training.number_checks import number_warnings
from peftchat.training.throughput import (
    TokenCounts,
    attention_flops,
    count_parameters,
    measure_matmul_flops,
    peak_memory_bytes,
    training_flops,
    unsharded_numel,
)

if TYPE_CHECKING:
    from peftchat.training.trainer import ChatTrainer


_PACKAGES = (
    "peftchat",
    "torch",
    "transformers",
    "trl",
    "peft",
    "accelerate",
    "datasets",
    "tokenizers",
    "bitsandbytes",
    "deepspeed",
)


@dataclass(frozen=True, slots=True)
class FitResult:
    """Results of the training loop.

    Attributes:
        token_counts: counts of all processes.
        final_embeddings: the added tokens' embeddings after training; None without added tokens.
        samples_before: answers before the first step.
        seconds_to_first_step: from the start of the process to the end of the first step.
        kept: the step whose weights the model has, where evaluations were compared.
    """

    token_counts: TokenCounts
    final_embeddings: EmbeddingSnapshot | None
    samples_before: Sequence[SampleAnswer]
    seconds_to_first_step: float | None
    kept: KeptStep | None = None


def summarize(
    context: TrainContext,
    trainer: "ChatTrainer",
    model: TrainableModel,
    fitted: FitResult,
    samples_after: Sequence[SampleAnswer],
    auto_settings: Sequence[AutoSetting] = (),
) -> RunSummary:
    """Collect the run's results and write them into the run folder; every process must call it.

    Args:
        context: the run.
        trainer: the trainer.
        model: the model.
        fitted: what training returned.
        samples_after: answers of the trained model.
        auto_settings: settings chosen right before the first step.

    Returns:
        The summary, the same in every process.
    """
    held_out = trainer.write_held_out_losses()
    summaries: list[RunSummary | None] = [None]
    if context.is_main:
        context.content.finish(context.run_folder)
        summary = _summary(context, trainer, model, fitted, samples_after, held_out, auto_settings)
        summary.write(context.run_folder)
        summaries = [summary]
    (summary_of_main,) = broadcast_object_list(summaries)
    assert summary_of_main is not None
    return summary_of_main


def _summary(
    context: TrainContext,
    trainer: "ChatTrainer",
    model: TrainableModel,
    fitted: FitResult,
    samples_after: Sequence[SampleAnswer],
    held_out: Sequence[ConversationLoss],
    auto_settings: Sequence[AutoSetting],
) -> RunSummary:
    recipe, distributed, splits = context.recipe, context.distributed, context.splits
    stats, counts = splits["train"].stats, fitted.token_counts
    lines: list[Any] = context.run_folder.metrics.read()
    evaluations = [line for line in lines if "eval_loss" in line]
    peak = peak_memory_bytes()
    return RunSummary(
        method=recipe.method,
        objective=recipe.objective,
        optimizer=recipe.training.optim,
        master_weights=_master_weights(context),
        optimizer_in_backward=trainer.frees_gradients,
        base_model=recipe.model.name,
        first_stage=recipe.model.adapter,
        base_vocabulary_size=_base_vocabulary(trainer, context.chat),
        steps=trainer.state.global_step,
        epochs=trainer.state.epoch,
        train_examples=stats.examples,
        examples_per_epoch=examples_per_epoch(context.recipe, stats),
        eval_examples=splits["eval"].stats.examples if "eval" in splits else None,
        dropped={**stats.left_out, **stats.dropped},
        unused_fields=stats.unused,
        unsupported_roles=stats.unsupported_roles,
        expanded=stats.expanded,
        expanded_examples=stats.expanded_examples,
        truncated=stats.truncated,
        special_token_text=stats.special_token_text,
        formats=stats.formats,
        tokens=counts.tokens,
        supervised_tokens=counts.supervised,
        padding_fraction=1.0 - counts.tokens / counts.positions if counts.positions else 0.0,
        seconds=counts.seconds,
        seconds_to_first_step=fitted.seconds_to_first_step,
        tokens_per_second=counts.tokens / counts.seconds if counts.seconds else None,
        peak_memory_bytes=peak,
        memory_bytes=_memory_parts(trainer, model.baseline_bytes, peak),
        parameters=count_parameters(trainer.model),
        trainable_parameters=sum(unsharded_numel(p) for p in trainer.model.parameters() if p.requires_grad),
        train_loss=_mean_training_loss(lines),
        eval_loss_before=evaluations[0]["eval_loss"] if evaluations and evaluations[0]["step"] == 0 else None,
        eval_loss=_final_loss(evaluations, fitted.kept),
        eval_by=group_losses(held_out) if held_out else None,
        eval_pairs=trainer.pair_summary,
        eval_labels=trainer.label_summary,
        spikes=tuple(trainer.checks.spikes),
        outliers=trainer.checks.outliers,
        train_by_source=trainer.checks.by_source.means() or None,
        kept=fitted.kept,
        model_flops_utilisation=_flops_utilization(context, trainer, counts),
        attention=trainer.causal_model.config._attn_implementation,
        template=context.chat.template.name,
        end_token=context.chat.template.end_token,
        strategy=distributed.strategy,
        world_size=distributed.world_size,
        device=torch.cuda.get_device_name() if distributed.gpus else "CPU",
        versions={package: _version(package) for package in _PACKAGES},
        new_tokens=added_tokens(context.chat, model.initial_embeddings, fitted),
        samples_before=tuple(fitted.samples_before),
        samples_after=tuple(samples_after),
        warnings=tuple(number_warnings(trainer.checks.counts, lines)),
        notes=tuple(context.notes.lines),
        auto_settings=(*context.options.auto_settings, *auto_settings),
        fingerprints=context.content.record.fingerprints,
        allowed_changes=context.content.record.allowed_changes,
        command=context.options.command,
        started=context.started.isoformat(timespec="seconds"),
        finished=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def added_tokens(chat: ChatFormat, initial: EmbeddingSnapshot | None, fitted: FitResult) -> tuple[AddedToken, ...]:
    """Return how far each added token's embeddings moved."""
    if initial is None or fitted.final_embeddings is None:
        return ()
    inputs, outputs = l2_distance(initial, fitted.final_embeddings)
    return tuple(
        AddedToken(token.token, token.id, seen, input_moved, output_moved)
        for token, seen, input_moved, output_moved in zip(
            chat.new_tokens, fitted.token_counts.seen, inputs, outputs, strict=True
        )
    )


def _master_weights(context: TrainContext) -> str:
    """Return the dtype in which the optimizer keeps trained weights."""
    recipe = context.recipe
    return recipe.training.master_weights if recipe.method == "full" else "float32"


def _memory_parts(trainer: "ChatTrainer", baseline: int, peak: int) -> MemoryParts:
    """Return this process's peak memory by part, in bytes.

    Args:
        trainer: holds model and optimizer.
        baseline: held before the model was loaded.
        peak: held at most.
    """
    parameters = list(trainer.model.parameters())
    frees_gradients = trainer.frees_gradients
    trained = sum(_local_bytes(parameter) for parameter in parameters if parameter.requires_grad)
    frozen = [parameter for parameter in parameters if not parameter.requires_grad]
    known = {
        "baseline": baseline,
        "frozen_weights": sum(map(_local_bytes, frozen)) + _total_bytes(trainer.model.buffers()),
        "trained_weights": trained,
        # As large as the weights, wherever they are accumulated; of one weight where they are freed at once.
        "gradients": max(map(_local_bytes, parameters)) if frees_gradients else trained,
        "optimizer": _total_bytes(_tensors(_optimizer_states(trainer))),
    }
    return MemoryParts(**known, activations_and_other=max(0, peak - sum(known.values())))


def _local_bytes(parameter: nn.Parameter) -> int:
    """Return the bytes of a parameter that this process holds: under ZeRO-3 those of its partition."""
    local: Tensor = getattr(parameter, "ds_tensor", parameter.data)
    return local.numel() * local.element_size()


def _total_bytes(tensors: Iterable[Tensor]) -> int:
    return sum({tensor.data_ptr(): tensor.numel() * tensor.element_size() for tensor in tensors}.values())


def _optimizer_states(trainer: "ChatTrainer") -> Iterator[Any]:
    """Yield the optimizer's states, and under DeepSpeed its float32 master weights."""
    optimizer: Any = trainer.optimizer
    seen: set[int] = set()
    while optimizer is not None and id(optimizer) not in seen:
        seen.add(id(optimizer))
        yield getattr(optimizer, "state", None)
        # The attributes of ZeRO-2 and ZeRO-3.
        yield getattr(optimizer, "single_partition_of_fp32_groups", None)
        yield getattr(optimizer, "fp32_partitioned_groups_flat", None)
        optimizer = getattr(optimizer, "optimizer", None)


def _tensors(nested: Any) -> Iterator[Tensor]:
    """Yield the tensors in nested mappings and sequences."""
    if isinstance(nested, Tensor):
        yield nested
    elif isinstance(nested, Mapping):
        for value in nested.values():
            yield from _tensors(value)
    elif isinstance(nested, list | tuple | Iterator):
        for value in nested:
            yield from _tensors(value)


def seconds_since_start() -> float:
    """Return the age of this process."""
    return time.time() - float(psutil.Process(os.getpid()).create_time())


def _base_vocabulary(trainer: "ChatTrainer", chat: ChatFormat) -> int | None:
    """Return the rows of the base's embedding; None if full fine-tuning resized it."""
    added = find_added_tokens(trainer.causal_model)
    if added is not None:
        return added.vocab_size
    return None if chat.new_tokens else vocabulary_size(trainer.causal_model)


def _mean_training_loss(lines: Sequence[Mapping[str, Any]]) -> float | None:
    """Return the mean over optimizer steps; a logged line stands for all steps since the line before it."""
    total, last = 0.0, 0
    for line in lines:
        if line.get("loss") is not None:
            total += line["loss"] * (line["step"] - last)
            last = line["step"]
    return total / last if last else None


def _final_loss(evaluations: Sequence[Mapping[str, Any]], kept: KeptStep | None) -> float | None:
    """Return the held-out loss of the weights that are kept."""
    losses = [line["eval_loss"] for line in evaluations if kept is None or line["step"] == kept.step]
    return losses[-1] if losses else None


_PEAK_SECONDS = 0.4
"""How long the rate of matrix products is measured; a tenth of it for short runs."""


def _flops_utilization(context: TrainContext, trainer: "ChatTrainer", counts: TokenCounts) -> float | None:
    """Return the model FLOPs utilization (Chowdhery et al., 2022), relative to a measured rate of matrix products."""
    if not counts.seconds:
        return None
    model = trainer.causal_model
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    outside = {id(embedding), id(head)}
    added = {id(parameter) for name, parameter in model.named_parameters() if MODULE_NAME in name.split(".")}
    body = {id(p): p for p in model.parameters() if p.dim() >= 2 and id(p) not in outside | added}
    shares = active_shares(model, model.config)
    used = {key: round(unsharded_numel(p) * shares.get(key, 1.0)) for key, p in body.items()}
    flops = training_flops(
        body=sum(used.values()),
        head=unsharded_numel(embedding if is_tied(model) else head),
        trained_body=sum(used[key] for key, p in body.items() if p.requires_grad),
        trains_head=not is_adapted(trainer.model),
        tokens=counts.tokens,
        supervised=counts.supervised,
    )
    layers, width = attention_shape(model.config, context.recipe.data.max_length)
    flops += attention_flops(layers=layers, width=width, pairs=counts.attended_pairs)
    dtype = torch.float32 if not (trainer.args.bf16 or trainer.args.fp16) else torch.bfloat16
    processes = context.distributed.world_size if context.distributed.gpus else 1
    # A run of a few seconds, of which a comparison has dozens, spends little on it.
    seconds = _PEAK_SECONDS if counts.seconds > 20 * _PEAK_SECONDS else _PEAK_SECONDS / 10
    peak = measure_matmul_flops(trainer.args.device, dtype, seconds)
    return flops / counts.seconds / (peak * processes)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
