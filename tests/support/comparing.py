"""Candidates with made-up results, and a recipe that needs no model."""

from pathlib import Path

from peftchat.comparing.candidates import Candidate
from peftchat.comparing.compare_plan import TrainingJob
from peftchat.comparing.hyperparameter_search import RATE
from peftchat.comparing.outcomes import CandidateResult, Evaluation, RunResult

DATA = "data: {train: [{path: records.jsonl}], eval_fraction: 0.25}\n"
"""The `data` section on the file of `write_records_and_recipe`."""


def made(
    name: str, losses: list[float], *, seconds: float = 10.0, memory: int = 100, tokens: int = 1000
) -> CandidateResult:
    """Return a candidate with one run per seed."""
    candidate = Candidate(name, name, {})
    runs = [
        RunResult(
            TrainingJob(candidate, {RATE: 1e-3}, seed),
            loss=loss,
            loss_before=4.0,
            steps=10,
            tokens=tokens,
            seconds=seconds,
            peak_memory_bytes=memory,
        )
        for seed, loss in enumerate(losses)
    ]
    return CandidateResult(candidate, runs[:1], runs[1:], Evaluation(plain_loss=3.0))


def write_records_and_recipe(folder: Path, text: str) -> Path:
    """Write a recipe on four records that names a model which is not there; `text` is appended."""
    path = folder / "recipe.yaml"
    records = folder / "records.jsonl"
    records.write_text('{"prompt": "a", "completion": "b"}\n' * 4, encoding="utf-8")
    path.write_text(f"model: {{name: some/model}}\noutput_dir: runs/x\nmethod: lora\n{text}", encoding="utf-8")
    return path
