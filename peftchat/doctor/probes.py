"""Small computations that show whether a library really runs here; each in processes of its own.

`python -m peftchat.doctor.probes NAME` runs one. It prints one line that says what was computed. Probes of two
processes also get the path of a file through which they meet, so that no port is needed.
"""

import contextlib
import os
import sys
import tempfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from peftchat.child_process import end_with_parent

if TYPE_CHECKING:
    import torch
    from torch import nn

_SECONDS_TO_MEET = 60


def attention() -> str:
    """Compare packed attention with attention of each conversation alone, forward and backward."""
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    from peftchat.models.varlen_attention import varlen_attention

    device = _device()
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    torch.manual_seed(0)
    lengths = [5, 64, 17]
    inputs = [torch.randn(1, 4, sum(lengths), 64, device=device, dtype=dtype, requires_grad=True) for _ in range(3)]
    ends = torch.tensor([0, 5, 69, 86], dtype=torch.int32, device=device)
    query, key, value = inputs
    packed, _ = varlen_attention(
        torch.nn.Identity(), query, key, value, None, cu_seq_lens_q=ends, max_length_q=max(lengths)
    )
    parts = zip(*(tensor.split(lengths, dim=2) for tensor in inputs), strict=True)
    each = [scaled_dot_product_attention(q, k, v, is_causal=True) for q, k, v in parts]
    alone = torch.cat(each, dim=2).transpose(1, 2)
    gradients = [torch.autograd.grad(output.float().square().sum(), inputs) for output in (packed, alone)]
    tolerance = 0.05 if device == "cuda" else 1e-4
    torch.testing.assert_close(packed, alone, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(*gradients, atol=tolerance, rtol=tolerance)
    return f"packed conversations attend to themselves alone ({device}, {str(dtype).removeprefix('torch.')})"


def nf4() -> str:
    """Quantize a matrix to NF4, restore it, and multiply by it in the layer that QLoRA uses."""
    import torch
    from bitsandbytes import functional
    from bitsandbytes.nn import Linear4bit, Params4bit

    device = _device()
    torch.manual_seed(0)
    weight = torch.randn(128, 256, dtype=torch.bfloat16, device=device)
    packed, state = functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    restored = functional.dequantize_4bit(packed, state)
    error = ((restored - weight).float().norm() / weight.float().norm()).item()
    # The levels of NF4 are quantiles of a normal distribution; such a matrix loses about 9.6 % of its norm.
    if not 0.05 < error < 0.13:
        raise ArithmeticError(f"restored weights differ by {error:.1%} of their norm, not by 5 to 13 %")
    layer = Linear4bit(256, 128, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4")
    layer.weight = Params4bit(weight.cpu(), requires_grad=False, quant_type="nf4")
    layer = layer.to(device)
    row = torch.randn(3, 256, dtype=torch.bfloat16, device=device, requires_grad=True)
    output = layer(row)
    expected = row.float() @ restored.float().T
    output.float().sum().backward()
    torch.testing.assert_close(output.float(), expected, atol=0.5, rtol=0.05)
    if row.grad is None or not row.grad.isfinite().all():
        raise ArithmeticError("the gradient behind a quantized layer is missing or not finite")
    return f"a matrix survives the round trip within {error:.1%}; the layer multiplies and differentiates ({device})"


def compiler() -> str:
    """Compile a function with torch.compile and compare it."""
    import torch

    def scaled(x: "torch.Tensor") -> "torch.Tensor":
        return torch.nn.functional.silu(x) * x.sum(dim=-1, keepdim=True)

    rows = torch.randn(64, 128, device=_device())
    with tempfile.TemporaryDirectory() as cache:
        # Compiled again: a cache of earlier runs would hide a compiler that is missing now.
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
        torch.testing.assert_close(torch.compile(scaled)(rows), scaled(rows), atol=1e-4, rtol=1e-4)
    return f"torch.compile builds a kernel and its result is right ({_device()})"


def two_processes() -> str:
    """Sum a tensor over two processes."""
    import torch
    import torch.distributed as dist

    backend, device = _join_processes()
    mine = torch.full((1024,), float(dist.get_rank() + 1), device=device)
    dist.all_reduce(mine)
    dist.destroy_process_group()
    if not mine.eq(3).all():
        raise ArithmeticError(f"1 + 2 over two processes is {mine[0].item()}")
    return f"an all-reduce over two processes is right ({backend})"


def zero3() -> str:
    """Take a step of AdamW with ZeRO-3 on two processes; compare the weights with plain torch's."""
    import deepspeed
    import torch
    import torch.distributed as dist

    from peftchat.training.deepspeed_kernels import leave_out_inference_kernels

    backend, device = _join_processes()
    if backend == "gloo":
        leave_out_inference_kernels()
    rank = dist.get_rank()
    batches = [torch.randn(4, 16, generator=torch.Generator().manual_seed(seed)).to(device) for seed in (0, 1)]
    alone = _small_network().to(device)
    optimizer = torch.optim.AdamW(alone.parameters(), lr=1e-2, weight_decay=0.0)
    alone(torch.cat(batches)).square().mean().backward()
    optimizer.step()
    sharded = _small_network()
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    with contextlib.redirect_stdout(sys.stderr):
        engine, *_ = deepspeed.initialize(
            model=sharded, optimizer=torch.optim.AdamW(sharded.parameters(), lr=1e-2, weight_decay=0.0), config=config
        )
        engine.backward(engine(batches[rank]).square().mean())
        engine.step()
        parameters = list(engine.module.parameters())
        with deepspeed.zero.GatheredParameters(parameters):
            for one, other in zip(parameters, alone.parameters(), strict=True):
                torch.testing.assert_close(one.detach().float(), other.detach(), atol=1e-5, rtol=1e-4)
    dist.destroy_process_group()
    return f"a step of ZeRO-3 on two processes equals torch's own ({backend})"


def _small_network() -> "nn.Module":
    import torch

    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.SiLU(), torch.nn.Linear(32, 8))


def _join_processes() -> tuple[str, str]:
    """Join the other process; return the backend and this process's device.

    Two processes cannot share one GPU under NCCL, so that a machine with one GPU uses gloo.
    """
    import torch
    import torch.distributed as dist

    rank = int(os.environ["RANK"])
    on_gpus = torch.cuda.device_count() >= 2
    if on_gpus:
        torch.cuda.set_device(rank)
    else:
        # DeepSpeed would choose the GPU.
        os.environ["DS_ACCELERATOR"] = "cpu"
    backend = "nccl" if on_gpus else "gloo"
    meeting = timedelta(seconds=_SECONDS_TO_MEET)
    dist.init_process_group(backend, init_method=Path(sys.argv[2]).as_uri(), rank=rank, world_size=2, timeout=meeting)
    return backend, f"cuda:{rank}" if on_gpus else "cpu"


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


PROBES: dict[str, Callable[[], str]] = {
    probe.__name__: probe for probe in (attention, nf4, compiler, two_processes, zero3)
}
"""Name -> a probe, which returns what it computed and raises if the result is wrong."""


def main() -> None:
    """Run the probe that the command line names; the first of several processes prints its line."""
    end_with_parent()
    from peftchat.library_setup import prepare_libraries

    prepare_libraries()
    line = PROBES[sys.argv[1]]()
    if os.environ.get("RANK", "0") == "0":
        print(line)


if __name__ == "__main__":
    main()
