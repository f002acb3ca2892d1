"""Whole comparisons as a user starts them."""

import html.parser
import json
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from peftchat.recipe import load_recipe
from tests.support.cli import Started, start
from tests.support.data import read_json, write_small_talk
from tests.support.forking_python import forking_python
from tests.support.in_process import peftchat_in_process
from tests.support.recipes import write_training_recipe
from tests.support.stock import stock_loss, stock_run

pytestmark = pytest.mark.xdist_group("comparison")


def write_recipe(folder: Path, base: Path) -> Path:
    train = write_small_talk(folder / "train.jsonl", 40)
    held_out = write_small_talk(folder / "eval.jsonl", 6, seed=5)
    settings = {"max_steps": 6, "eval_steps": 3, "eval_strategy": "steps"}
    return write_training_recipe(folder / "recipe.yaml", base, train, held_out, folder / "run", training=settings)


@pytest.fixture
def recipe(tmp_path: Path, pretrained: Path) -> Path:
    return write_recipe(tmp_path, pretrained)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--variants", "lora,dorra"], "Did you mean `dora`"),
        (["--variants", "lora", "--set", "data.eval=null"], "held-out"),
        (["--variants", "lora", "--set", "adapter.r=4,-1"], "adapter.r"),
        (["--variants", "lora", "--set", "training.seed=4294967295"], "training.seed: must be at most"),
        (["--variants", "lora", "--set", "training.lr_scheduler_kwargs={power: 2}"], "has no option `power`"),
        (["--variants", "lora", "--forgetting-text", "empty.txt"], "holds no text"),
        (["--variants", "lora", "--budget", "hours=2"], "steps=N, tokens=N or minutes=N"),
        (["--variants", "lora", "--learning-rates", "fast"], "1e-4,3e-4"),
        (["--variants", "lora", "--trials", "3"], "belong together"),
        (["--variants", "lora", "--learning-rates", "1e-3", "--no-lr-search"], "exclude each other"),
        (["--variants", "lora", "--forgetting-text", "nowhere.txt"], "nowhere.txt"),
    ],
)
def test_mistakes_are_reported_before_anything_is_made(
    recipe: Path, arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = recipe.parent / "comparison"
    (recipe.parent / "empty.txt").write_text(" \n")
    arguments = [str(recipe.parent / part) if part == "empty.txt" else part for part in arguments]
    ended = peftchat_in_process(capsys, "compare", recipe, *arguments, "-o", out)
    assert ended.returncode == 2, ended.stderr
    assert said in " ".join(ended.stderr.split()) and "Traceback" not in ended.stderr
    assert not out.exists()
    assert ended.stdout == ""


def test_another_recipe_or_another_folder_is_refused(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    full = recipe.parent / "full"
    full.mkdir()
    (full / "letter.txt").write_text("keep me")
    ended = peftchat_in_process(capsys, "compare", recipe, "--variants", "lora", "-o", full)
    assert ended.returncode == 2 and "other files" in ended.stderr
    assert [file.name for file in full.iterdir()] == ["letter.txt"]


def start_comparison(*arguments: object) -> Started:
    """Start a comparison and leave it running."""
    program = "import sys; sys.executable, *sys.argv = sys.argv[1:]; from peftchat.cli.main import main; main()"
    return start("-c", program, forking_python(), "peftchat", "compare", *arguments)


def first_run_process(comparison: Started, out: Path) -> psutil.Process:
    """The process of the run that is on."""
    deadline = time.monotonic() + 60
    while not (notes := list(out.glob("logs/*.pid"))):
        assert time.monotonic() < deadline and comparison.poll() is None
        time.sleep(0.01)
    return psutil.Process(int(notes[0].read_text().split()[0]))


@dataclass(frozen=True)
class Comparison:
    """A comparison that was killed in its second run, and started again.

    Attributes:
        first_run_written: when the summary of its first run was written, as seen before and after the second start.
        is_orphan_alive: whether the process of the second run outlived the second start.
    """

    recipe: Path
    arguments: list[str]
    out: Path
    first_run_written: tuple[int, int]
    is_orphan_alive: bool
    stdout: str
    result: dict[str, Any]

    @property
    def candidates(self) -> dict[str, Any]:
        """The candidates by name."""
        return {candidate["name"]: candidate for candidate in self.result["candidates"]}

    @property
    def good(self) -> Any:
        """The candidate that can be trained."""
        return self.candidates["lora max_length=256"]

    @property
    def losses(self) -> dict[float, float]:
        """The good candidate's held-out losses by learning rate."""
        return {run["settings"]["training.learning_rate"]: run["loss"] for run in self.good["trials"]}


@pytest.fixture(scope="module")
def comparison(tmp_path_factory: pytest.TempPathFactory, pretrained: Path) -> Iterator[Comparison]:
    folder = tmp_path_factory.mktemp("comparison")
    recipe, out = write_recipe(folder, pretrained), folder / "comparison"
    # Some conversation is longer than 16 tokens, so that the runs of that candidate fail once they have started.
    arguments = [str(recipe), "--variants", "lora", "--set", "data.max_length=256,16"]
    arguments += ["--set", "data.truncation=error", "--learning-rates", "1e-4,3e-3", "--seeds", "1"]
    arguments += ["--prompt", "the cat sat on", "--json", "-o", str(out)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PEFTCHAT_CACHE", str(folder / "cache"))
        killed = start_comparison(*arguments)
        progress = ""
        while "1/4" not in progress:
            assert killed.poll() is None, progress
            progress += killed.stderr.read()
            time.sleep(0.01)
        orphan = first_run_process(killed, out)
        killed.kill()
        killed.wait()
        first = out / "runs" / "lora-max_length=256-lr1e-4-seed42" / "run.json"
        before = first.stat().st_mtime_ns

        again = start_comparison(*arguments)
        stdout, stderr = again.communicate()
        assert again.wait() == 0, stderr
        is_alive = orphan.is_running() and orphan.status() != psutil.STATUS_ZOMBIE
        written = (before, first.stat().st_mtime_ns)
        yield Comparison(recipe, arguments, out, written, is_alive, stdout, json.loads(stdout))


def test_a_killed_comparison_keeps_finished_runs_and_ends_the_one_that_was_on(comparison: Comparison) -> None:
    assert not comparison.is_orphan_alive
    assert comparison.first_run_written[0] == comparison.first_run_written[1]
    assert comparison.result == read_json(comparison.out / "comparison.json")


def test_a_candidate_whose_runs_fail_has_their_reason_in_one_line(comparison: Comparison) -> None:
    bad = comparison.candidates["lora max_length=16"]
    assert bad["loss"] is None and len(bad["trials"]) == 2
    assert all("data.max_length is 16" in run["failure"] and "\n" not in run["failure"] for run in bad["trials"])


def test_the_better_learning_rate_is_taken_and_recommended(comparison: Comparison) -> None:
    good, losses = comparison.good, comparison.losses
    assert set(losses) == {1e-4, 3e-3} and losses[3e-3] < losses[1e-4] < good["loss_before"]
    assert good["settings"]["training.learning_rate"] == 3e-3
    assert good["loss"] == {"mean": losses[3e-3], "margin": None, "seeds": 1}
    assert comparison.result["recommendation"]["name"] == "lora max_length=256"
    recommended = load_recipe(comparison.out / "recommended.yaml").recipe
    assert recommended.training.learning_rate == 3e-3 and recommended.training.max_steps == 6
    assert recommended.data.train[0].path == str(comparison.recipe.parent / "train.jsonl")


def test_the_best_run_is_merged_and_asked(comparison: Comparison) -> None:
    good = comparison.good
    assert good["merge"] == "same" and good["weights_bytes"] > 100_000
    assert [answer["prompt"] for answer in good["answers"]] == ["the cat sat on"]


def test_the_loss_is_what_stock_libraries_measure(comparison: Comparison, pretrained: Path) -> None:
    loss = comparison.losses[3e-3]
    run = Path(next(run["run"] for run in comparison.good["trials"] if run["loss"] == loss))
    model, tokenizer = stock_run(run, pretrained, "lora")
    assert stock_loss(model, tokenizer, comparison.recipe.parent / "eval.jsonl") == pytest.approx(loss, abs=1e-3)
    assert not (run / "checkpoints").exists()


def test_a_candidate_is_what_train_makes_of_its_recipe(
    comparison: Comparison, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name, alone = "lora-max_length=256-lr3e-3-seed42", tmp_path / "alone"
    recipe = comparison.out / "recipes" / f"{name}.yaml"
    assert peftchat_in_process(capsys, "train", recipe, "--set", f"output_dir={alone}").returncode == 0
    for file in ("adapter_model.safetensors", "eval_losses.jsonl"):
        assert (alone / file).read_bytes() == (comparison.out / "runs" / name / file).read_bytes()


class _Page(html.parser.HTMLParser):
    """Collects what a page would load, and checks that its tags close."""

    _EMPTY = frozenset({"meta", "line", "circle", "polyline", "rect", "link", "img", "br"})

    def __init__(self) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.open: list[str] = []
        self.lines: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = dict(attrs)
        self.loads += [f"{tag} {key}" for key in ("src", "href", "srcset") if key in attributes]
        self.loads += [tag] if tag in ("script", "link", "iframe") else []
        if tag == "polyline" and "points" in attributes:
            self.lines.add(attributes["class"] or "")
        if tag not in self._EMPTY:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self._EMPTY:
            assert self.open.pop() == tag


def test_the_page_loads_nothing_and_shows_runs_and_failures(comparison: Comparison) -> None:
    text = (comparison.out / "report.html").read_text(encoding="utf-8")
    page = _Page()
    page.feed(text)
    assert page.loads == [] and page.open == []
    assert page.lines == {"line-0"} and "data.max_length is 16" in text


def test_a_comparison_does_not_go_on_with_another_recipe(
    comparison: Comparison, capsys: pytest.CaptureFixture[str]
) -> None:
    changed = peftchat_in_process(capsys, "compare", *comparison.arguments, "--set", "chat.loss_on=everything")
    assert changed.returncode == 2 and "chat.loss_on: answers" in " ".join(changed.stderr.split())


def test_an_interrupt_ends_the_run_that_is_on(recipe: Path) -> None:
    out = recipe.parent / "comparison"
    comparison = start_comparison(recipe, "--variants", "lora", "--seeds", "1", "-o", out)
    child = first_run_process(comparison, out)
    comparison.send_signal(signal.SIGTERM)
    _, said = comparison.communicate(timeout=60)
    assert comparison.wait() == 143 and "Stopped by SIGTERM" in said
    assert not child.is_running()
    assert not list(out.glob("logs/*.pid"))
