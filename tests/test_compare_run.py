"""Whole comparisons as a user starts them, on a real base model of 260,032 parameters."""

import html.parser
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from training_helpers import peftchat, read_json, stock_loss, stock_run, write_conversations, write_recipe

from peftchat.recipe import load_recipe


@pytest.fixture
def recipe(tmp_path: Path, stories: Path) -> Path:
    train = write_conversations(tmp_path / "train.jsonl", 40)
    held_out = write_conversations(tmp_path / "eval.jsonl", 6, seed=5)
    settings = {"max_steps": 6, "eval_steps": 3, "eval_strategy": "steps"}
    return write_recipe(tmp_path / "recipe.yaml", stories, train, held_out, tmp_path / "run", training=settings)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--variants", "lora,dorra"], "Did you mean `dora`"),
        (["--variants", "lora", "--set", "data.eval=null"], "held-out"),
        (["--variants", "lora", "--set", "adapter.r=4,-1"], "adapter.r"),
        (["--variants", "lora", "--budget", "hours=2"], "steps=N, tokens=N or minutes=N"),
        (["--variants", "lora", "--learning-rates", "fast"], "1e-4,3e-4"),
        (["--variants", "lora", "--trials", "3"], "belong together"),
        (["--variants", "lora", "--learning-rates", "1e-3", "--no-lr-search"], "exclude each other"),
        (["--variants", "lora", "--forgetting-text", "nowhere.txt"], "nowhere.txt"),
    ],
)
def test_mistakes_are_told_before_anything_is_made(recipe: Path, arguments: list[str], said: str) -> None:
    out = recipe.parent / "comparison"
    ended = peftchat("compare", str(recipe), *arguments, "-o", str(out))
    assert ended.returncode == 2, ended.stderr
    assert said in " ".join(ended.stderr.split()) and "Traceback" not in ended.stderr
    assert not out.exists()
    assert ended.stdout == ""


def test_another_recipe_or_another_folder_is_refused(recipe: Path) -> None:
    full = recipe.parent / "full"
    full.mkdir()
    (full / "letter.txt").write_text("keep me")
    ended = peftchat("compare", str(recipe), "--variants", "lora", "-o", str(full))
    assert ended.returncode == 2 and "other files" in ended.stderr
    assert [file.name for file in full.iterdir()] == ["letter.txt"]


class _Page(html.parser.HTMLParser):
    """Collects what a page would load, and checks that its tags close."""

    _EMPTY = frozenset({"meta", "line", "circle", "polyline", "rect", "link", "img", "br"})

    def __init__(self) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.open: list[str] = []
        self.lines: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        told = dict(attrs)
        self.loads += [f"{tag} {key}" for key in ("src", "href", "srcset") if key in told]
        self.loads += [tag] if tag in ("script", "link", "iframe") else []
        if tag == "polyline" and "points" in told:
            self.lines.add(told["class"] or "")
        if tag not in self._EMPTY:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self._EMPTY:
            assert self.open.pop() == tag


def start(*arguments: str) -> subprocess.Popen[str]:
    """Start a comparison and leave it running."""
    return subprocess.Popen(
        [sys.executable, "-m", "peftchat", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )


def by_name(result: dict[str, Any]) -> dict[str, Any]:
    return {candidate["name"]: candidate for candidate in result["candidates"]}


@pytest.mark.slow
def test_a_comparison_survives_failures_and_being_killed(recipe: Path, stories: Path) -> None:
    out = recipe.parent / "comparison"
    # Some conversation is longer than 16 tokens, so that the runs of that candidate fail once they have started.
    arguments = ["compare", str(recipe), "--variants", "lora", "--set", "data.max_length=256,16"]
    arguments += ["--set", "data.truncation=refuse", "--learning-rates", "1e-4,3e-3", "--seeds", "1"]
    arguments += ["--prompt", "the cat sat on", "--json", "-o", str(out)]
    process = start(*arguments)
    assert process.stderr is not None
    while "1/4" not in (line := process.stderr.readline()):
        assert process.poll() is None and line
    deadline = time.monotonic() + 30
    while not (notes := list(out.glob("logs/*.pid"))):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    orphan = psutil.Process(int(notes[0].read_text().split()[0]))
    process.kill()
    process.wait()
    first = out / "runs" / "lora-max_length=256-lr1e-4-seed42" / "run.json"
    written = first.stat().st_mtime_ns

    ended = peftchat(*arguments)
    assert ended.returncode == 0, ended.stderr
    assert not orphan.is_running() or orphan.status() == psutil.STATUS_ZOMBIE
    assert first.stat().st_mtime_ns == written
    result = json.loads(ended.stdout)
    assert result == read_json(out / "comparison.json")

    good, bad = by_name(result)["lora max_length=256"], by_name(result)["lora max_length=16"]
    assert bad["loss"] is None and len(bad["trials"]) == 2
    assert all("data.max_length is 16" in run["failure"] and "\n" not in run["failure"] for run in bad["trials"])
    losses = {run["settings"]["training.learning_rate"]: run["loss"] for run in good["trials"]}
    assert set(losses) == {1e-4, 3e-3} and losses[3e-3] < losses[1e-4] < good["loss_before"]
    assert good["settings"]["training.learning_rate"] == 3e-3
    assert good["loss"] == {"mean": losses[3e-3], "margin": None, "seeds": 1}
    assert result["recommendation"]["name"] == "lora max_length=256"
    assert good["merge"] == "same" and good["weights_bytes"] > 100_000
    assert [answer["prompt"] for answer in good["answers"]] == ["the cat sat on"]

    # The table's loss is what stock libraries measure of the run on the held-out rows.
    run = Path(next(run["run"] for run in good["trials"] if run["loss"] == losses[3e-3]))
    model, tokenizer = stock_run(run, stories, "lora")
    assert stock_loss(model, tokenizer, recipe.parent / "eval.jsonl") == pytest.approx(losses[3e-3], abs=1e-3)
    assert not (run / "checkpoints").exists()

    text = (out / "report.html").read_text(encoding="utf-8")
    page = _Page()
    page.feed(text)
    assert page.loads == [] and page.open == []
    assert page.lines == {"line-0"} and "data.max_length is 16" in text
    recommended = load_recipe(out / "recommended.yaml").recipe
    assert recommended.training.learning_rate == 3e-3 and recommended.training.max_steps == 6
    assert recommended.data.train[0].path == str(recipe.parent / "train.jsonl")

    changed = peftchat(*arguments, "--set", "chat.loss_on=everything")
    assert changed.returncode == 2 and "chat.loss_on: answers" in " ".join(changed.stderr.split())


@pytest.mark.slow
def test_an_interrupt_ends_the_run_that_is_on(recipe: Path) -> None:
    out = recipe.parent / "comparison"
    process = start("compare", str(recipe), "--variants", "lora", "--seeds", "1", "-o", str(out))
    deadline = time.monotonic() + 60
    while not (notes := list(out.glob("logs/*.pid"))):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    child = psutil.Process(int(notes[0].read_text().split()[0]))
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130 and "Interrupted" in said
    assert not child.is_running()
    assert not list(out.glob("logs/*.pid"))
