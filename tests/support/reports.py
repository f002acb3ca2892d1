"""Run folders and pages for the tests of the reports."""

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from peftchat.runs.metrics_file import MetricsFile

RUN_JSON: dict[str, Any] = {
    "method": "lora",
    "base_model": "base-model",
    "steps": 60,
    "epochs": 1.5,
    "train_examples": 5421,
    "dropped": {"longer than max_length": 7, "no answer": 3},
    "special_token_text": 2,
    "command": "peftchat train recipe.yaml --set 'data.train=[{path: a&b.jsonl}]'",
    "started": "2026-01-14T10:02:11+00:00",
    "finished": "2026-01-14T10:06:29+00:00",
    "attention": "sdpa",
    "tokens": 52310,
    "supervised_tokens": 32955,
    "tokens_per_second": 206.4375,
    "seconds": 257.9125,
    "padding_fraction": 0.03125,
    "peak_memory_bytes": 1274531840,
    "trainable_parameters": 4886784,
    "train_loss": 1.4321,
    "eval_loss_before": 2.9304,
    "eval_loss": 1.4193,
    "base_vocabulary_size": 49152,
    "new_tokens": [
        {"token": "<|user|>", "id": 49152, "seen": 618, "input_moved": 0.77641, "output_moved": 0.77642},
        {"token": "<|end|>", "id": 49153, "seen": 1230, "input_moved": 1.20451, "output_moved": 0.0},
        {"token": "<s>", "id": 49154, "seen": 0, "input_moved": 0.0, "output_moved": None},
    ],
    "versions": {"torch": "2.13.0", "peft": "0.21.2", "deepspeed": None},
    "world_size": 1,
    "model_flops_utilisation": 0.1182,
    "samples_before": [
        {"prompt": "What is <b>bold</b>?", "answer": "</div><script>alert('x')</script>", "stopped": False},
        {"prompt": "Only before", "answer": "a", "stopped": True},
    ],
    "samples_after": [
        {"prompt": "What is <b>bold</b>?", "answer": "A tag: <img src=https://example.com/x.png>", "stopped": True}
    ],
    "a_later_key": {"inner": [17.25, "<u>"]},
}

RECIPE = """\
model: {name: org/base, dtype: float32}
method: lora
adapter: {r: 4, alpha: 8}
chat: {template: starchat, system: "Be <brief>."}
data:
  train: [{path: secret/folder/conversations.jsonl}, {path: org/a-set}]
training: {learning_rate: 2.0e-4}
output_dir: secret/runs/demo
"""


def run_folder(folder: Path, run_json: dict[str, Any] = RUN_JSON, recipe: str | None = RECIPE) -> Path:
    """A run folder with sixty training steps and seven evaluations."""
    folder.mkdir()
    (folder / "run.json").write_text(json.dumps(run_json), encoding="utf-8")
    if recipe is not None:
        (folder / "recipe.yaml").write_text(recipe, encoding="utf-8")
    metrics = MetricsFile(folder / "metrics.jsonl")
    for step in range(61):
        if step:
            metrics.append(
                {
                    "step": step,
                    "loss": float("nan") if step == 7 else 3 / step,
                    "learning_rate": 1e-4,
                    "tokens_per_second": 200.0 + step,
                    "grad_norm": None,
                }
            )
        if step % 10 == 0:
            metrics.append({"step": step, "eval_loss": 2 - step / 60})
    return folder


class Page(HTMLParser):
    """The tags with their attributes, and the visible text, of a page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._open: list[str] = []
        self.unmatched: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "br", "img", "link", "input"):
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if not self._open or self._open.pop() != tag:
            self.unmatched.append(tag)

    def handle_data(self, data: str) -> None:
        if not self._open or self._open[-1] != "style":
            self.text += data
