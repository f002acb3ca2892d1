"""Training a variant in this process, and loading what it left by stock libraries alone."""

from pathlib import Path
from typing import Any

import torch
from training_helpers import read_json, stock_loss, write_recipe
from transformers import AutoModelForCausalLM, AutoTokenizer

from peftchat.recipe import load_recipe
from peftchat.training.context import TrainOptions
from peftchat.training.train import train
from peftchat.variants import VARIANTS

# A tiny model takes larger steps than a real one, and a few variants, whose updates grow with the width, smaller ones.
RATES = {"fourierft": 0.04, "waveft": 0.04, "tinylora": 1.0, "c3a": 0.2, "delora": 1.0}


def method_of(name: str) -> str:
    """The method that goes with a variant: LoftQ has nothing to do on a base that is not quantized."""
    return "full" if name == "full" else "qlora" if "unquantized" in VARIANTS[name].incompatible_with else "lora"


def train_variant(
    name: str, base: Path, conversations: Path, held_out: Path, run: Path, *, resume: bool = False, **sections: Any
) -> dict[str, Any]:
    """Train for four steps; returns what went into `run.json`."""
    sections = {"method": method_of(name), **sections}
    if name != "full":
        few = {"calibration_samples": 8} if "calibration_samples" in VARIANTS[name].setting_names() else {}
        sections["adapter"] = {"variant": name, **few, **sections.get("adapter", {})}
    rate = VARIANTS[name].learning_rate * RATES.get(name, 5.0)
    sections["training"] = {"learning_rate": rate, "max_steps": 4, **sections.get("training", {})}
    recipe = write_recipe(run.parent / f"{run.name}.yaml", base, conversations, held_out, run, **sections)
    loaded = load_recipe(recipe)
    return train(loaded, TrainOptions(resume=resume)).model_dump()


def stock_variant(run: Path, base: Path, quantization: Any = None) -> Any:
    """A run's adapter on its base by transformers and peft, as its model card tells."""
    from peft import PeftModel

    rows = run / "token_rows"
    config = read_json((rows if rows.is_dir() else run) / "adapter_config.json")
    ids = config.get("token_indices") or max(config["trainable_token_indices"].values(), key=max)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, quantization_config=quantization)
    if max(ids) >= model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(max(ids) + 1, mean_resizing=False)
    if rows.is_dir():
        model = PeftModel.from_pretrained(model, str(rows)).merge_and_unload()
    model = PeftModel.from_pretrained(model, str(run)).eval()
    for module in model.modules():
        # In evaluation mode bitsandbytes rounds its scales on the CPU; training mode of those layers keeps them.
        if type(module).__name__ == "Linear4bit":
            module.training = True
    return model


def held_out_loss(model: Any, run: Path, held_out: Path) -> float:
    """The loss by stock means; logits of trained vectors before the prompt are left out."""

    def behind_prompt(input_ids: torch.Tensor) -> Any:
        outputs = model(input_ids=input_ids)
        outputs.logits = outputs.logits[:, -input_ids.shape[1] :]
        return outputs

    return stock_loss(behind_prompt, AutoTokenizer.from_pretrained(str(run)), held_out)
