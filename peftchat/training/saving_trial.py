"""Trial of saving: all of a finished run but its weights, written before step 1 and read back by stock libraries.

What transformers or PEFT would refuse to save after the last step costs nothing yet.
"""

import copy
import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftConfig, PeftModel
from transformers import AutoConfig, AutoTokenizer, GenerationConfig

from peftchat.errors import UserError, first_line
from peftchat.models.saving import adapter_configs, save_tokenizer
from peftchat.models.zero import is_zero3
from peftchat.training.context import TrainContext

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from peftchat.training.trainer import ChatTrainer

_SCRATCH = ".trial.tmp"

_PROBE = "Hello, world!\n\n  naïve café 日本語 🎉 <b>1234567</b>\tdon't\r\n    return x  "

_DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EFBIG, errno.EPERM}


def try_saving(trainer: "ChatTrainer", context: TrainContext) -> None:
    """Write the small files of the finished run into a scratch folder, read them back, and delete it.

    The main process alone calls it.

    Raises:
        UserError: one of them cannot be saved, or is not read back as it is now.
    """
    recipe, model = context.recipe, trainer.causal_model
    trust = recipe.model.trust_remote_code
    where = f"model.name: {recipe.model.name}"
    with _scratch(context.run_folder.path) as folder:
        with _reported("tokenizer", where, "Choose another model, or mend its tokenizer files."):
            save_tokenizer(context.chat.tokenizer, folder)
            loaded = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=trust)
            _compare_tokenizers(context.chat.tokenizer, loaded, [*context.chat.template.special_tokens])
        with _reported("generation settings", where, "Mend the model's generation_config.json."):
            model.generation_config.save_pretrained(str(folder))
            read = GenerationConfig.from_pretrained(str(folder))
            _same("generation settings", _plain(model.generation_config), _plain(read))
        with _reported("model config", where, "Mend the model's config.json."):
            # A merge saves it too.
            _try_config(model, folder / "config", trust)
        if recipe.adapter is not None:
            for name, config in adapter_configs(trainer.model, recipe.adapter).items():
                with _reported("adapter's config", "adapter", "Choose other settings of the adapter."):
                    config.save_pretrained(str(folder / "adapter" / name))
                    stored = PeftConfig.from_pretrained(str(folder / "adapter" / name))
                    _same("adapter's type", config.peft_type, stored.peft_type)
            _check_names_of_adapter(trainer.model)
        elif not is_zero3():
            with _reported("weights", where, "Choose another model."):
                _try_names(model)


@contextmanager
def _scratch(run_folder: Path) -> Iterator[Path]:
    folder = run_folder / _SCRATCH
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _reported(what: str, where: str, hint: str) -> Iterator[None]:
    """Report whatever a library raises as the user's error; it would raise the same after training."""
    try:
        yield
    except UserError as error:
        raise UserError(error.message, where=where, hint=hint) from error
    except Exception as error:  # A model's own code may raise anything.
        if isinstance(error, OSError) and error.errno in _DISK_ERRORS:
            raise
        raise UserError(
            f"the {what} cannot be saved and loaded again: {first_line(error)}", where=where, hint=hint
        ) from error


def _same(what: str, before: object, after: object) -> None:
    if before != after:
        raise UserError(f"the {what} is not read back as it was saved: expected {before!r}, got {after!r}")


def _plain(generation: GenerationConfig) -> dict[str, Any]:
    values: dict[str, Any] = generation.to_diff_dict()
    return {name: value for name, value in values.items() if name not in ("transformers_version", "_from_model_config")}


def _compare_tokenizers(
    before: "PreTrainedTokenizerBase", after: "PreTrainedTokenizerBase", special_tokens: list[str]
) -> None:
    """Compare what training and chatting read from a tokenizer."""
    _same("chat template", before.chat_template, after.chat_template)
    for name in ("padding_side", "eos_token_id", "pad_token_id", "bos_token_id"):
        _same(f"tokenizer's {name}", getattr(before, name), getattr(after, name))
    _same("tokenizer's size", len(before), len(after))
    for text in (_PROBE, "".join([*special_tokens, _PROBE, *special_tokens])):
        for add_special_tokens in (False, True):
            ids = [one.encode(text, add_special_tokens=add_special_tokens) for one in (before, after)]
            _same(f"tokenizer changes: {text!r}", *ids)


def _try_config(model: "PreTrainedModel", folder: Path, trust: bool) -> None:
    config = copy.deepcopy(model.config)
    config.dtype = torch.float32
    config.save_pretrained(str(folder))
    read = AutoConfig.from_pretrained(str(folder), trust_remote_code=trust)
    _same("model config's type", config.model_type, read.model_type)
    _same("model config's vocabulary size", config.get_text_config().vocab_size, read.get_text_config().vocab_size)


def _check_names_of_adapter(model: torch.nn.Module) -> None:
    """Check that stock PEFT finds each tensor of a LoRA under the name that it saves it under.

    When PEFT loads one, it applies the renamings by which transformers reads the base's files. Some of them hit the
    names of adapters too, and PEFT passes over what it does not find:
    https://github.com/huggingface/peft/blob/v0.21.2/src/peft/utils/transformers_weight_conversion.py

    Raises:
        UserError: it does not.
    """
    from peft.utils.transformers_weight_conversion import convert_peft_adapter_state_dict_for_transformers

    if not isinstance(model, PeftModel):
        return
    stored = {
        name.replace(".default", ""): torch.empty(parameter.shape, device="meta")
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and ".lora_" in name
    }
    config = model.peft_config["default"]
    found = convert_peft_adapter_state_dict_for_transformers(model, config, dict(stored))
    lost = sorted(stored.keys() - found.keys())
    if lost:
        layers = sorted({name.partition(".lora_")[0].removeprefix("base_model.model.") for name in lost})
        kinds = sorted({".".join(part for part in layer.split(".")[-2:]) for layer in layers})
        raise UserError(
            f"PEFT would not find {len(lost)} of the adapter's {len(stored)} tensors again: it renames those of "
            f"{', '.join(kinds)} when it loads them",
            where="adapter.target_modules",
            hint="Name the layers to adapt, without these.",
        )


def _try_names(model: "PreTrainedModel") -> None:
    """Let transformers choose which of the weights that share memory it writes, as it does when it saves."""
    from transformers.modeling_utils import remove_tied_weights_from_state_dict

    remove_tied_weights_from_state_dict(dict(model.state_dict()), model)
