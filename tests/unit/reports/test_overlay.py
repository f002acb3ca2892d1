import json
from pathlib import Path

import pytest

from peftchat.errors import UserError
from peftchat.reports.curves import points
from peftchat.reports.overlay import MAX_RUNS, read_runs, write_overlay
from peftchat.runs.metrics_file import MetricsFile
from tests.support.reports import RECIPE, RUN_JSON, Page, run_folder


def pair(folder: Path) -> list[Path]:
    """Two runs of one name, of which the second has another rate and other held-out data."""
    (folder / "a").mkdir()
    (folder / "b").mkdir()
    marks = [{"data": {"eval": {"examples": 2, "digest": digest}}, "tokenizer": "t"} for digest in ("one", "two")]
    groups = {"role": {"assistant": {"tokens": 9, "before": 3.25, "after": 1.125}}}
    first = run_folder(folder / "a" / "demo", {**RUN_JSON, "fingerprints": marks[0], "eval_by": groups})
    second = run_folder(
        folder / "b" / "demo", {**RUN_JSON, "fingerprints": marks[1]}, RECIPE.replace("2.0e-4", "7.0e-4")
    )
    return [first, second]


def test_runs_of_one_name_are_told_apart_and_what_differs_is_shown(tmp_path: Path) -> None:
    html = write_overlay(tmp_path / "page.html", read_runs(pair(tmp_path))).read_text(encoding="utf-8")
    page = Page(html)
    assert page.unmatched == []
    assert "a/demo" in page.text
    assert "b/demo" in page.text
    assert "training.learning_rate" in page.text
    assert "0.0007" in page.text
    assert "adapter.r" not in page.text
    assert "3.250 → 1.125" in page.text
    assert "held to different conversations" in page.text
    assert "has no tokens" in page.text
    assert {"script", "link", "img", "b", "u"}.isdisjoint(tag for tag, _ in page.tags)
    classes = {attributes.get("class") for tag, attributes in page.tags if tag == "polyline"}
    assert classes == {"line-0", "line-1"}


def test_tokens_are_summed_over_lines_and_evaluations_lie_between(tmp_path: Path) -> None:
    metrics = MetricsFile(tmp_path / "metrics.jsonl")
    for line in (
        {"step": 0, "eval_loss": 5.0},
        {"step": 5, "loss": 4.0, "tokens": 100},
        {"step": 8, "eval_loss": 3.0},
        {"step": 10, "loss": 3.5, "tokens": 300},
    ):
        metrics.append(line)
    assert points(metrics.read(), "loss", "tokens") == [(100, 4.0), (400, 3.5)]
    assert points(metrics.read(), "eval_loss", "tokens") == [(0, 5.0), (280, 3.0)]
    # An older version trained a part of the run: the sum would lack it.
    assert points([{"step": 5, "loss": 4.0}, *metrics.read()], "loss", "tokens") == []


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    first, second = pair(tmp_path)
    with pytest.raises(UserError, match="named twice"):
        read_runs([first, tmp_path / "b" / ".." / "a" / "demo"])
    with pytest.raises(UserError, match="It holds runs: demo"):
        read_runs([first, tmp_path / "b"])
    with pytest.raises(UserError, match="no such folder"):
        read_runs([first, tmp_path / "none"])
    with pytest.raises(UserError, match="this is a file"):
        read_runs([first, second / "run.json"])
    with pytest.raises(UserError, match=f"at most {MAX_RUNS}"):
        read_runs([first] * (MAX_RUNS + 1))
    (second / "metrics.jsonl").write_text('{"step": 1, "loss": null}\n', encoding="utf-8")
    with pytest.raises(UserError, match="none of the 1 lines"):
        read_runs([first, second])


def test_a_run_that_goes_on_is_drawn_too(tmp_path: Path) -> None:
    first, second = pair(tmp_path)
    (second / "run.json").unlink()
    runs = read_runs([first, second])
    text = Page(write_overlay(tmp_path / "page.html", runs).read_text(encoding="utf-8")).text
    assert "Not finished: b/demo" in text
    assert json.loads((first / "run.json").read_text(encoding="utf-8"))["steps"] == runs[0].summary.steps
