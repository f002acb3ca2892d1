"""`run.json`: what a finished run was and did."""

from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

import torch

from peftchat.chat_template.registry import ChatFormat
from peftchat.dataset.cache import EncodedSplit, Split
from peftchat.models.adapter_files import is_adapted
from peftchat.models.new_tokens import is_tied, vocabulary_of
from peftchat.models.rows import MODULE_NAME, rows_of
from peftchat.training.flops import matmul_peak, parameters_of, training_flops, true_size
from peftchat.training.meter import Totals, peak_memory_bytes
from peftchat.training.placement import Placement

if TYPE_CHECKING:
    from peftchat.recipe import LoadedRecipe
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


def run_summary(
    loaded: "LoadedRecipe",
    placement: Placement,
    trainer: "ChatTrainer",
    chat: ChatFormat,
    rows: Mapping[Split, EncodedSplit],
    lines: Sequence[Mapping[str, Any]],
    totals: Totals,
) -> dict[str, Any]:
    """The parts of `run.json` that follow from the trainer, the rows and the metrics.

    Args:
        lines: the lines of `metrics.jsonl`.
        totals: counts of all processes.
    """
    recipe = loaded.recipe
    model = trainer.model
    train = rows["train"].stats
    evaluations = [line for line in lines if "eval_loss" in line]
    trained = sum(true_size(parameter) for parameter in model.parameters() if parameter.requires_grad)
    return {
        "method": recipe.method,
        "base": recipe.model.name,
        "base_vocabulary_size": _base_vocabulary(trainer, chat),
        "steps": trainer.state.global_step,
        "epochs": trainer.state.epoch,
        "rows": train.rows,
        "eval_rows": rows["eval"].stats.rows if "eval" in rows else None,
        "dropped": train.dropped,
        "shortened": train.shortened,
        "special_text": train.lookalikes,
        "forms": train.forms,
        "tokens": totals.tokens,
        "supervised_tokens": totals.supervised,
        "padding_fraction": 1.0 - totals.tokens / totals.positions if totals.positions else 0.0,
        "seconds": totals.seconds,
        "tokens_per_second": totals.tokens / totals.seconds if totals.seconds else None,
        "peak_memory_bytes": peak_memory_bytes(),
        "parameters": parameters_of(model),
        "trainable_parameters": trained,
        "train_loss": _mean_training_loss(lines),
        "eval_loss_before": evaluations[0]["eval_loss"] if evaluations and evaluations[0]["step"] == 0 else None,
        "eval_loss": evaluations[-1]["eval_loss"] if evaluations else None,
        "model_flops_utilisation": _utilisation(trainer, placement, totals),
        "attention": trainer.causal_model.config._attn_implementation,
        "template": chat.template.name,
        "end_token": chat.template.end_token,
        "strategy": placement.strategy,
        "world_size": placement.world_size,
        "device": torch.cuda.get_device_name() if placement.gpus else "CPU",
        "versions": {package: _version(package) for package in _PACKAGES},
    }


def _base_vocabulary(trainer: "ChatTrainer", chat: ChatFormat) -> int | None:
    """Rows that the untouched base's embedding has; None where full fine-tuning has grown it."""
    rows = rows_of(trainer.causal_model)
    if rows is not None:
        return rows.vocabulary
    return None if chat.new_tokens else vocabulary_of(trainer.causal_model)


def _mean_training_loss(lines: Sequence[Mapping[str, Any]]) -> float | None:
    """Mean over optimizer steps; a logged line stands for the steps since the line before it."""
    total, last = 0.0, 0
    for line in lines:
        if line.get("loss") is not None:
            total += line["loss"] * (line["step"] - last)
            last = line["step"]
    return total / last if last else None


def _utilisation(trainer: "ChatTrainer", placement: Placement, totals: Totals) -> float | None:
    """Model FLOPs utilisation (Chowdhery et al., 2022), against the matrix rate measured here and now."""
    if not totals.seconds:
        return None
    model = trainer.causal_model
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    outside = {id(embedding), id(head)}
    rows = {id(parameter) for name, parameter in model.named_parameters() if MODULE_NAME in name.split(".")}
    body = {id(p): p for p in model.parameters() if p.dim() >= 2 and id(p) not in outside | rows}
    trained = sum(true_size(p) for p in body.values() if p.requires_grad)
    flops = training_flops(
        body=sum(true_size(p) for p in body.values()),
        head=true_size(embedding if is_tied(model) else head),
        trained_body=trained,
        trains_head=not is_adapted(trainer.model),
        tokens=totals.tokens,
        supervised=totals.supervised,
    )
    dtype = torch.float32 if not (trainer.args.bf16 or trainer.args.fp16) else torch.bfloat16
    processes = placement.world_size if placement.gpus else 1
    return flops / totals.seconds / (matmul_peak(trainer.args.device, dtype) * processes)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
