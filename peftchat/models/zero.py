"""Whole parameters where ZeRO-3 has left each process a slice (Rajbhandari et al., 2020)."""

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext

from torch import Tensor, nn


def gathered(parameters: Iterable[nn.Parameter], *, write: bool = False) -> AbstractContextManager[None]:
    """A context in which the parameters are whole on every process; without ZeRO-3, a null context.

    Args:
        parameters: parameters, sliced or not.
        write: keep what process 0 writes to them inside the context.
    """
    sliced = [parameter for parameter in dict.fromkeys(parameters) if _is_sliced(parameter)]
    if not sliced:
        return nullcontext()
    import deepspeed

    context: AbstractContextManager[None] = deepspeed.zero.GatheredParameters(
        sliced, modifier_rank=0 if write else None
    )
    return context


def full_tensor(parameter: nn.Parameter) -> Tensor:
    """A copy of the whole parameter on the CPU, in float32 where an optimizer keeps a float32 master of it.

    Every process must call it for the same parameters in the same order.
    """
    if _is_partitioned_by_deepspeed(parameter):
        from deepspeed.utils import safe_get_full_fp32_param

        master: Tensor | None = safe_get_full_fp32_param(parameter)
        if master is not None:
            return master.detach().float().cpu().clone()
    with gathered([parameter]):
        return parameter.detach().cpu().clone()


def is_zero3() -> bool:
    """Whether models are being loaded in slices."""
    from transformers.integrations import is_deepspeed_zero3_enabled

    return bool(is_deepspeed_zero3_enabled())


def _is_sliced(parameter: nn.Parameter) -> bool:
    # DeepSpeed writes its bookkeeping onto the parameters that it has taken over.
    status = getattr(parameter, "ds_status", None)
    return status is not None and status.name != "AVAILABLE"


def _is_partitioned_by_deepspeed(parameter: nn.Parameter) -> bool:
    return hasattr(parameter, "_hp_mapping") or hasattr(parameter, "_z3_optimizer")


def same_storage(one: Tensor, other: Tensor) -> bool:
    """Whether two weights are one (tied)."""
    return one is other or (one.numel() > 0 and one.device.type != "meta" and one.data_ptr() == other.data_ptr())
