"""Trainer hooks: a variant's own learning rates, loss term and callbacks in the training loop."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import AdaLoraConfig, PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState

from peftchat.errors import UserError
from peftchat.runs.run_folder import Checkpoint

if TYPE_CHECKING:
    from transformers import PreTrainedModel, TrainingArguments

    from peftchat.recipe import Recipe


_SCORES = ("ipt", "exp_avg_ipt", "exp_avg_unc")
"""What PEFT's allocator remembers of each direction from step to step."""


@dataclass(frozen=True, slots=True)
class TrainerHooks:
    """A variant's part in the training loop.

    Attributes:
        rate_of: a parameter's name -> its learning rate as a multiple of the recipe's; None where all have the same.
        penalty: a term that is added to the loss of each optimizer step, shape (); None where there is none.
        callbacks: to be called by the trainer.
    """

    rate_of: Callable[[str], float] | None = None
    penalty: Callable[[], Tensor] | None = None
    callbacks: tuple[TrainerCallback, ...] = ()


def trainer_hooks(recipe: "Recipe", model: "PreTrainedModel | PeftModel") -> TrainerHooks:
    """The part that the recipe's variant plays."""
    section: Any = recipe.adapter
    if section is None:
        return TrainerHooks()
    if section.variant == "loraplus":
        ratio = float(section.rate_ratio)
        return TrainerHooks(rate_of=lambda name: ratio if ".lora_B." in name else 1.0)
    if section.variant == "adalora":
        assert isinstance(model, PeftModel)
        penalty = _Orthogonality(model)
        return TrainerHooks(penalty=penalty if section.orthogonality else None, callbacks=(_Ranks(model, section),))
    return TrainerHooks()


def set_param_group_lrs(
    optimizer: torch.optim.Optimizer, names: dict[int, str], rate_of: Callable[[str], float]
) -> None:
    """Give parameters their own learning rates, before the schedule is made.

    Args:
        optimizer: its groups are split in place.
        names: id of each parameter -> its name.
        rate_of: a name -> the multiple of its group's rate.
    """
    for group in list(optimizer.param_groups):
        faster: dict[float, list[Any]] = {}
        for parameter in group["params"]:
            faster.setdefault(rate_of(names[id(parameter)]), []).append(parameter)
        group["params"] = faster.pop(1.0, [])
        for ratio, parameters in faster.items():
            optimizer.add_param_group({**group, "params": parameters, "lr": group["lr"] * ratio})


class _Orthogonality:
    """AdaLoRA's term that keeps its matrices orthogonal (Zhang et al., 2023, equation 4), as PEFT computes it.

    PEFT adds it to every loss that passes through the model. Here losses are sums over tokens, and evaluation is not
    to hold it, so it is switched off there and added once a step.
    """

    def __init__(self, model: PeftModel) -> None:
        config = model.peft_config["default"]
        assert isinstance(config, AdaLoraConfig)
        self._weight = float(config.orth_reg_weight)
        config.orth_reg_weight = 0.0
        self._sides = [
            (parameter, "lora_A" in name)
            for name, parameter in model.named_parameters()
            if "lora_A" in name or "lora_B" in name
        ]

    def __call__(self) -> Tensor:
        total = torch.zeros((), device=self._sides[0][0].device)
        for parameter, is_right in self._sides:
            square = parameter @ parameter.T if is_right else parameter.T @ parameter
            total = total + torch.linalg.norm(square - torch.eye(len(square), device=square.device))
        return self._weight * total / len(self._sides)


class _Ranks(TrainerCallback):
    """Moves AdaLoRA's ranks between layers after each step."""

    def __init__(self, model: PeftModel, section: Any) -> None:
        self._model = model
        self._section = section

    def on_train_begin(self, args: "TrainingArguments", state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Lay out the schedule, now that the number of steps is known."""
        config = self._model.peft_config["default"]
        assert isinstance(config, AdaLoraConfig)
        total = state.max_steps
        config.total_step = total
        config.tinit = _steps(self._section.tinit, total)
        config.tfinal = _steps(self._section.tfinal, total)
        if config.tinit >= total - config.tfinal:
            raise UserError(
                f"of {total} steps none is left in which ranks could move",
                where="adapter.tinit, adapter.tfinal",
                hint="Lower them, or train for more steps.",
            )
        if state.global_step:
            self._go_on_from(_scores_file(args, state))

    def on_save(self, args: "TrainingArguments", state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Keep the importance of every direction with the checkpoint."""
        if not args.should_save:
            return
        allocator = self._model.base_model.rankallocator
        scores = {
            f"{kind}/{name}": tensor.contiguous()
            for kind in _SCORES
            for name, tensor in getattr(allocator, kind).items()
        }
        pattern = self._model.peft_config["default"].rank_pattern or {}
        kept = {name: torch.tensor(list(chosen)) for name, chosen in pattern.items()}
        save_file(
            {**scores, **{f"rank_pattern/{name}": tensor for name, tensor in kept.items()}}, _scores_file(args, state)
        )

    def _go_on_from(self, file: Path) -> None:
        if not file.is_file():
            raise UserError(
                "the checkpoint does not hold the importance of directions by which AdaLoRA moves ranks",
                where=str(file),
                hint="Delete this checkpoint to go on from an earlier one, or start a new run.",
            )
        allocator, config = self._model.base_model.rankallocator, self._model.peft_config["default"]
        pattern: dict[str, list[bool]] = {}
        for key, tensor in load_file(str(file)).items():
            kind, _, name = key.partition("/")
            if kind == "rank_pattern":
                pattern[name] = tensor.tolist()
            else:
                getattr(allocator, kind)[name] = tensor.to(self._model.device)
        config.rank_pattern = pattern or None

    def on_optimizer_step(
        self, args: "TrainingArguments", state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Update the importance of every direction, and drop the least important ones."""
        self._model.base_model.update_and_allocate(state.global_step + 1)


def _scores_file(args: "TrainingArguments", state: TrainerState) -> Path:
    return Checkpoint.at_step(Path(str(args.output_dir)), state.global_step).path / "rank_scores.safetensors"


def _steps(value: float, total: int) -> int:
    """A number of steps, or a share of them."""
    return int(value * total) if value < 1 else int(value)
