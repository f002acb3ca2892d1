"""Where a model runs."""

import importlib.util
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from peftchat.console import stderr
from peftchat.errors import UserError
from peftchat.models.loading import check_model_folder, end_ids, load_base
from peftchat.recipe import Recipe, load_recipe
from peftchat.runs.run_folder import RunFolder
from peftchat.serving.prompt import PromptEncoder

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase


def best_device() -> torch.device:
    """The machine's accelerator, or the CPU."""
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return found or torch.device("cpu")


def merge_rows_of_biased_head(model: "PeftModel") -> bool:
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


ADAPTER_CONFIG = "adapter_config.json"
# What the libraries raise for a name, a file or a config that they cannot use.
_UNREADABLE = (OSError, ValueError, KeyError, TypeError, ImportError, AttributeError)


@dataclass(frozen=True)
class ChatModel:
    """A model ready to answer.

    Attributes:
        name: what the user called it.
        model: in evaluation mode, on its device.
        generation: its own generation settings.
    """

    name: str
    model: "PreTrainedModel | PeftModel"
    tokenizer: "PreTrainedTokenizerBase"
    generation: "GenerationConfig"

    @cached_property
    def prompts(self) -> PromptEncoder:
        """Encodes conversations for this model."""
        return PromptEncoder(self.tokenizer)

    @property
    def device(self) -> "torch.device":
        """Where prompts must be."""
        device: torch.device = self.model.get_input_embeddings().weight.device
        return device

    @property
    def context(self) -> int:
        """Tokens that prompt and answer may have together."""
        text = self.model.config.get_text_config()
        longest = getattr(text, "max_position_embeddings", None)
        # Tokenizers without a limit of their own carry a number beyond any model's.
        return int(longest or min(self.tokenizer.model_max_length, 1 << 20))

    @property
    def stop_ids(self) -> frozenset[int]:
        """Tokens that end an answer: the model's own, and the one that its template writes after each turn."""
        return frozenset(end_ids(self.generation.eos_token_id)) | {self.prompts.end_id}


def load_for_chat(path: str) -> ChatModel:
    """Load a run folder (adapter or full weights), a merged model, or any model with a chat template.

    Args:
        path: a folder, or a hub id.

    Raises:
        UserError: nothing that can be loaded, or nothing that one can talk to.
    """
    folder = Path(path)
    _refuse_unfinished(folder)
    if (folder / ADAPTER_CONFIG).is_file():
        recipe = _recipe_of(folder)
        tokenizer = _tokenizer(path if _has_tokenizer(folder) else _base_name(folder, recipe), path)
        _check_template(tokenizer, path)
        model: Any = _with_adapter(folder, recipe)
    else:
        _check_folder(path)
        tokenizer = _tokenizer(path, path)
        _check_template(tokenizer, path)
        model = _plain(path, _trusts(folder)).to(_device())
    model.eval()
    loaded = ChatModel(path, model, tokenizer, _generation(path, model))
    _check_fit(loaded)
    return loaded


def _refuse_unfinished(folder: Path) -> None:
    finished = any((folder / name).is_file() for name in (ADAPTER_CONFIG, "config.json"))
    if RunFolder(folder).is_run and not finished:
        raise UserError(
            "this run has not finished, so there is no model in its folder yet",
            where=str(folder),
            hint="Finish it with `peftchat train RECIPE --resume`.",
        )


def _check_folder(name: str) -> None:
    """Refuse a folder without a model, in words of the command line, where there is no recipe to point at."""
    try:
        check_model_folder(name)
    except UserError as error:
        raise UserError(error.message, where=name, hint=error.hint) from error


def _recipe_of(folder: Path) -> Recipe | None:
    path = RunFolder(folder).recipe
    return load_recipe(path, to_train=False, upgrade=True).recipe if path.is_file() else None


def _trusts(folder: Path) -> bool:
    recipe = _recipe_of(folder)
    return recipe is not None and recipe.model.trust_remote_code


def _has_tokenizer(folder: Path) -> bool:
    return (folder / "tokenizer_config.json").is_file()


def _base_name(folder: Path, recipe: Recipe | None) -> str:
    from peft import PeftConfig

    if recipe is not None:
        return recipe.model.name
    name = PeftConfig.from_pretrained(str(folder)).base_model_name_or_path
    if not name:
        raise UserError("the adapter does not name its base", where=str(folder / ADAPTER_CONFIG))
    return str(name)


def _with_adapter(folder: Path, recipe: Recipe | None) -> "PeftModel":
    """Base and adapter through stock PEFT, the base grown where the adapter's rows lie beyond its vocabulary."""
    from peft import PeftConfig, PeftModel

    from peftchat.merging.adapter_source import vocabulary_needed
    from peftchat.models.saving import TOKEN_ROWS

    beside = folder / TOKEN_ROWS
    holder = beside if beside.is_dir() else folder
    rows = vocabulary_needed(PeftConfig.from_pretrained(str(holder)), holder)
    base = _plain(_base_name(folder, None), False) if recipe is None else _base_of(recipe)
    if rows > base.get_input_embeddings().weight.shape[0]:
        _grow(base, rows)
    quantized = recipe is not None and recipe.quantization is not None
    try:
        base = base if quantized else base.to(_device())
        if beside.is_dir():
            base = PeftModel.from_pretrained(base, str(beside)).merge_and_unload()
        model = PeftModel.from_pretrained(base, str(folder))
    except (*_UNREADABLE, RuntimeError) as error:
        raise UserError(
            f"the adapter does not load onto its base: {_first_line(error)}",
            where=str(folder),
            hint="Check that `model.name` of its recipe is the base that it was trained on.",
        ) from error
    merge_rows_of_biased_head(model)
    return model


def _grow(base: "PreTrainedModel", rows: int) -> None:
    """Make room for the adapter's rows; the head's bias, if it has one, gets its mean there, as in training."""
    bias = base.get_output_embeddings().bias
    mean = None if bias is None else bias.detach().float().mean()
    known = base.get_input_embeddings().weight.shape[0]
    base.resize_token_embeddings(rows, mean_resizing=False)
    if mean is not None:
        base.get_output_embeddings().bias.data[known:] = mean


def _base_of(recipe: Recipe) -> "PreTrainedModel":
    """The base as it was held in training; unquantized where bitsandbytes is not at hand."""
    if recipe.quantization is not None and importlib.util.find_spec("bitsandbytes") is None:
        stderr.print("bitsandbytes is not installed: the base is loaded without quantization.", style="yellow")
        recipe = recipe.model_copy(update={"quantization": None})
    device_map = None
    if recipe.quantization is not None and _device().type != "cpu":
        device_map = {"": _device()}
    return load_base(recipe, dtype=recipe.model.dtype, device_map=device_map)


def _plain(name: str, trust_remote_code: bool) -> "PreTrainedModel":
    from transformers import AutoModelForCausalLM

    _check_folder(name)
    try:
        return AutoModelForCausalLM.from_pretrained(
            name, dtype="auto", use_safetensors=True, trust_remote_code=trust_remote_code
        )
    except _UNREADABLE as error:
        raise _unreadable("the model", name, error) from error


def _tokenizer(name: str, where: str) -> "PreTrainedTokenizerBase":
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=_trusts(Path(where)))
    except _UNREADABLE as error:
        raise _unreadable("the tokenizer", name, error) from error


def _generation(path: str, model: Any) -> "GenerationConfig":
    """The settings saved with the model; a run's own where the model is an adapter on a base."""
    from transformers import GenerationConfig

    if (Path(path) / "generation_config.json").is_file():
        return GenerationConfig.from_pretrained(path)
    settings: GenerationConfig = model.generation_config
    return settings


def _check_template(tokenizer: "PreTrainedTokenizerBase", path: str) -> None:
    if not tokenizer.chat_template:
        raise UserError(
            "the tokenizer has no chat template, so there is no telling how to put a question to this model",
            where=path,
            hint="A base model completes text; train it first (`peftchat init`), or name a chat model.",
        )
    PromptEncoder(tokenizer).check(path)


def _check_fit(chat: ChatModel) -> None:
    rows = chat.model.get_input_embeddings().weight.shape[0]
    if len(chat.tokenizer) > rows:
        raise UserError(
            f"the tokenizer knows {len(chat.tokenizer)} tokens and the model has rows for {rows}",
            where=chat.name,
            hint="Weights and tokenizer do not belong together; take both from the same run.",
        )


def _device() -> "torch.device":

    return best_device()


def _unreadable(what: str, name: str, error: Exception) -> UserError:
    hint = None if Path(name).exists() else "Check the name, the network and the login, or name a folder."
    return UserError(f"{what} cannot be loaded: {_first_line(error)}", where=name, hint=hint)


def _first_line(error: Exception) -> str:
    return next((line for line in str(error).strip().splitlines() if line.strip()), type(error).__name__)
