"""Check a base by its files before anything of it is loaded, and its values when they are.

transformers fills what a checkpoint lacks with random numbers and leaves out what it does not know. Here its own
loading runs on the headers of the files: tensors without values on torch's `meta` device. So a checkpoint that it
renames, fuses or ties is compared as it will be loaded.
"""

import copy
import itertools
import os
import re
from collections import Counter
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from peftchat.console import stderr
from peftchat.errors import UserError, first_line
from peftchat.models.base_config import build_on_meta, check_config
from peftchat.models.safetensors_files import SafetensorsCheckpoint, TensorEntry, read_rows
from peftchat.models.source import ModelSource
from peftchat.models.zero import is_zero3

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from peftchat.recipe import LoadedRecipe

_SHOWN = 3
"""Most tensors that a message names."""

_BLOCK_ROWS = 4096
"""Rows of a matrix that are compared at a time."""

_OTHER_HEADS = re.compile(
    r"^(v_head|value_head|score|classifier|qa_outputs|reward_head|rm_head|regression_head)\."
    r"|(^|\.)(mtp|vision_tower|vision_model|visual|multi_modal_projector|audio_tower)\."
)
"""Parts that published checkpoints hold beside the language model, and that change nothing of what it computes."""

_OLD_BUFFERS = re.compile(r"(^|\.)(inv_freq|position_ids|masked_bias|causal_mask|cos_cached|sin_cached)$")
"""What older versions of transformers saved with the weights, and compute now."""


def check_base(loaded: "LoadedRecipe", *, for_plan: bool = False, download: bool = False) -> None:
    """Check that the recipe's base is a complete model that can be trained as the recipe says.

    Args:
        loaded: the recipe.
        for_plan: whether only a memory plan is made, which needs no weights: those that are here are checked.
        download: whether to download the weights of a hub model that is not in the cache.

    Raises:
        UserError: it is not; the message names the first faults.
    """
    source = ModelSource.of_recipe(loaded.recipe)
    source.require_model()
    config = source.config()
    note = check_config(loaded, source, config)
    if note is not None:
        _note(note)
    if for_plan and not source.has_weights():
        return
    source.check_weights()
    folder = source.weights_folder(download=download)
    if folder is not None:
        check_tensors(SafetensorsCheckpoint.open(folder), config, source)


@dataclass(frozen=True, slots=True)
class LoadingReport:
    """What transformers' loading would make of a checkpoint.

    Attributes:
        model: the model on torch's `meta` device, as loaded.
        missing: parameters that no tensor fills.
        unexpected: tensors, by the names that they would have in the model, that fill no parameter.
        mismatched: parameter -> shape in the files, shape in the model.
    """

    model: "PreTrainedModel"
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    mismatched: dict[str, tuple[list[int], list[int]]]


def check_tensors(checkpoint: SafetensorsCheckpoint, config: "PretrainedConfig", source: ModelSource) -> None:
    """Check that a checkpoint holds what its model needs, and nothing else.

    Args:
        checkpoint: the files.
        config: the model's config.
        source: the base, for messages.

    Raises:
        UserError: a tensor is missing or unexpected, has a wrong shape or type, or two differ that the config ties.
    """
    report = load_headers(checkpoint, config, source)
    if report is None:
        return
    _check_dtypes(checkpoint, report, source)
    _check_shapes(report, config, source)
    _check_missing(checkpoint, report, source)
    _check_unexpected(checkpoint, report, source)
    check_ties(checkpoint, report.model, source)


def load_headers(
    checkpoint: SafetensorsCheckpoint, config: "PretrainedConfig", source: ModelSource
) -> LoadingReport | None:
    """Let transformers load a checkpoint without values; None for a model's own code that cannot run without them.

    Raises:
        UserError: the model cannot be built, or transformers cannot convert the tensors.
    """
    has_own_code = bool(source.trust_remote_code and getattr(config, "auto_map", None))
    try:
        built = build_on_meta(config, trust_remote_code=bool(source.trust_remote_code))
        with _silent_loading():
            model, info = type(built).from_pretrained(
                None,
                config=copy.deepcopy(built.config),
                state_dict={
                    name: torch.empty(entry.shape, dtype=entry.dtype, device="meta")
                    for name, entry in checkpoint.entries.items()
                },
                dtype=torch.float32,
                attn_implementation="eager",
                device_map={"": "meta"},
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
    except Exception as error:
        # Every conversion fails in its own way.
        if has_own_code:
            _note(f"The tensors of {source.name} were not checked: its code needs values ({first_line(error)}).")
            return None
        if isinstance(error, UserError):
            raise
        odd = _irregular(checkpoint)
        reason = f"{len(odd)} of a group are missing or differ in shape: {_some(odd)}" if odd else first_line(error)
        raise UserError(
            f"transformers cannot convert the tensors of the files: {reason}",
            where=source.where,
            hint="Download the model again, or one that was saved for transformers.",
        ) from error
    mismatched = {name: (list(found), list(expected)) for name, found, expected in info["mismatched_keys"]}
    return LoadingReport(model, tuple(sorted(info["missing_keys"])), tuple(sorted(info["unexpected_keys"])), mismatched)


def _irregular(checkpoint: SafetensorsCheckpoint) -> list[str]:
    """Return what breaks the pattern of tensors whose names differ in numbers alone, such as those of experts.

    That is a tensor whose shape differs from the others', or one that is missing between them.
    """
    groups: dict[str, dict[tuple[int, ...], TensorEntry]] = {}
    for name, entry in checkpoint.entries.items():
        numbers = tuple(int(part) for part in name.split(".") if part.isdigit())
        pattern = ".".join("{}" if part.isdigit() else part for part in name.split("."))
        groups.setdefault(pattern, {})[numbers] = entry
    odd = []
    for pattern, group in groups.items():
        usual = Counter(entry.shape for entry in group.values()).most_common(1)[0][0]
        odd += [entry.name for entry in group.values() if entry.shape != usual]
        expected = itertools.product(*(sorted(set(column)) for column in zip(*group, strict=True)))
        odd += [pattern.format(*numbers) for numbers in expected if numbers not in group]
    return odd


@contextmanager
def _silent_loading() -> Iterator[None]:
    """Silence transformers' report and progress bar for a moment."""
    from transformers.utils import logging

    verbosity, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bar:
            logging.enable_progress_bar()


def _check_dtypes(checkpoint: SafetensorsCheckpoint, report: LoadingReport, source: ModelSource) -> None:
    """Check that no parameter is stored as integers, which transformers would read as numbers."""
    odd = [entry for entry in checkpoint.entries.values() if not entry.dtype.is_floating_point]
    if not odd:
        return
    parameters = {name for name, _ in report.model.named_parameters(remove_duplicate=False)}
    names = _model_names(report.model, [entry.name for entry in odd])
    wrong = [entry for entry in odd if names[entry.name] in parameters]
    if wrong:
        kind = str(wrong[0].dtype).removeprefix("torch.")
        raise UserError(
            f"{_some([entry.name for entry in wrong])} {_verb(wrong, 'holds', 'hold')} integers ({kind}), and "
            "config.json names no quantization",
            where=source.where,
            hint="Use the 16- or 32-bit version of the model.",
        )


def _check_shapes(report: LoadingReport, config: "PretrainedConfig", source: ModelSource) -> None:
    if not report.mismatched:
        return
    name, (found, expected) = next(iter(sorted(report.mismatched.items())))
    text = f"{name} has the shape {found} in the files, expected {expected} by config.json"
    vocabulary = config.get_text_config().vocab_size
    if found[1:] == expected[1:] and expected[:1] == [vocabulary]:
        text = f"{name} has {found[0]} rows in the files, expected {vocabulary} (vocab_size in config.json)"
    others = len(report.mismatched) - 1
    raise UserError(
        text + (f"; {others} other {'tensor differs' if others == 1 else 'tensors differ'}" if others else ""),
        where=source.where,
        hint="Download config.json and weights of one version of the model.",
    )


def _check_missing(checkpoint: SafetensorsCheckpoint, report: LoadingReport, source: ModelSource) -> None:
    if not report.missing:
        return
    model, total = report.model, len(report.model.state_dict())
    head = model.get_output_embeddings()
    names = {name for name, weight in model.named_parameters() if head is not None and weight is head.weight}
    if set(report.missing) <= names:
        raise UserError(
            f"the files lack the language-model head ({report.missing[0]}), and config.json does not tie it to the "
            "embedding",
            where=source.where,
            hint="Download a model with its head. If its head is the embedding, set tie_word_embeddings: true in "
            "config.json.",
        )
    count = len(report.missing)
    raise UserError(
        f"the files lack {count} of the {total} tensors that {type(model).__name__} needs: {_some(report.missing)}",
        where=source.where,
        hint="Download the complete model. transformers would put random numbers in their place.",
    )


def _check_unexpected(checkpoint: SafetensorsCheckpoint, report: LoadingReport, source: ModelSource) -> None:
    unexpected = [name for name in report.unexpected if not _is_old_buffer(name, checkpoint)]
    heads = [name for name in unexpected if _OTHER_HEADS.search(name)]
    strange = [name for name in unexpected if name not in heads]
    if strange:
        kind = type(report.model).__name__
        raise UserError(
            f"the files hold {len(strange)} {_verb(strange, 'tensor', 'tensors')} that {kind} has no place for: "
            f"{_some(strange)}",
            where=source.where,
            hint="Download config.json and weights of one version of the model. transformers would leave them out.",
        )
    if heads:
        _note(f"{len(heads)} tensors of {source.name} are not part of the language model: {_some(heads)}.")


def _is_old_buffer(name: str, checkpoint: SafetensorsCheckpoint) -> bool:
    if _OLD_BUFFERS.search(name):
        return True
    # Causal masks are saved as `attn.bias`, of the shape (1, 1, positions, positions).
    entry = checkpoint.entries.get(name)
    return entry is not None and entry.shape[:2] == (1, 1) and len(entry.shape) == 4 and name.endswith("bias")


def check_ties(checkpoint: SafetensorsCheckpoint, model: "PreTrainedModel", source: ModelSource) -> None:
    """Check that tensors which the config ties are the same where the files hold both.

    Args:
        checkpoint: the files.
        model: the model, on any device.
        source: the base, for messages.

    Raises:
        UserError: they differ.
    """
    ties: dict[str, str] = model.all_tied_weights_keys
    if not ties:
        return
    # A merge may have given the model more rows than the files have.
    widths = {tuple(model.get_parameter(name).shape[1:]) for name in (*ties, *ties.values())}
    candidates = [name for name, entry in checkpoint.entries.items() if entry.shape[1:] in widths]
    stored = {name: checkpoint.entries[key] for key, name in _model_names(model, candidates).items()}
    for tied, owner in ties.items():
        if tied in stored and owner in stored and not _equal(stored[tied], stored[owner]):
            raise UserError(
                f"config.json ties {tied} to {owner} (tie_word_embeddings: true), but the files hold two different "
                "matrices",
                where=source.where,
                hint="If the head is a matrix of its own, set tie_word_embeddings: false in config.json; else remove "
                f"{tied} from the files.",
            )


def _equal(one: TensorEntry, other: TensorEntry) -> bool:
    if one.shape != other.shape:
        return False
    # Of two stored precisions, the lower one is what both can hold.
    dtype = min(one.dtype, other.dtype, key=lambda dtype: dtype.itemsize)
    for start in range(0, one.rows, _BLOCK_ROWS):
        stop = min(start + _BLOCK_ROWS, one.rows)
        if not torch.equal(read_rows(one, start, stop).to(dtype), read_rows(other, start, stop).to(dtype)):
            return False
    return True


def _model_names(model: "PreTrainedModel", keys: Collection[str]) -> dict[str, str]:
    """Return the name that each tensor of a checkpoint has in the model."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    state = model.state_dict()
    names = {}
    for key in keys:
        name, _ = rename_source_key(key, renamings, converters, model.base_model_prefix, state)
        names[key] = key if name not in state and key in state else name
    return names


def check_tokenizer(
    tokenizer: "PreTrainedTokenizerBase",
    source: ModelSource,
    config: "PretrainedConfig",
    new_ids: Collection[int] = (),
) -> None:
    """Check that every token has a row in the embedding.

    A special token without one is accepted if the embedding grows beyond it for added tokens: text never becomes a
    special token, so it is padding at most. Some tokenizer classes of transformers add such tokens by themselves.

    Args:
        tokenizer: the base's tokenizer, perhaps with added tokens.
        source: the base, for messages.
        config: its config.
        new_ids: the ids of the added tokens, which get rows.

    Raises:
        UserError: a token's id is beyond the last row.
    """
    rows = int(config.get_text_config().vocab_size)
    grown = max((rows - 1, *new_ids))
    covered = {id for id, token in tokenizer.added_tokens_decoder.items() if token.special and id <= grown}
    covered.update(new_ids)
    outside = sorted(
        (id, token) for token, id in tokenizer.get_vocab().items() if not 0 <= id < rows and id not in covered
    )
    if outside:
        id, token = outside[0]
        raise UserError(
            f"the tokenizer has {len(outside)} {_verb(outside, 'token', 'tokens')} beyond the embedding's {rows} rows, "
            f"the first is {token!r} = {id}",
            where=source.where,
            hint="Use the tokenizer that the model was trained with, or remove the tokens from it.",
        )


def check_values(model: "PreTrainedModel", source: ModelSource) -> None:
    """Check that every parameter of a loaded model is finite; every process of a run calls it.

    Args:
        model: the model. Under ZeRO-3 each process looks at its own part. Quantized weights are left to
            `check_stored_values`.
        source: the base, for messages.

    Raises:
        UserError: a value is not a finite number.
    """
    # Quantized weights are codes: read as the floats that they are stored as, they are any number.
    wrong = [
        name
        for name, parameter in model.named_parameters()
        if not hasattr(parameter, "bnb_quantized") and not hasattr(parameter, "SCB") and not _is_finite(parameter)
    ]
    if is_zero3():
        parts: list[list[str]] = [[] for _ in range(torch.distributed.get_world_size())]
        torch.distributed.all_gather_object(parts, wrong)
        wrong = sorted({name for part in parts for name in part})
    if wrong:
        raise _not_finite(wrong, source)


def check_stored_values(source: ModelSource) -> None:
    """Check the stored values of a model that was quantized while it was loaded: its codes hide what is not finite.

    Raises:
        UserError: a value is not a finite number.
    """
    folder = source.weights_folder()
    if folder is None:
        return
    wrong = []
    for entry in SafetensorsCheckpoint.open(folder).entries.values():
        if entry.dtype.is_floating_point and len(entry.shape) > 1:
            blocks = range(0, entry.rows, _BLOCK_ROWS)
            if not all(_is_finite(read_rows(entry, at, min(at + _BLOCK_ROWS, entry.rows))) for at in blocks):
                wrong.append(entry.name)
    if wrong:
        raise _not_finite(wrong, source)


def _is_finite(tensor: torch.Tensor) -> bool:
    tensor = getattr(tensor, "ds_tensor", tensor).detach()
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    low, high = torch.aminmax(tensor)
    return bool(torch.isfinite(low) and torch.isfinite(high))


def _not_finite(names: Collection[str], source: ModelSource) -> UserError:
    return UserError(
        f"{len(names)} {_verb(names, 'tensor holds', 'tensors hold')} values that are not finite numbers: "
        f"{_some(names)}",
        where=source.where,
        hint="Download the model again. A model whose numbers exceed float16 needs model.dtype: bfloat16 or float32.",
    )


def _note(text: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        stderr.print(f"Note: {text}", markup=False, highlight=False)


def _some(names: Collection[str]) -> str:
    shown = ", ".join(list(names)[:_SHOWN])
    return shown if len(names) <= _SHOWN else f"{shown}, …"


def _verb(names: Collection[Any], one: str, several: str) -> str:
    return one if len(names) == 1 else several
