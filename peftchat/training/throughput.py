"""Throughput: tokens and seconds of training, their budgets, floating-point operations, and peak memory."""

import functools
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from peftchat.errors import UserError
from peftchat.training.learning_rate import set_rates, unwrapped

if TYPE_CHECKING:
    from peftchat.recipe import TrainingSection


def count_parameters(model: nn.Module) -> int:
    """Return the number of weights of a model, before quantization packs them and ZeRO-3 shards them."""
    return sum(unsharded_numel(parameter) for parameter in model.parameters())


def unsharded_numel(parameter: nn.Parameter) -> int:
    """Return the number of elements of a parameter, before packing and sharding."""
    state: Any = getattr(parameter, "quant_state", None)
    if state is not None:
        return int(torch.Size(state.shape).numel())
    # ZeRO-3 empties a parameter and keeps its size beside it.
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def training_flops(
    *, body: int, head: int, trained_body: int, trains_head: bool, tokens: int, supervised: int
) -> float:
    """Return the floating-point operations of forward and backward over some tokens.

    Per weight and token: two forward, two for the gradient of the activations, and two for the gradient of the weight
    if it is trained. The head counts only at supervised tokens (Kaplan et al., 2020). `attention_flops` come on top.

    Args:
        body: weights in matrix products, without embedding and head.
        head: weights of the head.
        trained_body: trained weights of the body, adapters included.
        trains_head: whether the head is trained.
        tokens: tokens of all batches.
        supervised: tokens with a target.
    """
    body_flops = (4 * body + 2 * trained_body) * tokens
    head_flops = (6 if trains_head else 4) * head * supervised
    return float(body_flops + head_flops)


def attention_flops(*, layers: int, width: int, pairs: float) -> float:
    """Return the floating-point operations of attention in forward and backward.

    Per layer, pair and channel: two for the score and two for the weighted value, and twice as many backward (Chowdhery
    et al., 2022, who count the pairs of a token with later ones too).

    Args:
        layers: layers with attention.
        width: channels of all query heads together.
        pairs: pairs of a token and one that it attends to, itself included.
    """
    return 12.0 * layers * width * pairs


@functools.cache
def measure_matmul_flops(device: torch.device, dtype: torch.dtype, seconds: float = 0.4) -> float:
    """Measure the floating-point operations per second of matrix products on a device, once per process.

    On several cores of a CPU it is the better of two sizes, because libraries compute some products on one core.

    Args:
        device: where.
        dtype: of the matrices.
        seconds: how long to measure, at least one product of each size.
    """
    sizes = (8192,) if device.type == "cuda" else (1024, 2048)[: min(2, torch.get_num_threads())]
    return max(_matmul_flops(size, device, dtype, seconds / len(sizes)) for size in sizes)


def _matmul_flops(size: int, device: torch.device, dtype: torch.dtype, seconds: float) -> float:
    one, other = torch.randn(2, size, size, device=device).to(dtype)
    best = 0.0
    stop = time.perf_counter() + seconds
    while time.perf_counter() < stop:
        start = time.perf_counter()
        product = one @ other
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = max(best, 2 * size**3 / (time.perf_counter() - start))
        del product
    return best


@dataclass(slots=True)
class TokenCounts:
    """Counts of one process over the run.

    Attributes:
        tokens: tokens trained on, without padding.
        attended_pairs: pairs of a token and one that it attends to.
        positions: tokens with padding.
        supervised: tokens with a target.
        seconds: time of the training steps.
        seen: occurrences of each added token.
        seen_before_target: occurrences with a later target in their conversation: they give the input embedding a
            gradient.
    """

    tokens: int = 0
    attended_pairs: int = 0
    positions: int = 0
    supervised: int = 0
    seconds: float = 0.0
    seen: list[int] = field(default_factory=list)
    seen_before_target: list[int] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """Return the counts as JSON values."""
        return asdict(self)

    @classmethod
    def zeros(cls, added_tokens: int) -> "TokenCounts":
        """Return the counts before the first step."""
        return cls(seen=[0] * added_tokens, seen_before_target=[0] * added_tokens)

    @classmethod
    def merge(cls, parts: "Sequence[TokenCounts]") -> "TokenCounts":
        """Return the counts of several processes together; their seconds are the longest."""
        return cls(
            tokens=sum(one.tokens for one in parts),
            attended_pairs=sum(one.attended_pairs for one in parts),
            positions=sum(one.positions for one in parts),
            supervised=sum(one.supervised for one in parts),
            seconds=max(one.seconds for one in parts),
            seen=[sum(counts) for counts in zip(*(one.seen for one in parts), strict=True)],
            seen_before_target=[sum(counts) for counts in zip(*(one.seen_before_target for one in parts), strict=True)],
        )


class Throughput:
    """Counts tokens on the device, without synchronization in a step, and measures the time of training alone.

    Args:
        added_tokens: number of added tokens that batches count.
        counts: the counts so far, when the run is resumed.
    """

    def __init__(self, added_tokens: int, counts: TokenCounts | None = None) -> None:
        self.counts = counts or TokenCounts.zeros(added_tokens)
        self._pending: Tensor | None = None
        self._since: float | None = None

    def add(
        self, real_tokens: Tensor, attended_pairs: Tensor, positions: int, labels: Tensor, tracked_counts: Tensor
    ) -> None:
        """Count one batch.

        Args:
            real_tokens: int64, shape ().
            attended_pairs: int64, shape ().
            positions: number of tokens, padding included.
            labels: int64, any shape.
            tracked_counts: occurrences of the added tokens (see `ChatCollator`), int64, shape (2, n).
        """
        if self._since is None:
            self._since = time.perf_counter()
        counts = torch.cat(
            [
                torch.stack(
                    [real_tokens, attended_pairs, torch.full_like(real_tokens, positions), (labels >= 0).sum()]
                ),
                tracked_counts.flatten(),
            ]
        )
        self._pending = counts if self._pending is None else self._pending + counts

    def collect(self) -> TokenCounts:
        """Return the counts up to now; synchronizes with the device."""
        if self._pending is not None:
            tokens, pairs, positions, supervised, *tracked = self._pending.tolist()
            self._pending = None
            counts = self.counts
            counts.tokens += tokens
            counts.attended_pairs += pairs
            counts.positions += positions
            counts.supervised += supervised
            half = len(tracked) // 2
            counts.seen = [old + new for old, new in zip(counts.seen, tracked[:half], strict=True)]
            counts.seen_before_target = [
                old + new for old, new in zip(counts.seen_before_target, tracked[half:], strict=True)
            ]
        if self._since is not None:
            now = time.perf_counter()
            self.counts.seconds += now - self._since
            self._since = now
        return self.counts

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the time of a block, such as evaluation or saving, out of the training time."""
        self.collect()
        running, self._since = self._since is not None, None
        yield
        self._since = time.perf_counter() if running else None


class BudgetCallback(TrainerCallback):
    """Stop training when `max_train_tokens` or `max_train_minutes` is used up, resumed parts included.

    The learning-rate schedule covers all steps of the recipe, and a budget may end the run long before the last one.
    The schedule is therefore evaluated at the used share of the budget, so that it always reaches its end.

    Args:
        gather_counts: returns the counts of all processes; every process calls it.
        training: the budgets.
    """

    def __init__(self, gather_counts: Callable[[], TokenCounts], training: "TrainingSection") -> None:
        self._gather_counts = gather_counts
        self._tokens = training.max_train_tokens
        self._seconds = None if training.max_train_minutes is None else 60.0 * training.max_train_minutes
        self._used = 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Count what earlier parts of the run used, and check that the schedule is a function of progress."""
        if not isinstance(unwrapped(kwargs["lr_scheduler"]), LambdaLR):
            raise UserError(
                "a budget of tokens or minutes needs a schedule that is a function of progress",
                where=f"training.lr_scheduler_type: {args.lr_scheduler_type}",
                hint="Use linear, cosine or constant.",
            )
        self._measure(state)
        if self._used >= 1.0:
            control.should_training_stop = True

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Set the learning rate of the coming step."""
        set_rates(unwrapped(kwargs["lr_scheduler"]), self._used * state.max_steps)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Stop after the step that uses up the budget."""
        self._measure(state)
        if self._used >= 1.0:
            control.should_training_stop = True
        return control

    def _measure(self, state: TrainerState) -> None:
        # The counts are over all processes, because they must stop at the same step.
        counts = self._gather_counts()
        shares = [state.global_step / state.max_steps]
        if self._tokens is not None:
            shares.append(counts.tokens / self._tokens)
        if self._seconds is not None:
            shares.append(counts.seconds / self._seconds)
        self._used = min(1.0, max(shares))


def has_budget(training: "TrainingSection") -> bool:
    """Whether a number of tokens or minutes ends the run."""
    return training.max_train_tokens is not None or training.max_train_minutes is not None


def peak_memory_bytes() -> int:
    """Return the peak memory of this process: allocated on its GPU, or resident without a GPU."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    return _peak_resident()


def _peak_resident() -> int:
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    except OSError:
        status = ""
    # The peak of `getrusage` includes the size of the parent process at the fork.
    found = re.search(r"^VmHWM:\s+(\d+) kB", status, re.MULTILINE)
    if found:
        return int(found[1]) * 1024
    if sys.platform == "win32":
        import psutil

        return int(psutil.Process().memory_info().peak_wset)
    import resource

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024
