"""What fills this process's memory at the end of a run, part by part, for `run.json`."""

import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from peftchat.chat_template.chat_format import ChatFormat
from peftchat.dataset.cache import EncodedSplit, Split
from peftchat.models.added_tokens import MODULE_NAME, find_added_tokens, is_tied, vocabulary_size
from peftchat.models.loading import end_ids
from peftchat.models.saving import is_adapted
from peftchat.runs.run_summary import MemoryParts, SampleAnswer
from peftchat.training.distributed import DistributedSetup
from peftchat.training.progress import memory_in_use
from peftchat.training.throughput import (
    TokenCounts,
    count_parameters,
    measure_matmul_flops,
    peak_memory_bytes,
    training_flops,
    unsharded_numel,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from peftchat.recipe import LoadedRecipe
    from peftchat.training.trainer import ChatTrainer


def memory_parts(trainer: "ChatTrainer", at_start: int, peak: int) -> MemoryParts:
    """Bytes of this process by part: what it held before the model came, what stays all the time, and the rest.

    `activations_and_other` is the peak without the parts that are known: activations, logits, gathered weights,
    buffers of communication, and what allocators keep.

    Args:
        at_start: bytes held before the model was loaded; 0 on a GPU.
        peak: the most bytes held.
    """
    parameters = list(trainer.model.parameters())
    trained = sum(_own_bytes(parameter) for parameter in parameters if parameter.requires_grad)
    frozen = [parameter for parameter in parameters if not parameter.requires_grad]
    known = {
        "baseline": at_start,
        "frozen_weights": sum(map(_own_bytes, frozen)) + _bytes_of(trainer.model.buffers()),
        "trained_weights": trained,
        # As large as the weights, wherever they are collected.
        "gradients": trained,
        "optimizer": _bytes_of(_tensors(_states(trainer))),
    }
    return MemoryParts(**known, activations_and_other=max(0, peak - sum(known.values())))


def _own_bytes(parameter: nn.Parameter) -> int:
    """Bytes of the part of a parameter that this process keeps; under ZeRO-3 a slice."""
    held: Tensor = getattr(parameter, "ds_tensor", parameter.data)
    return held.numel() * held.element_size()


def _bytes_of(tensors: Iterable[Tensor]) -> int:
    return sum({t.data_ptr(): t.numel() * t.element_size() for t in tensors}.values())


def _states(trainer: "ChatTrainer") -> Iterator[Any]:
    """What the optimizer keeps: its states, and under DeepSpeed float32 masters too."""
    optimizer: Any = trainer.optimizer
    seen: set[int] = set()
    while optimizer is not None and id(optimizer) not in seen:
        seen.add(id(optimizer))
        yield getattr(optimizer, "state", None)
        # The names of stage 2 and stage 3.
        yield getattr(optimizer, "single_partition_of_fp32_groups", None)
        yield getattr(optimizer, "fp32_partitioned_groups_flat", None)
        optimizer = getattr(optimizer, "optimizer", None)


def _tensors(held: Any) -> Iterator[Tensor]:
    if isinstance(held, Tensor):
        yield held
    elif isinstance(held, Mapping):
        for value in held.values():
            yield from _tensors(value)
    elif isinstance(held, list | tuple | Iterator):
        for value in held:
            yield from _tensors(value)


def seconds_since_start() -> float:
    """How long this process has been running."""
    import psutil

    return time.time() - float(psutil.Process(os.getpid()).create_time())


def baseline_memory() -> int:
    """Bytes in use now, to be called before the model is loaded: 0 on a GPU."""
    return 0 if torch.cuda.is_available() else memory_in_use()


_NEW_TOKENS = 120


def sample_answers(model: "PreTrainedModel", chat: ChatFormat, questions: Sequence[str]) -> list[SampleAnswer]:
    """Greedy answers to single questions. Under ZeRO-3 every process must call it."""
    was_training = model.training
    model.eval()
    given = [_answer(model, chat, question) for question in questions]
    model.train(was_training)
    return given


def _answer(model: "PreTrainedModel", chat: ChatFormat, question: str) -> SampleAnswer:
    tokenizer = chat.tokenizer
    messages = [{"role": "user", "content": question}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    ids = prompt["input_ids"].to(next(model.parameters()).device)
    with torch.no_grad():
        output = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=_NEW_TOKENS,
            do_sample=False,
            temperature=None,
            top_p=None,
            top_k=None,
        )[0, ids.shape[1] :].tolist()
    stopped = bool(output) and output[-1] in end_ids(model.generation_config.eos_token_id)
    text = tokenizer.decode(output[:-1] if stopped else output, skip_special_tokens=True)
    return SampleAnswer(question, text.strip(), stopped)


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
    placement: DistributedSetup,
    trainer: "ChatTrainer",
    chat: ChatFormat,
    rows: Mapping[Split, EncodedSplit],
    lines: Sequence[Mapping[str, Any]],
    totals: TokenCounts,
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
    trained = sum(unsharded_numel(parameter) for parameter in model.parameters() if parameter.requires_grad)
    return {
        "method": recipe.method,
        "base_model": recipe.model.name,
        "base_vocabulary_size": _base_vocabulary(trainer, chat),
        "steps": trainer.state.global_step,
        "epochs": trainer.state.epoch,
        "train_examples": train.rows,
        "eval_examples": rows["eval"].stats.rows if "eval" in rows else None,
        "dropped": train.dropped,
        "truncated": train.shortened,
        "special_token_text": train.lookalikes,
        "formats": train.forms,
        "tokens": totals.tokens,
        "supervised_tokens": totals.supervised,
        "padding_fraction": 1.0 - totals.tokens / totals.positions if totals.positions else 0.0,
        "seconds": totals.seconds,
        "tokens_per_second": totals.tokens / totals.seconds if totals.seconds else None,
        "peak_memory_bytes": peak_memory_bytes(),
        "parameters": count_parameters(model),
        "trainable_parameters": trained,
        "train_loss": _mean_training_loss(lines),
        "eval_loss_before": evaluations[0]["eval_loss"] if evaluations and evaluations[0]["step"] == 0 else None,
        "eval_loss": evaluations[-1]["eval_loss"] if evaluations else None,
        "model_flops_utilisation": _utilization(trainer, placement, totals),
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
    rows = find_added_tokens(trainer.causal_model)
    if rows is not None:
        return rows.vocabulary
    return None if chat.new_tokens else vocabulary_size(trainer.causal_model)


def _mean_training_loss(lines: Sequence[Mapping[str, Any]]) -> float | None:
    """Mean over optimizer steps; a logged line stands for the steps since the line before it."""
    total, last = 0.0, 0
    for line in lines:
        if line.get("loss") is not None:
            total += line["loss"] * (line["step"] - last)
            last = line["step"]
    return total / last if last else None


def _utilization(trainer: "ChatTrainer", placement: DistributedSetup, totals: TokenCounts) -> float | None:
    """Model FLOPs utilization (Chowdhery et al., 2022), against the matrix rate measured here and now."""
    if not totals.seconds:
        return None
    model = trainer.causal_model
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    outside = {id(embedding), id(head)}
    rows = {id(parameter) for name, parameter in model.named_parameters() if MODULE_NAME in name.split(".")}
    body = {id(p): p for p in model.parameters() if p.dim() >= 2 and id(p) not in outside | rows}
    trained = sum(unsharded_numel(p) for p in body.values() if p.requires_grad)
    flops = training_flops(
        body=sum(unsharded_numel(p) for p in body.values()),
        head=unsharded_numel(embedding if is_tied(model) else head),
        trained_body=trained,
        trains_head=not is_adapted(trainer.model),
        tokens=totals.tokens,
        supervised=totals.supervised,
    )
    dtype = torch.float32 if not (trainer.args.bf16 or trainer.args.fp16) else torch.bfloat16
    processes = placement.world_size if placement.gpus else 1
    return flops / totals.seconds / (measure_matmul_flops(trainer.args.device, dtype) * processes)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
