"""Candidates with made-up results, and a recipe that needs no model."""

from pathlib import Path

import numpy as np

from peftchat.comparing.candidates import Candidate
from peftchat.comparing.compare_plan import TrainingJob
from peftchat.comparing.hyperparameter_search import LEARNING_RATE
from peftchat.comparing.outcomes import CandidateResult, Evaluation, RunResult
from peftchat.runs.eval_losses import ConversationLoss, PartLoss


def made(
    name: str,
    losses: list[float],
    *,
    seconds: float = 10.0,
    memory: int = 100,
    tokens: int = 1000,
    spread: float = 0.001,
) -> CandidateResult:
    """A candidate with one run per seed, each on 40 held-out conversations of 10 tokens that differ by `spread`."""
    candidate = Candidate(name, name, {})
    runs = [
        RunResult(
            TrainingJob(candidate, {LEARNING_RATE: 1e-3}, seed),
            loss=loss,
            loss_before=4.0,
            steps=10,
            tokens=tokens,
            seconds=seconds,
            peak_memory_bytes=memory,
            held_out=_held_out(name, seed, loss, spread),
        )
        for seed, loss in enumerate(losses)
    ]
    return CandidateResult(candidate, runs[:1], runs[1:], Evaluation(general_loss=3.0))


def _held_out(name: str, seed: int, loss: float, spread: float) -> list[ConversationLoss]:
    noise = np.random.default_rng([seed, *name.encode()]).normal(0, spread, 40)
    losses = 10 * (loss + noise - noise.mean())
    return [
        ConversationLoss(f"eval.jsonl:{row}", 20, (PartLoss("assistant", 1, "content", 10, float(one)),))
        for row, one in enumerate(losses, start=1)
    ]


def write_rows_and_recipe(folder: Path, text: str) -> Path:
    """A recipe on four rows that names a model which is not there; `text` is appended."""
    path = folder / "recipe.yaml"
    rows = folder / "rows.jsonl"
    rows.write_text('{"prompt": "a", "completion": "b"}\n' * 4, encoding="utf-8")
    path.write_text(f"model: {{name: some/model}}\noutput_dir: runs/x\nmethod: lora\n{text}", encoding="utf-8")
    return path
