"""What libraries import at their head, or whenever a function runs, and may never use: who, from where, which names."""

from collections.abc import Mapping
from types import MappingProxyType

from peftchat.late_imports.symbols import SYMBOLIC

COMPILER = "torch._dynamo"
"""torch's compiler: with what it imports, an eighth of the time until training can begin."""

_SHARDED = ("torch.distributed.tensor", "torch.distributed.tensor.placement_types", "torch.distributed.tensor._utils")
_FSDP = ("torch.distributed.fsdp", "torch.distributed._composable.fsdp")

NAMES: Mapping[str, frozenset[str]] = MappingProxyType(
    {
        # Tensors sharded over processes, for which torch imports SymPy.
        _SHARDED[0]: frozenset({"DTensor", "Partial", "Replicate", "Shard", "distribute_tensor"}),
        _SHARDED[1]: frozenset({"Shard", "_StridedShard"}),
        _SHARDED[2]: frozenset({"compute_local_shape_and_global_offset"}),
        _FSDP[0]: frozenset({"CPUOffloadPolicy", "FullyShardedDataParallel", "MixedPrecisionPolicy"}),
        _FSDP[1]: frozenset({"fully_shard"}),
        "torch.distributed.fsdp.fully_sharded_data_parallel": frozenset({"FullyShardedDataParallel"}),
        "torch.distributed.checkpoint.hf_storage": frozenset({"HuggingFaceStorageReader", "HuggingFaceStorageWriter"}),
        "torch._dynamo._trace_wrapped_higher_order_op": frozenset({"TransformGetItemToIndex"}),
        "deepspeed": frozenset({"DeepSpeedEngine"}),
        # Symbolic sizes and their expressions.
        "sympy": frozenset({"Basic"}),
        SYMBOLIC: frozenset(),
    }
)
"""Classes and functions that are stood in for. All are used inside functions alone, or to ask what something is."""

IMPORTERS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "transformers.distributed.utils": _SHARDED[:1],
        "transformers.distributed.sharding_utils": _SHARDED,
        "transformers.distributed.parallel_utils": _SHARDED[:1],
        "transformers.distributed.tensor_parallel": _SHARDED[:2],
        "transformers.distributed.expert_parallel": _SHARDED[:1],
        "transformers.distributed.checkpoint": ("torch.distributed.checkpoint.hf_storage", *_SHARDED[:2]),
        "transformers.distributed.fsdp": _FSDP,
        "transformers.masking_utils": ("torch._dynamo._trace_wrapped_higher_order_op",),
        "transformers.trainer": _SHARDED[:1],
        "transformers.trainer_optimizer": _SHARDED[:1],
        "trl.models.activation_offloading": _SHARDED[:1],
        "trl.trainer.utils": _SHARDED[:1],
        "accelerate.accelerator": _SHARDED[:1],
        "torch._prims_common": ("sympy", SYMBOLIC),
        "torch._refs": (SYMBOLIC,),
        "accelerate.utils.other": (*_SHARDED[:1], "deepspeed", "torch.distributed.fsdp.fully_sharded_data_parallel"),
    }
)
"""Module -> the modules whose names it gets as stand-ins."""

DECORATORS = frozenset(
    {
        "bitsandbytes",
        "transformers.generation.continuous_batching.cache",
        "transformers.integrations.deepgemm",
        "transformers.integrations.eager_paged",
        "transformers.integrations.finegrained_fp8",
        "transformers.integrations.flex_attention",
        "transformers.integrations.sonicmoe",
        "transformers.modeling_utils",
    }
)
"""Modules with decorators of torch's compiler, which import it where the function is defined."""

TORCH_OF_COMPILER = frozenset({"torch._compile", "torch.optim.optimizer"})
"""Modules of torch whose functions import the compiler to tell it something, which only matters to compiled code."""

LARGE = frozenset(
    {"torch", "transformers", "transformers.models", "transformers.modeling_utils", "peft", "trl", "accelerate"}
)
"""Libraries, and modules that import much of one, during whose import nothing is garbage."""
