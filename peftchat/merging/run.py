"""What there is to merge: a run folder, or a bare PEFT adapter, and the base it names."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from peftchat.errors import UserError
from peftchat.merging.adapter import CONFIG_NAME, check_weights, read_config
from peftchat.merging.quantized import Quantization
from peftchat.recipe.load import LoadedRecipe, load_recipe

_TORCH_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True)
class Run:
    """A trained adapter.

    Attributes:
        folder: the run folder.
        config: the adapter's PEFT config.
        base: hub id or folder of the base.
        revision: of a hub id.
        quantization: how the base was held while training; None if it was not quantised.
        recipe: the run's recipe; None for a bare adapter.
    """

    folder: Path
    config: Any
    base: str
    revision: str | None
    trust_remote_code: bool
    quantization: Quantization | None
    recipe: LoadedRecipe | None


def open_run(folder: Path) -> Run:
    """Read a run folder and check its adapter's file.

    Raises:
        InputError: not a run folder, a run of method `full`, or an adapter that is damaged or cannot be folded.
    """
    if not folder.is_dir():
        raise UserError("no such folder", where=str(folder))
    recipe = load_recipe(folder / "recipe.yaml", to_train=False) if (folder / "recipe.yaml").is_file() else None
    if recipe is not None and recipe.recipe.method == "full":
        raise UserError(
            "this run trained every weight, so there is nothing to merge",
            where=str(folder),
            cure="The run folder is already a model: `peftchat chat RUN` and every other tool load it as it is.",
        )
    if not (folder / CONFIG_NAME).is_file() and (folder / "config.json").is_file():
        raise UserError(
            "this is a model, not an adapter: there is nothing to merge",
            where=str(folder),
            cure="Use it as it is, or name the run folder that holds the adapter.",
        )
    config = read_config(folder)
    check_weights(folder)
    if recipe is None:
        return Run(folder, config, _base_of(config, folder), config.revision, False, None, None)
    model, section = recipe.recipe.model, recipe.recipe.quantization
    quantization = None
    if recipe.recipe.method == "qlora" and section is not None:
        quantization = Quantization(section.bits, section.type, section.double, _TORCH_DTYPES[model.dtype])
    return Run(folder, config, model.name, model.revision, model.trust_remote_code, quantization, recipe)


def _base_of(config: Any, folder: Path) -> str:
    if not config.base_model_name_or_path:
        raise UserError(
            "the adapter does not say which base it belongs to",
            where=str(folder / CONFIG_NAME),
            cure="Set base_model_name_or_path there.",
        )
    return str(config.base_model_name_or_path)


def find_base(name: str, revision: str | None) -> Path:
    """The folder of a base model: `name` itself, or the hub's snapshot, fetched if it is not here.

    Raises:
        InputError: neither a folder nor a hub model that can be had.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    if Path(name).is_dir():
        return Path(name)
    cure = "Check the name, and that the base is where it was when the run was trained."
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=["*.safetensors", "*.json", "*.py"]))
    except HFValidationError as error:
        raise UserError("the base model is not there", where=name, cure=cure) from error
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"the base model cannot be fetched: {reason}", where=name, cure=cure) from error


def base_config(folder: Path, trust_remote_code: bool) -> Any:
    """The base's transformers config.

    Raises:
        InputError: none there, unreadable, or of a base that is stored quantised.
    """
    from transformers import AutoConfig

    where = folder / "config.json"
    try:
        if "quantization_config" in json.loads(where.read_text(encoding="utf-8")):
            raise UserError(
                "the base is stored quantised, and folding an adapter needs its full weights",
                where=str(where),
                cure="Set `model.name` of the recipe to the 16-bit model it was made from.",
            )
        return AutoConfig.from_pretrained(str(folder), trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"no usable model config: {str(error).splitlines()[0]}", where=str(where)) from error
