"""A way around one defect of stock PEFT, kept in one place."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from peft import PeftModel


def fold_rows_of_biased_head(model: "PeftModel") -> bool:
    """Merge trained token rows into the weights, in memory, where the model's head has a bias.

    PEFT's unmerged forward of trained token rows leaves the head's bias out
    (https://github.com/huggingface/peft/issues/3649); its merged forward does not. The rest of the adapter stays
    beside the weights.

    Returns:
        Whether there was anything to merge.
    """
    from peft.utils.other import TrainableTokensWrapper

    base = model.get_base_model()
    head = base.get_output_embeddings()
    if not isinstance(head, TrainableTokensWrapper) or head.original_module.bias is None:
        return False
    wrapped = [(name, module) for name, module in base.named_modules() if isinstance(module, TrainableTokensWrapper)]
    for name, module in wrapped:
        layer = module.unload_and_optionally_merge_module(merge=True, safe_merge=False, adapter_names=None)
        base.set_submodule(name, layer)
    return True
