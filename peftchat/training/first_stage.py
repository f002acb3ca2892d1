"""The finished run that a second stage begins at: checked, then continued or merged in memory.

An adapter on a frozen base goes on: the model has one adapter, its first values are those of the run's file, and what
is saved is an adapter like the run's. `method: full` trains all weights, so the run's adapter is merged into them
first, as `peftchat merge` does it.
"""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file

from peftchat.errors import UserError, VerificationError, first_line
from peftchat.merging.adapter_file import check_weights
from peftchat.merging.adapter_source import AdapterSource
from peftchat.merging.merge_job import MergeOptions, prepare_merge
from peftchat.merging.merge_plan import file_digest
from peftchat.models.base_content import changes_since, fingerprints_of
from peftchat.models.saving import TOKEN_ROWS, WEIGHTS, adapter_state, load_adapter_state
from peftchat.models.source import MISFIT_ERRORS, ModelSource
from peftchat.models.zero import gathered, models_unpartitioned
from peftchat.runs.run_folder import RunFolder

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

    from peftchat.chat_template.chat_format import ChatFormat
    from peftchat.recipe import Recipe

TEMPLATE = "chat_template.jinja"


def check_first_stage(recipe: "Recipe", chat: "ChatFormat") -> str | None:
    """Check the run that a recipe begins at, and return the digest of its adapter; None without one.

    Args:
        recipe: the recipe.
        chat: its tokenizer and template.

    Raises:
        UserError: the run has not finished, a file is missing or damaged, or base or template are others.
    """
    if recipe.model.adapter is None:
        return None
    folder = Path(recipe.model.adapter)
    source = ModelSource.open(str(folder), local=True, where=f"model.adapter: {folder}")
    source.require_model()
    if recipe.method == "full":
        AdapterSource.open(folder)
    parts = [folder, folder / TOKEN_ROWS] if (folder / TOKEN_ROWS).is_dir() else [folder]
    for part in parts:
        check_weights(part)
    _check_content(source, recipe)
    saved = folder / TEMPLATE
    # A template that writes today's date has another one each day.
    if saved.is_file() and recipe.chat.template_date is None and saved.read_text("utf-8") != chat.template.jinja:
        raise UserError(
            f"the chat template that the recipe names is not the one in {saved}",
            where=f"chat.template: {recipe.chat.template}",
            hint=f"Restore the template's file, or write `chat: {{template: {saved}}}`.",
        )
    return hashlib.sha256("".join(file_digest(part / WEIGHTS) for part in parts).encode()).hexdigest()


def begin_note(recipe: "Recipe") -> Iterator[str]:
    """Yield what a run says of the run that it begins at, if there is one."""
    if recipe.model.adapter is None:
        return
    what = "its adapter was merged into the base in memory" if recipe.method == "full" else "its adapter goes on"
    reference = "; the reference is that run, not the base" if recipe.has_reference else ""
    yield f"The run begins at {recipe.model.adapter}: {what}{reference}."
    own, now = ModelSource.open(recipe.model.adapter, local=True).recipe(), recipe.data.max_length
    if own is not None and own.recipe.data.max_length != now:
        yield f"data.max_length is {now:,} tokens, and was {own.recipe.data.max_length:,} in the run that it begins at."


def _check_content(source: ModelSource, recipe: "Recipe") -> None:
    """Check that the recipe's base and the run's tokenizer and template are those that the run was trained with."""
    trained = fingerprints_of(RunFolder(source.path))
    base = ModelSource.of_recipe(recipe)
    own = source.recipe()
    if trained is None:
        if own is not None and own.recipe.model.name != base.name:
            raise UserError(
                f"the run that it begins at was trained on {own.recipe.model.name}, got another base",
                where=base.where,
                hint="Remove `model.name`.",
            )
        return
    changes = changes_since(trained, source, base, exact=True)
    if changes:
        raise UserError(
            "this is not what the run that it begins at was trained with: " + "; ".join(changes),
            where=f"{source.where} on {base.name}",
            hint="Restore it; without `model.name`, the run's own base is taken.",
        )


def load_first_stage(recipe: "Recipe", model: "PreTrainedModel | PeftModel", folder: Path) -> None:
    """Give a model with a new adapter the values of a run's adapter, and of its added tokens.

    Args:
        recipe: its `adapter` section is the run's.
        model: with the run's adapter around it, which has other values.
        folder: of the run.

    Raises:
        UserError: the run's files do not hold all of what is trained.
    """
    adapter = recipe.adapter
    assert adapter is not None
    where = f"model.adapter: {folder}"
    unsaved = adapter.training_modules(model) if adapter.peft_class is not None else {}
    if unsaved:
        raise UserError(
            f"an adapter of the variant `{adapter.variant}` cannot go on: a finished run does not hold its "
            f"{', '.join(unsaved)}",
            where=where,
            hint="Begin at a run of another variant (`peftchat variants`).",
        )
    try:
        load_adapter_state(model, adapter, folder)
        loaded = adapter_state(model, adapter)
        _check_equal(loaded, folder)
    except (*MISFIT_ERRORS, VerificationError) as error:
        raise UserError(
            f"the run's adapter does not go on here: {first_line(error)}",
            where=where,
            hint="Its files must be those that the run has written.",
        ) from error


def _check_equal(loaded: dict[str, dict[str, torch.Tensor]], folder: Path) -> None:
    """Check that a model has exactly the tensors of a run's files: what PEFT does not find it passes over."""
    for name, tensors in loaded.items():
        stored = load_file(str(folder / name / WEIGHTS))
        odd = sorted(stored.keys() ^ tensors.keys())
        odd += [key for key in stored.keys() & tensors.keys() if not torch.equal(stored[key], tensors[key].cpu())]
        if odd:
            raise VerificationError(f"the tensor {odd[0]} differs from that of its file")


def merge_first_stage(recipe: "Recipe", model: "PreTrainedModel", folder: Path) -> None:
    """Merge a run's adapter into the weights of its base, in memory, as `peftchat merge` writes them.

    A base that was quantized in the run has the values of that quantization.

    Args:
        recipe: names the run.
        model: its base, whose vocabulary has the run's added tokens already.
        folder: of the run.

    Raises:
        UserError: the adapter cannot be merged.
    """
    quantized = AdapterSource.open(folder).quantization is not None
    options = MergeOptions(base="dequantized" if quantized else "original", base_model=recipe.model.name)
    with models_unpartitioned():
        job = prepare_merge(folder, options)
    if job.plan.untied:
        raise UserError(
            f"the run trained `{job.plan.untied[0]}` apart from the embedding that it is tied to",
            where=f"model.adapter: {folder}",
            hint="Merge the run with `peftchat merge`, and name the merged model in `model.name`.",
        )
    weights, deltas, parameters = job.weights, job.plan.deltas, dict(model.named_parameters())
    for name in sorted({*deltas, *weights.round_tripped}):
        parameter = parameters[name]
        merged = weights.rows(name).to(torch.float32, copy=True)
        if name in deltas:
            merged = deltas[name].apply(merged, 0)
        with gathered([parameter], write=True), torch.no_grad():
            if parameter.shape != merged.shape:
                raise UserError(f"{name} has the shape {list(parameter.shape)}, expected {list(merged.shape)}",
                                where=f"model.adapter: {folder}")  # fmt: skip
            parameter.copy_(merged.to(parameter))
        weights.release()
