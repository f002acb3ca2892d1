"""Chat model: weights on a device, tokenizer and generation settings."""

import importlib.util
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

from peftchat.console import stderr
from peftchat.errors import UserError, first_line
from peftchat.models.base_content import check_run
from peftchat.models.decoding import decode_plainly
from peftchat.models.loading import compute_in_float32_if_faster, end_ids, has_bfloat16_kernels, load_base
from peftchat.models.source import LOAD_ERRORS, MISFIT_ERRORS, ModelKind, ModelSource
from peftchat.recipe import Recipe
from peftchat.serving.prompt import PromptEncoder

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class ChatModel:
    """A model ready to answer.

    Attributes:
        name: the folder or hub id that the user gave.
        model: in evaluation mode, on its device.
        generation_config: the model's own generation settings.
        checked: the encoder that checked the template; None where nothing did.
    """

    name: str
    model: "PreTrainedModel | PeftModel"
    tokenizer: "PreTrainedTokenizerBase"
    generation_config: "GenerationConfig"
    checked: PromptEncoder | None = None

    @cached_property
    def prompts(self) -> PromptEncoder:
        """The encoder of conversations for this model."""
        return self.checked or PromptEncoder(self.tokenizer)

    @property
    def device(self) -> torch.device:
        """The device of the model's inputs."""
        device: torch.device = self.model.get_input_embeddings().weight.device
        return device

    @property
    def context_length(self) -> int:
        """Most tokens of prompt and answer together."""
        return context_length_of(self.model.config, self.tokenizer)

    @property
    def stop_ids(self) -> frozenset[int]:
        """Tokens that end an answer.

        They are the model's own, and the one that its template writes after each turn.
        """
        return frozenset(end_ids(self.generation_config.eos_token_id)) | {self.prompts.end_id}


def context_length_of(config: "PretrainedConfig", tokenizer: "PreTrainedTokenizerBase") -> int:
    """Return the most tokens of prompt and answer together."""
    longest = getattr(config.get_text_config(), "max_position_embeddings", None)
    # A tokenizer without a limit has a number larger than any model's.
    return int(longest or min(tokenizer.model_max_length, 1 << 20))


def open_for_chat(
    name: str, *, base: str | None = None, needs_template: bool = True
) -> "tuple[ModelSource, PreTrainedTokenizerBase]":
    """Check what can be checked of a model without its weights, and return its tokenizer.

    Args:
        name: a folder or a hub id.
        base: folder or hub id of an adapter's base; None for the one that it was trained on.
        needs_template: whether the model must have a chat template.

    Raises:
        UserError: there is no such model, or it has no usable chat template.
    """
    source, tokenizer, _ = _open(name, base, needs_template=needs_template)
    return source, tokenizer


def _open(
    name: str, base: str | None, *, needs_template: bool
) -> "tuple[ModelSource, PreTrainedTokenizerBase, PromptEncoder | None]":
    """Return what `open_for_chat` does, and the encoder that checked the template."""
    source = ModelSource.open(name, base=base)
    source.require_model()
    if base is not None and source.kind is not ModelKind.ADAPTER:
        raise UserError("the model is complete and needs no base", where=f"--base {base}", hint="Leave the option out.")
    if source.kind is not ModelKind.ADAPTER:
        source.check_weights()
    tokenizer = source.tokenizer()
    return source, tokenizer, _checked_encoder(tokenizer, name) if needs_template else None


def load_for_chat(
    name: str, *, base: str | None = None, allow_changed: bool = False, needs_template: bool = True
) -> ChatModel:
    """Load a run folder or any model with a chat template.

    Args:
        name: a folder or a hub id.
        base: folder or hub id of an adapter's base; None for the one that it was trained on.
        allow_changed: load although base, tokenizer or template changed since the run.
        needs_template: whether the model must have a chat template.

    Raises:
        UserError: the model cannot be loaded, or has no usable chat template.
    """
    source, tokenizer, encoder = _open(name, base, needs_template=needs_template)
    model = load_with_adapter(source, allow_changed=allow_changed)
    check_vocabulary(tokenizer, model, name)
    compute_in_float32_if_faster(model)
    # What an answer's settings leave open is filled from these.
    decode_plainly(model.generation_config)
    return ChatModel(name, model, tokenizer, source.generation_config(), encoder)


def load_with_adapter(source: ModelSource, *, allow_changed: bool = False) -> "PreTrainedModel | PeftModel":
    """Load a model, or base and adapter without merging, in evaluation mode on the machine's accelerator.

    The base of a run has the run's dtype and quantization.

    Args:
        source: from `open_for_chat`.
        allow_changed: load although base, tokenizer or template changed since the run.

    Raises:
        UserError: it cannot be loaded, or something changed.
    """
    if source.kind is ModelKind.ADAPTER:
        check_run(source, source.base(), allow_changed=allow_changed, exact=False)
        model: Any = _load_with_adapter(source)
    else:
        model = source.load_model(dtype="auto").to(best_device())
    model.eval()
    return model


def best_device() -> torch.device:
    """Return the machine's accelerator, or the CPU."""
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return found or torch.device("cpu")


def bfloat16_is_slow() -> bool:
    """Return whether models run on a CPU that has no kernels for bfloat16: there they compute in float32."""
    return best_device().type == "cpu" and not has_bfloat16_kernels()


def merge_added_tokens_of_biased_head(model: "PeftModel") -> bool:
    """Merge trained token embeddings in memory if the LM head has a bias.

    PEFT's unmerged forward of trained token embeddings omits the head's bias
    (https://github.com/huggingface/peft/issues/3649); its merged forward does not. The rest of the adapter stays
    unmerged.

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


def _load_with_adapter(source: ModelSource) -> "PeftModel":
    """Load base and adapter through stock PEFT.

    The base is resized if the adapter has tokens beyond its vocabulary.
    """
    from peft import PeftConfig, PeftModel

    from peftchat.merging.adapter_file import check_weights, vocabulary_needed
    from peftchat.models.saving import TOKEN_ROWS

    token_folder = source.path / TOKEN_ROWS
    with_tokens = token_folder if token_folder.is_dir() else source.path
    check_weights(source.path)
    vocabulary_size = vocabulary_needed(PeftConfig.from_pretrained(str(with_tokens)), with_tokens)
    recipe = source.recipe()
    source_of_base = source.base()
    if recipe is None:
        base = source_of_base.load_model(dtype="auto")
    else:
        base = load_trained_base(recipe.recipe, source_of_base)
    if vocabulary_size > base.get_input_embeddings().weight.shape[0]:
        _resize_embeddings(base, vocabulary_size)
    quantized = recipe is not None and recipe.recipe.quantization is not None
    try:
        base = base if quantized else base.to(best_device())
        if token_folder.is_dir():
            base = PeftModel.from_pretrained(base, str(token_folder)).merge_and_unload()
        model = PeftModel.from_pretrained(base, str(source.path))
    except (*LOAD_ERRORS, *MISFIT_ERRORS) as error:
        raise UserError(
            f"the adapter does not load onto its base: {first_line(error)}",
            where=source.where,
            hint="Check that `model.name` of its recipe is the base that it was trained on.",
        ) from error
    merge_added_tokens_of_biased_head(model)
    return model


def _resize_embeddings(base: "PreTrainedModel", vocabulary_size: int) -> None:
    """Add embedding rows for the adapter's tokens.

    New entries of a head's bias get its mean, as in training.
    """
    bias = base.get_output_embeddings().bias
    mean = None if bias is None else bias.detach().float().mean()
    before = base.get_input_embeddings().weight.shape[0]
    base.resize_token_embeddings(vocabulary_size, mean_resizing=False)
    if mean is not None:
        base.get_output_embeddings().bias.data[before:] = mean


def load_trained_base(recipe: Recipe, base: ModelSource) -> "PreTrainedModel":
    """Load a run's base, with the run's dtype and quantization.

    It is unquantized if bitsandbytes is not installed. A quantized base is put on the machine's accelerator.

    Args:
        recipe: of the run.
        base: where the base is.

    Raises:
        UserError: it cannot be loaded.
    """
    place = {"name": base.name, "revision": base.revision}
    recipe = recipe.model_copy(update={"model": recipe.model.model_copy(update=place)})
    if recipe.quantization is not None and importlib.util.find_spec("bitsandbytes") is None:
        stderr.print("bitsandbytes is not installed: the base is loaded without quantization.", style="yellow")
        recipe = recipe.model_copy(update={"quantization": None})
    device_map = None
    if recipe.quantization is not None and best_device().type != "cpu":
        device_map = {"": best_device()}
    return load_base(recipe, dtype=recipe.model.dtype, device_map=device_map)


def _checked_encoder(tokenizer: "PreTrainedTokenizerBase", name: str) -> PromptEncoder:
    if not tokenizer.chat_template:
        raise UserError(
            "the tokenizer has no chat template, which a chat needs",
            where=name,
            hint="A base model completes text: train it first (`peftchat init`), or name a chat model.",
        )
    encoder = PromptEncoder(tokenizer)
    encoder.check(name)
    return encoder


def check_vocabulary(tokenizer: "PreTrainedTokenizerBase", model: Any, name: str) -> None:
    """Check that a model has an embedding for each of the tokenizer's tokens.

    Raises:
        UserError: it has not.
    """
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise UserError(
            f"the tokenizer has {len(tokenizer)} tokens and the model's embedding only {rows} rows",
            where=name,
            hint="Take weights and tokenizer from the same run.",
        )
