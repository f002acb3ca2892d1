"""How much arithmetic training takes, and how much the machine can do."""

import re
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


def count_parameters(model: nn.Module) -> int:
    """Weights of a model, packed 4-bit ones and ZeRO-3's slices counted at their true size."""
    return sum(unsharded_numel(parameter) for parameter in model.parameters())


def unsharded_numel(parameter: nn.Parameter) -> int:
    """Elements of one parameter before packing and slicing."""
    state: Any = getattr(parameter, "quant_state", None)
    if state is not None:
        return int(torch.Size(state.shape).numel())
    # ZeRO-3 leaves a slice in place and notes the whole size beside it.
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def training_flops(
    *, body: int, head: int, trained_body: int, trains_head: bool, tokens: int, supervised: int
) -> float:
    """Floating-point operations of forward and backward over some tokens.

    Two a weight and token forward, two for the gradient of the activations, two for the gradient of weights that are
    trained; the head only where there is a target (Kaplan et al., 2020, without the attention scores).

    Args:
        body: weights behind matrix products, without embedding and head.
        head: weights of the head.
        trained_body: those of the body, adapters included, that are trained.
        trains_head: whether the head is trained.
        tokens: tokens of all batches.
        supervised: those with a target.
    """
    body_flops = (4 * body + 2 * trained_body) * tokens
    head_flops = (6 if trains_head else 4) * head * supervised
    return float(body_flops + head_flops)


def measure_matmul_flops(device: torch.device, dtype: torch.dtype, seconds: float = 0.4) -> float:
    """The rate at which this process's device multiplies matrices, measured: floating-point operations a second.

    It is the best of two sizes: there are products that a CPU's library leaves to one core.
    """
    sizes = (8192,) if device.type == "cuda" else (1024, 2048)
    return max(_rate(size, device, dtype, seconds / len(sizes)) for size in sizes)


def _rate(size: int, device: torch.device, dtype: torch.dtype, seconds: float) -> float:
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
    """Counts over the whole run, this process only.

    Attributes:
        tokens: real tokens trained on, padding not counted.
        positions: the same with padding.
        supervised: tokens that carried a target.
        seconds: time spent on training steps.
        seen: occurrences of each new token.
        seen_before_target: those behind which its conversation still has a target, so that the input row gets a
            gradient.
    """

    tokens: int = 0
    positions: int = 0
    supervised: int = 0
    seconds: float = 0.0
    seen: list[int] = field(default_factory=list)
    seen_before_target: list[int] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """The counts as JSON knows them."""
        return asdict(self)

    @classmethod
    def together(cls, everyone: "Sequence[TokenCounts]") -> "TokenCounts":
        """The counts of several processes; they share the seconds."""
        return cls(
            tokens=sum(one.tokens for one in everyone),
            positions=sum(one.positions for one in everyone),
            supervised=sum(one.supervised for one in everyone),
            seconds=max(one.seconds for one in everyone),
            seen=[sum(counts) for counts in zip(*(one.seen for one in everyone), strict=True)],
            seen_before_target=[
                sum(counts) for counts in zip(*(one.seen_before_target for one in everyone), strict=True)
            ],
        )


class Throughput:
    """Collects counts on the device, without making a step wait, and clocks training apart from everything else.

    Args:
        new_tokens: how many new tokens batches count.
        start: counts of the run so far, when it resumes.
    """

    def __init__(self, new_tokens: int, start: TokenCounts | None = None) -> None:
        self.totals = start or TokenCounts(seen=[0] * new_tokens, seen_before_target=[0] * new_tokens)
        self._pending: Tensor | None = None
        self._since: float | None = None

    def add(self, real_tokens: Tensor, positions: int, labels: Tensor, watched: Tensor) -> None:
        """Count one batch.

        Args:
            real_tokens: int64, shape ().
            positions: tokens with padding.
            labels: int64, any shape.
            watched: occurrences of the new tokens, int64, shape (2, n).
        """
        if self._since is None:
            self._since = time.perf_counter()
        counts = torch.cat(
            [
                torch.stack([real_tokens, torch.full_like(real_tokens, positions), (labels >= 0).sum()]),
                watched.flatten(),
            ]
        )
        self._pending = counts if self._pending is None else self._pending + counts

    def collect(self) -> TokenCounts:
        """The counts up to now; waits for the device."""
        if self._pending is not None:
            tokens, positions, supervised, *watched = self._pending.tolist()
            self._pending = None
            totals = self.totals
            totals.tokens += tokens
            totals.positions += positions
            totals.supervised += supervised
            half = len(watched) // 2
            totals.seen = [old + new for old, new in zip(totals.seen, watched[:half], strict=True)]
            totals.seen_before_target = [
                old + new for old, new in zip(totals.seen_before_target, watched[half:], strict=True)
            ]
        if self._since is not None:
            now = time.perf_counter()
            self.totals.seconds += now - self._since
            self._since = now
        return self.totals

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave what happens inside (evaluation, saving) out of the training time."""
        self.collect()
        running, self._since = self._since is not None, None
        yield
        self._since = time.perf_counter() if running else None


def peak_memory_bytes() -> int:
    """The most memory this process has held: on the GPU where there is one, else resident."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    return _most_resident()


def _most_resident() -> int:
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    except OSError:
        status = ""
    # What `getrusage` tells begins with the size of the process that started this one.
    found = re.search(r"^VmHWM:\s+(\d+) kB", status, re.MULTILINE)
    if found:
        return int(found[1]) * 1024
    import resource

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024
