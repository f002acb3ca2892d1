"""Full parameters under ZeRO-3, which leaves each process a partition of them (Rajbhandari et al., 2020)."""

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

from torch import Tensor, nn


def gathered(parameters: Iterable[nn.Parameter], *, write: bool = False) -> AbstractContextManager[None]:
    """Return a context in which every process has the full parameters; without ZeRO-3, a null context.

    Args:
        parameters: parameters, partitioned or not.
        write: keep what process 0 writes to them inside the context.
    """
    partitioned = [parameter for parameter in dict.fromkeys(parameters) if _is_partitioned(parameter)]
    if not partitioned:
        return nullcontext()
    import deepspeed

    context: AbstractContextManager[None] = deepspeed.zero.GatheredParameters(
        partitioned, modifier_rank=0 if write else None
    )
    return context


def gather_together(module: nn.Module) -> None:
    """Let ZeRO-3 gather a module's parameters, and those of the modules inside it, before its own forward and backward.

    DeepSpeed gathers those of a module alone when it is called. Call this before DeepSpeed wraps the model.
    """
    from deepspeed.utils import set_z3_leaf_module

    set_z3_leaf_module(module, True)


def unsharded_shape(parameter: nn.Parameter) -> tuple[int, ...]:
    """Return the shape of a parameter, before ZeRO-3 shards it; one process alone may ask for it."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def full_tensor(parameter: nn.Parameter) -> Tensor:
    """Return a CPU copy of the full parameter, in float32 if the optimizer has a float32 master copy of it.

    Every process must call it for the same parameters in the same order.
    """
    if _is_managed_by_deepspeed(parameter):
        from deepspeed.utils import safe_get_full_fp32_param

        master: Tensor | None = safe_get_full_fp32_param(parameter)
        if master is not None:
            return master.detach().float().cpu().clone()
    with gathered([parameter]):
        return parameter.detach().cpu().clone()


def is_zero3() -> bool:
    """Return whether models are loaded in partitions."""
    from transformers.integrations import is_deepspeed_zero3_enabled

    return bool(is_deepspeed_zero3_enabled())


@contextmanager
def models_unpartitioned() -> Iterator[None]:
    """Let the models that are made inside the block be whole, such as those without weights, under ZeRO-3 too."""
    from transformers.integrations import deepspeed

    held = deepspeed._hf_deepspeed_config_weak_ref
    config = None if held is None else held()
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if config is not None:
            deepspeed.set_hf_deepspeed_config(config)


def _is_partitioned(parameter: nn.Parameter) -> bool:
    # DeepSpeed keeps its state in attributes of the parameters that it manages.
    status = getattr(parameter, "ds_status", None)
    return status is not None and status.name != "AVAILABLE"


def _is_managed_by_deepspeed(parameter: nn.Parameter) -> bool:
    return hasattr(parameter, "_hp_mapping") or hasattr(parameter, "_z3_optimizer")


def same_storage(one: Tensor, other: Tensor) -> bool:
    """Return whether two weights are the same tensor (tied)."""
    return one is other or (one.numel() > 0 and one.device.type != "meta" and one.data_ptr() == other.data_ptr())
