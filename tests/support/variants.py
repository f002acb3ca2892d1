"""Training a variant in this process, and loading what it left by stock libraries alone."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from peftchat.models.loading import quantization_config
from peftchat.recipe import load_recipe
from peftchat.training.context import TrainOptions
from peftchat.training.train import train
from peftchat.variants import VARIANTS
from tests.support.data import read_json
from tests.support.recipes import write_training_recipe
from tests.support.stock import exact_4bit, stock_loss

LEARNING_RATES = {"fourierft": 0.04, "waveft": 0.04, "tinylora": 1.0, "c3a": 0.2, "delora": 1.0}
"""Factors of a variant's customary learning rate: a tiny model takes five times larger steps than a real one, and a few
variants, whose updates grow with the width, smaller ones."""

# EVA goes through the conversations until its components stand still, which takes long for many.
SETTINGS: dict[str, dict[str, Any]] = {"eva": {"r": 2}}
"""Settings of the adapter that are there to save time."""


def method_of(name: str) -> str:
    """Return the method that goes with a variant: LoftQ has nothing to do on a base that is not quantized."""
    return "full" if name == "full" else "qlora" if "unquantized" in VARIANTS[name].incompatible_with else "lora"


@dataclass(frozen=True)
class TrainedVariant:
    """A finished run of a variant, and what is in its `run.json`."""

    name: str
    run: Path
    summary: dict[str, Any]


@dataclass(frozen=True)
class VariantTrainer:
    """Trains variants on one base and one pair of files.

    Attributes:
        folder: where runs go that are shared among tests.
    """

    base: Path
    conversations: Path
    held_out: Path
    folder: Path
    _shared: dict[str, TrainedVariant] = field(default_factory=dict)

    def __call__(self, name: str, /, **sections: Any) -> TrainedVariant:
        """Return a run of a variant with these settings, trained once per process; to be read alone."""
        key = json.dumps([name, sections], sort_keys=True)
        if key not in self._shared:
            self._shared[key] = self.train(name, self.folder / str(len(self._shared)), **sections)
        return self._shared[key]

    def train(self, name: str, run: Path, /, *, resume: bool = False, **sections: Any) -> TrainedVariant:
        """Train a variant for four steps, if `sections` do not say otherwise, into a folder of the caller's own."""
        recipe = {"method": method_of(name), **sections}
        if name != "full":
            few = {"calibration_samples": 8} if "calibration_samples" in VARIANTS[name].setting_names() else {}
            recipe["adapter"] = {"variant": name, **few, **SETTINGS.get(name, {}), **sections.get("adapter", {})}
        rate = VARIANTS[name].learning_rate * LEARNING_RATES.get(name, 5.0)
        recipe["training"] = {"learning_rate": rate, **sections.get("training", {})}
        run.parent.mkdir(parents=True, exist_ok=True)
        path = run.with_name(f"{run.name}.yaml")
        loaded = load_recipe(write_training_recipe(path, self.base, self.conversations, self.held_out, run, **recipe))
        return TrainedVariant(name, run, train(loaded, TrainOptions(resume=resume)).model_dump())

    def stock_model(self, run: Path) -> Any:
        """Load a run by transformers and peft, as its model card says."""
        if not (run / "adapter_config.json").is_file():
            return AutoModelForCausalLM.from_pretrained(run, dtype=torch.float32).eval()
        recipe = load_recipe(run / "recipe.yaml", to_train=False).recipe
        quantization = quantization_config(recipe) if recipe.method == "qlora" else None
        return stock_adapter(run, self.base, quantization)

    def held_out_loss(self, model: Any, run: Path) -> float:
        """Return the loss by stock means; logits of trained vectors before the prompt are left out."""
        return stock_loss(_behind_prompt(model), AutoTokenizer.from_pretrained(run), self.held_out)


def stock_adapter(run: Path, base: Path, quantization: Any = None) -> Any:
    """Load an adapter and its added tokens onto their base by transformers and peft alone."""
    rows = run / "token_rows"
    config = read_json((rows if rows.is_dir() else run) / "adapter_config.json")
    ids = config.get("token_indices") or max(config["trainable_token_indices"].values(), key=max)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, quantization_config=quantization)
    if max(ids) >= model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(max(ids) + 1, mean_resizing=False)
    if rows.is_dir():
        model = PeftModel.from_pretrained(model, str(rows)).merge_and_unload()
    return exact_4bit(PeftModel.from_pretrained(model, str(run)).eval())


def _behind_prompt(model: Any) -> Callable[..., Any]:
    def forward(input_ids: torch.Tensor) -> Any:
        outputs = model(input_ids=input_ids)
        outputs.logits = outputs.logits[:, -input_ids.shape[1] :]
        return outputs

    return forward
