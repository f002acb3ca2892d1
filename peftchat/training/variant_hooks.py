"""A variant's part in the training loop: its hooks, called by the trainer's events, and its learning rates."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback, TrainerControl, TrainerState

from peftchat.runs.checkpoint import Checkpoint
from peftchat.variants.base import Adapter, TrainerHooks

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedModel, TrainingArguments


def trainer_hooks(adapter: Adapter | None, model: "PreTrainedModel | PeftModel") -> TrainerHooks:
    """Return the hooks of a recipe's adapter; those that do nothing for full fine-tuning."""
    return TrainerHooks() if adapter is None else adapter.trainer_hooks(model)


class VariantCallback(TrainerCallback):
    """Passes the trainer's events on to the hooks of a variant."""

    def __init__(self, hooks: TrainerHooks) -> None:
        self._hooks = hooks

    def on_train_begin(self, args: "TrainingArguments", state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Report the number of steps, and the checkpoint of a resumed run."""
        self._hooks.on_train_begin(state.max_steps)
        if state.global_step:
            self._hooks.load_state(_checkpoint(args, state))

    def on_save(self, args: "TrainingArguments", state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Let the hooks of the main process add to the checkpoint."""
        if args.should_save:
            self._hooks.save_state(_checkpoint(args, state))

    def on_optimizer_step(
        self, args: "TrainingArguments", state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Report a step, before its gradients are released."""
        self._hooks.on_optimizer_step(state.global_step + 1)


def _checkpoint(args: "TrainingArguments", state: TrainerState) -> Path:
    return Checkpoint.at_step(Path(str(args.output_dir)), state.global_step).path


def set_param_group_lrs(optimizer: "torch.optim.Optimizer", names: dict[int, str], hooks: TrainerHooks) -> None:
    """Give parameters their own learning rates, before the schedule is made.

    Args:
        optimizer: its groups are split in place.
        names: id of each parameter -> its name.
        hooks: their `lr_multiplier` is a multiple of the rate of a parameter's group.
    """
    for group in list(optimizer.param_groups):
        by_multiplier: dict[float, list[torch.nn.Parameter]] = {1.0: []}
        for parameter in group["params"]:
            by_multiplier.setdefault(hooks.lr_multiplier(names[id(parameter)]), []).append(parameter)
        group["params"] = by_multiplier.pop(1.0)
        for multiplier, parameters in by_multiplier.items():
            optimizer.add_param_group({**group, "params": parameters, "lr": group["lr"] * multiplier})
