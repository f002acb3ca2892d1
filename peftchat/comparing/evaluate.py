"""Evaluation of a finished run, or of the base model, in a child process.

`python -m peftchat.comparing.evaluate REQUEST RESULT` loads the run by stock transformers and PEFT. It does not depend
on what training itself reported.
"""

import contextlib
import math
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict

from peftchat.child_process import end_with_parent
from peftchat.comparing.outcomes import Evaluation, MergeResult
from peftchat.errors import UserError, VerificationError
from peftchat.library_setup import prepare_libraries

if TYPE_CHECKING:
    from peftchat.recipe import Recipe
    from peftchat.runs.run_summary import SampleAnswer

_WINDOW = 512
_MAX_WINDOWS = 64
_PART = 64


class EvaluationRequest(BaseModel):
    """What to evaluate; two equal requests have the same result.

    Attributes:
        run: the run folder; None for the base model.
        recipe: the recipe file of the run.
        general_text: the file for the general loss.
        general_text_sha256: its digest.
        prompts: prompts to answer.
        merge: whether to merge the adapter and verify the result.
    """

    model_config = ConfigDict(frozen=True)

    run: Path | None
    recipe: Path
    general_text: Path
    general_text_sha256: str
    prompts: tuple[str, ...]
    merge: bool


def general_losses(model: Any, tokenizer: Any, text: str) -> list[tuple[float, int]]:
    """Return the negative log-likelihood of the parts of a text, in nats, and the number of tokens of each.

    The text is split into windows of equal length. The model sees each window without the ones before it. A part is 64
    tokens of a window, so that a short text also has several, from which an interval follows.

    Args:
        model: a causal language model in evaluation mode, wrapped by PEFT or not.
        tokenizer: its tokenizer.
        text: at least two tokens; the first 64 windows of it are used.
    """
    import torch
    import torch.nn.functional as F

    device = model.get_input_embeddings().weight.device
    ids = torch.tensor(tokenizer(text)["input_ids"], device=device)
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None) or _WINDOW
    parts = []
    for window in ids.split(min(_WINDOW, positions))[:_MAX_WINDOWS]:
        if len(window) < 2:
            continue
        with torch.no_grad():
            # Virtual tokens of a prompt adapter have logits in front of those of the text.
            logits = model(input_ids=window[None], use_cache=False).logits[0, -len(window) : -1]
        losses = F.cross_entropy(logits.float(), window[1:], reduction="none")
        parts += [(float(part.sum()), len(part)) for part in losses.split(_PART)]
    return parts


def _mean(parts: Sequence[tuple[float, int]]) -> float:
    return sum(loss for loss, _ in parts) / sum(count for _, count in parts)


def evaluate(request: EvaluationRequest) -> Evaluation:
    """Evaluate one run, or what all begin at: the base model alone, or a first stage's run."""
    from peftchat.recipe import load_recipe

    recipe = load_recipe(request.recipe, to_train=False, upgrade=True).recipe
    text = request.general_text.read_text(encoding="utf-8")
    if request.run is None:
        begun_at = recipe.model.adapter
        parts = _base_losses(recipe, text) if begun_at is None else _evaluate_run(Path(begun_at), recipe, text, ())[0]
        return _with_general_loss(Evaluation(), parts)
    parts, answers = _evaluate_run(request.run, recipe, text, request.prompts)
    merge, message = _merge(request.run, recipe) if request.merge else (None, "not tried")
    return _with_general_loss(Evaluation(merge=merge, merge_message=message, answers=tuple(answers)), parts)


def _with_general_loss(evaluation: Evaluation, parts: Sequence[tuple[float, int]]) -> Evaluation:
    """Return the evaluation with the loss on general text, if that is finite."""
    mean = _mean(parts)
    if not math.isfinite(mean):
        return evaluation
    return evaluation.model_copy(update={"general_loss": mean, "general_parts": tuple(parts)})


def _base_losses(recipe: "Recipe", text: str) -> list[tuple[float, int]]:
    from peftchat.models.loading import compute_in_float32_if_faster, load_base
    from peftchat.models.source import ModelSource
    from peftchat.serving.chat_model import best_device

    unquantized = recipe.model_copy(update={"quantization": None})
    model: Any = load_base(unquantized, dtype=recipe.model.dtype).to(best_device())
    # As `load_for_chat` does with the runs that are compared with it.
    compute_in_float32_if_faster(model)
    return general_losses(model.eval(), ModelSource.of_recipe(recipe).tokenizer(), text)


def _evaluate_run(
    run: Path, recipe: "Recipe", text: str, prompts: tuple[str, ...]
) -> "tuple[list[tuple[float, int]], list[SampleAnswer]]":
    from peftchat.serving.chat_model import load_for_chat
    from peftchat.training.context import load_chat_format
    from peftchat.training.questions import sample_answers

    chat = load_for_chat(str(run))
    parts = general_losses(chat.model, chat.tokenizer, text)
    chat.model.generation_config = chat.generation_config
    return parts, sample_answers(chat.model, load_chat_format(recipe), prompts)


def _merge(run: Path, recipe: "Recipe") -> tuple[MergeResult, str]:
    """Merge a run into a temporary folder and verify the result.

    Returns:
        Whether the merged model computes the same, and the message of the verification.
    """
    from peftchat.merging import MergeOptions, merge_run

    if recipe.method == "full":
        return "full model", "the run has no adapter"
    out = run.with_name(f".{run.name}.merged")
    try:
        result = merge_run(run, MergeOptions(output=out, overwrite=True))
    except UserError as error:
        return "not mergeable", error.message
    except VerificationError as error:
        return "differs", str(error).partition(" The result is in")[0]
    finally:
        for leftover in out.parent.glob(f"{out.name}*"):
            shutil.rmtree(leftover, ignore_errors=True)
    verification = result.report.verification
    assert verification is not None
    return "same", verification.verdict


def main(request: Path, result: Path) -> None:
    """Evaluate what the request file names and write the result file."""
    prepare_libraries()
    with contextlib.redirect_stdout(sys.stderr):
        evaluation = evaluate(EvaluationRequest.model_validate_json(request.read_text(encoding="utf-8")))
    evaluation.write(result)


if __name__ == "__main__":
    end_with_parent()
    try:
        main(Path(sys.argv[1]), Path(sys.argv[2]))
    except UserError as error:
        sys.exit(f"Error: {error}")
