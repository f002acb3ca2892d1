"""`python -m peftchat.comparing.evaluate REQUEST RESULT`: looks at a finished run, or at the base, in its own process.

What training itself reports would be no proof: the run is loaded here from its files by stock transformers and PEFT.
"""

import contextlib
import json
import math
import shutil
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftchat.errors import UserError, VerificationError
from peftchat.files import write_text
from peftchat.logging_setup import quiet_libraries

if TYPE_CHECKING:
    from peftchat.recipe import Recipe

_WINDOW = 512
_MOST_WINDOWS = 64


def plain_loss(model: Any, tokenizer: Any, text: str) -> float:
    """Mean negative log-likelihood of plain text, in nats a token.

    The text is cut into windows of equal length, each read from its own beginning.

    Args:
        model: a causal language model, wrapped by PEFT or not, in evaluation mode.
        text: at least two tokens long; 64 windows of it are used.
    """
    import torch
    import torch.nn.functional as F

    device = model.get_input_embeddings().weight.device
    ids = torch.tensor(tokenizer(text)["input_ids"], device=device)
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None) or _WINDOW
    total, count = 0.0, 0
    for window in ids.split(min(_WINDOW, positions))[:_MOST_WINDOWS]:
        if len(window) < 2:
            continue
        with torch.no_grad():
            # Prompts that an adapter puts in front have logits too, which are none of the text's.
            logits = model(input_ids=window[None], use_cache=False).logits[0, -len(window) : -1]
        total += float(F.cross_entropy(logits.float(), window[1:], reduction="sum"))
        count += len(window) - 1
    return total / count


def measure(request: dict[str, Any]) -> dict[str, Any]:
    """All that is asked for of one run, or of the base alone.

    Args:
        request: `recipe`; `run`, or null for the base; `text`, the file of plain text; `questions`; `merge`.
    """
    from peftchat.recipe import load_recipe

    recipe = load_recipe(Path(request["recipe"]), to_train=False).recipe
    text = Path(request["text"]).read_text(encoding="utf-8")
    if request["run"] is None:
        return {"plain_loss": _base_loss(recipe, text), "merge": None, "merge_words": "", "answers": []}
    loss, sample_answers = _look(Path(request["run"]), recipe, text, request["questions"])
    merge, words = _merged(Path(request["run"]), recipe) if request["merge"] else (None, "not tried")
    return {"plain_loss": loss, "merge": merge, "merge_words": words, "answers": sample_answers}


def _base_loss(recipe: "Recipe", text: str) -> float:
    from peftchat.models.loading import load_base
    from peftchat.models.source import ModelSource
    from peftchat.serving.chat_model import best_device

    plain = recipe.model_copy(update={"quantization": None})
    model: Any = load_base(plain, dtype=recipe.model.dtype).to(best_device())
    return plain_loss(model.eval(), ModelSource.of_recipe(recipe).tokenizer(), text)


def _look(run: Path, recipe: "Recipe", text: str, questions: list[str]) -> tuple[float, list[dict[str, Any]]]:
    from peftchat.serving.chat_model import load_for_chat
    from peftchat.training.model import chat_format
    from peftchat.training.summary import sample_answers

    chat = load_for_chat(str(run))
    loss = plain_loss(chat.model, chat.tokenizer, text)
    chat.model.generation_config = chat.generation_config
    return loss, [asdict(answer) for answer in sample_answers(chat.model, chat_format(recipe), questions)]


def _merged(run: Path, recipe: "Recipe") -> tuple[str, str]:
    """Whether the merged model computes what base and adapter compute, and the proof's words."""
    from peftchat.merging import MergeOptions, merge_run

    if recipe.method == "full":
        return "nothing to fold", "the run is a whole model"
    out = run.with_name(f".{run.name}.merged")
    try:
        result = merge_run(run, MergeOptions(output=out, overwrite=True))
    except UserError as error:
        return "does not fold", error.what
    except VerificationError as error:
        return "differs", str(error).partition(" The result is in")[0]
    finally:
        for left in out.parent.glob(f"{out.name}*"):
            shutil.rmtree(left, ignore_errors=True)
    proof = result.report.verification
    assert proof is not None
    return "same", proof.verdict


def main(request: Path, result: Path) -> None:
    """Measure and write down what was found."""
    quiet_libraries()
    with contextlib.redirect_stdout(sys.stderr):
        found = measure(json.loads(request.read_text(encoding="utf-8")))
    if not math.isfinite(found["plain_loss"]):
        found["plain_loss"] = None
    write_text(result, json.dumps(found, indent=2, ensure_ascii=False) + "\n", errors="backslashreplace")


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]), Path(sys.argv[2]))
    except UserError as error:
        sys.exit(f"Error: {error}")
