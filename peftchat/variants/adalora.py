"""AdaLoRA: a budget of rank that moves between layers during training (Zhang et al., 2023)."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from peftchat.errors import UserError
from peftchat.variants.base import (
    Dropout,
    Formerly,
    NotInConfig,
    Paper,
    TargetedAdapter,
    TrainerHooks,
    incompatible,
)
from peftchat.variants.model_shape import ModelShape

if TYPE_CHECKING:
    from collections.abc import Mapping

    from peft import AdaLoraConfig, PeftConfig, PeftModel
    from torch import Tensor
    from transformers import PreTrainedModel

_NO_GRADIENTS = "it ranks directions by their gradients after each step, and DeepSpeed has released them by then"

_SCORES = ("ipt", "exp_avg_ipt", "exp_avg_unc")
"""The averages that PEFT's rank allocator keeps of each direction from step to step."""


class Adalora(TargetedAdapter):
    """LoRA as a singular value decomposition that drops its least important directions during training."""

    title = "AdaLoRA"
    paper = Paper("Zhang et al.", 2023, "2303.10512")
    learning_rate = 1e-3
    incompatible_with = incompatible(
        zero2=_NO_GRADIENTS,
        zero3=_NO_GRADIENTS,
        budget="it moves its ranks by a schedule over steps, and this budget does not say how many there are",
    )
    supports_trainable_tokens = True
    peft_class = "AdaLoraConfig"
    peft_alpha = "lora_alpha"
    peft_dropout = "lora_dropout"

    variant: Literal["adalora"] = "adalora"
    init_r: int = Field(12, ge=1, description="Initial rank of every layer.")
    target_r: int = Field(8, ge=1, description="Mean rank of a layer at the end.")
    alpha: int = Field(32, ge=1, description="Scale of the update: `alpha` over the current rank.")
    dropout: Dropout = 0.0
    tinit: NotInConfig[float] = Field(
        0.1, ge=0, description="Steps before ranks begin to fall. Below 1 it is a fraction of all steps."
    )
    tfinal: NotInConfig[float] = Field(
        0.3, ge=0, description="Final steps in which ranks stay the same. Below 1 it is a fraction of all steps."
    )
    deltaT: Annotated[int, Formerly("interval")] = Field(  # noqa: N815
        1, ge=1, description="Steps between two changes of ranks."
    )
    orth_reg_weight: Annotated[float, Formerly("orthogonality")] = Field(
        0.5, ge=0, description="Weight of the loss term that keeps the matrices orthogonal."
    )

    def wrong_settings(self) -> Iterator[tuple[str, str]]:
        """Yield a final rank that is no lower than the initial one: PEFT then looks for directions to drop in vain."""
        if self.target_r >= self.init_r:
            yield "target_r", f"must be below `init_r` ({self.init_r}), as ranks only fall, got {self.target_r}"

    def peft_settings(self, shape: ModelShape) -> dict[str, Any]:
        """Return the keyword arguments of AdaLoraConfig; the hooks set the schedule once the steps are known."""
        return {**super().peft_settings(shape), "total_step": 1}

    def trainer_hooks(self, model: "PeftModel | PreTrainedModel") -> TrainerHooks:
        """Return the hooks that move ranks and keep the matrices orthogonal."""
        return AdaloraHooks(model, self)

    def adapter_state(self, model: "PeftModel", tensors: "Mapping[str, Tensor]") -> "dict[str, Tensor]":
        """Return the full matrices, with zeros for dropped directions.

        If PEFT cut them to their ranks, layers that lost every direction would be empty tensors. A resumed run could
        not move importance between directions any more.
        """
        config: AdaLoraConfig = model.peft_config["default"]
        pattern, config.rank_pattern = config.rank_pattern, None
        try:
            return super().adapter_state(model, tensors)
        finally:
            config.rank_pattern = pattern

    def load_adapter_state(self, model: "PeftModel", state: "dict[str, Tensor]") -> list[str]:
        """Put full matrices into the model; with ranks in its config, PEFT would cut its layers to them first."""
        config: AdaLoraConfig = model.peft_config["default"]
        pattern, config.rank_pattern = config.rank_pattern, None
        try:
            return super().load_adapter_state(model, state)
        finally:
            config.rank_pattern = pattern

    def export_config(self, config: "PeftConfig") -> None:
        """Leave out the ranks, since the file holds full matrices."""
        config.rank_pattern = None


class AdaloraHooks(TrainerHooks):
    """The rank schedule and the orthogonality term of AdaLoRA."""

    def __init__(self, model: "PeftModel", settings: Adalora) -> None:
        self._model = model
        self._settings = settings
        # PEFT adds the term to every loss of the model. Here losses are sums over tokens, and the held-out loss must
        # not contain it, so it is switched off there and added once per step.
        self._config.orth_reg_weight = 0.0
        self._matrices = [
            (parameter, "lora_A" in name)
            for name, parameter in model.named_parameters()
            if "lora_A" in name or "lora_B" in name
        ]

    @property
    def _config(self) -> "AdaLoraConfig":
        return self._model.peft_config["default"]

    def penalty(self) -> "Tensor | None":
        """Return the term that keeps the matrices orthogonal (the paper's equation 4), as PEFT computes it."""
        import torch

        if not self._settings.orth_reg_weight:
            return None
        total = torch.zeros((), device=self._matrices[0][0].device)
        for parameter, is_right in self._matrices:
            gram = parameter @ parameter.T if is_right else parameter.T @ parameter
            total = total + torch.linalg.norm(gram - torch.eye(len(gram), device=gram.device))
        return self._settings.orth_reg_weight * total / len(self._matrices)

    def on_train_begin(self, total_steps: int) -> None:
        """Set the schedule.

        Raises:
            UserError: no step is left between its first and its last part.
        """
        config = self._config
        config.total_step = total_steps
        config.tinit = _steps(self._settings.tinit, total_steps)
        config.tfinal = _steps(self._settings.tfinal, total_steps)
        if config.tinit >= total_steps - config.tfinal:
            raise UserError(
                f"ranks could not move in any of the {total_steps} steps: they stay the same in the first "
                f"{config.tinit} and the last {config.tfinal}",
                where="adapter.tinit, adapter.tfinal",
                hint="Lower them, or train for more steps.",
            )

    def on_optimizer_step(self, step: int) -> None:
        """Update the importance of every direction, and drop the least important ones."""
        self._model.base_model.update_and_allocate(step)

    def save_state(self, checkpoint: Path) -> None:
        """Write the importance of every direction."""
        import torch
        from safetensors.torch import save_file

        allocator = self._model.base_model.rankallocator
        scores = {
            f"{kind}/{name}": tensor.contiguous()
            for kind in _SCORES
            for name, tensor in getattr(allocator, kind).items()
        }
        pattern = self._config.rank_pattern or {}
        kept = {f"rank_pattern/{name}": torch.tensor(list(mask)) for name, mask in pattern.items()}
        save_file({**scores, **kept}, _scores_file(checkpoint))

    def load_state(self, checkpoint: Path) -> None:
        """Read the importance of every direction.

        Raises:
            UserError: the checkpoint does not hold it.
        """
        from safetensors.torch import load_file

        file = _scores_file(checkpoint)
        if not file.is_file():
            raise UserError(
                "the checkpoint does not hold the importance of directions by which AdaLoRA moves ranks",
                where=str(file),
                hint="Delete this checkpoint to resume from an earlier one, or start a new run.",
            )
        allocator = self._model.base_model.rankallocator
        pattern: dict[str, list[bool]] = {}
        for key, tensor in load_file(str(file)).items():
            kind, _, name = key.partition("/")
            if kind == "rank_pattern":
                pattern[name] = tensor.tolist()
            else:
                getattr(allocator, kind)[name] = tensor.to(self._model.device)
        self._config.rank_pattern = pattern or None


def _scores_file(checkpoint: Path) -> Path:
    return checkpoint / "rank_scores.safetensors"


def _steps(value: float, total: int) -> int:
    """Return a number of steps given as such, or as a fraction of all steps."""
    return int(value * total) if value < 1 else int(value)
