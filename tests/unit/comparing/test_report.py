"""What people and programs are shown of a comparison."""

import html.parser
import io
import json
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from peftchat.comparing.compare_plan import CompareOptions, plan_comparison
from peftchat.comparing.compare_progress import CompareProgress
from peftchat.comparing.compare_report import print_comparison, write_comparison_files
from peftchat.comparing.comparison_folder import ComparisonFolder
from peftchat.comparing.outcomes import CandidateResult, Evaluation, RunResult
from peftchat.comparing.results import ComparisonResult, ComparisonSummary
from peftchat.recipe import load_recipe
from peftchat.reports.svg import Mark, interval_plot
from peftchat.runs.run_summary import SampleAnswer
from tests.support.comparing import made, write_rows_and_recipe

HOSTILE = '<script>alert(1)</script> & "quotes" \udc80'


@pytest.fixture
def result(tmp_path: Path) -> ComparisonResult:
    """Twelve candidates, the last of which failed."""
    path = write_rows_and_recipe(tmp_path, "data: {train: [{path: rows.jsonl}], eval_fraction: 0.25}\n")
    names = ["lora", "rslora", "dora", "loraplus", "pissa", "olora", "ia3", "vera", "loha", "lokr", "full", "qlora"]
    plan = plan_comparison(CompareOptions(path, names, learning_rates=[3e-4, 1e-3, 3e-3]))
    outcomes = []
    for place, candidate in enumerate(plan.candidates):
        outcome = made(candidate.name, [2 + place / 10, 2.01 + place / 10, 1.99 + place / 10])
        tried = [replace(record, curve=((0, 4.0), (5, 3.0), (10, record.loss))) for record in outcome.trials]
        measured = Evaluation(
            general_loss=3.0, merge="same", merge_message="equal", answers=(SampleAnswer(HOSTILE, HOSTILE, True),)
        )
        outcomes.append(replace(outcome, candidate=candidate, trials=tried, evaluation=measured))
    failed = RunResult(outcomes[-1].trials[0].job, failure=HOSTILE)
    outcomes[-1] = CandidateResult(outcomes[-1].candidate, [failed])
    return ComparisonResult.of(plan, outcomes, 3.1)


class _Texts(html.parser.HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.lines: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        told = dict(attrs)
        if tag == "polyline" and "points" in told and "line-" in (told["class"] or ""):
            self.lines.append(told["class"] or "")

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_escapes_what_models_say_and_draws_every_candidate(result: ComparisonResult, tmp_path: Path) -> None:
    folder = ComparisonFolder(tmp_path / "out")
    folder.path.mkdir()
    write_comparison_files(result, folder)
    page = _Texts()
    page.feed(folder.report.read_text(encoding="utf-8"))
    assert not {"script", "link", "img", "iframe"} & set(page.tags)
    assert "<script>alert(1)</script>" in page.text
    # Eleven candidates in the legend and in two plots; the eleventh begins the colors again, dashed.
    assert len(page.lines) == 3 * 11
    assert len(set(page.lines)) == 11 and "line-0 dashed" in page.lines
    assert f"failed: {HOSTILE[:8]}" in page.text


def test_json_has_every_number_of_the_table(result: ComparisonResult, tmp_path: Path) -> None:
    said = json.loads(json.dumps(ComparisonSummary.of(result, ComparisonFolder(tmp_path)).model_dump()))
    assert [candidate["name"] for candidate in said["candidates"]][:2] == ["lora", "rslora"]
    assert said["candidates"][0]["loss"]["mean"] == pytest.approx(2.0)
    assert said["candidates"][1]["loss_gap"]["mean"] == pytest.approx(0.1)
    assert said["candidates"][-1]["loss"] is None
    assert said["recommendation"]["name"] == "lora"


def test_the_recommended_recipe_loads_and_says_why(result: ComparisonResult, tmp_path: Path) -> None:
    folder = ComparisonFolder(tmp_path / "out")
    folder.path.mkdir()
    write_comparison_files(result, folder)
    text = folder.recommended.read_text(encoding="utf-8")
    recipe = load_recipe(folder.recommended).recipe
    assert recipe.method == "lora" and recipe.training.learning_rate == 1e-3
    assert recipe.data.eval_fraction == 0.25
    assert result.recommendation is not None
    assert all(f"# {reason}" in text for reason in result.recommendation.reasons)


@pytest.mark.parametrize("width", [60, 80, 120, 200])
def test_the_table_keeps_within_the_terminal(result: ComparisonResult, width: int) -> None:
    file = io.StringIO()
    print_comparison(result, Console(file=file, width=width, force_terminal=True, color_system=None))
    table = file.getvalue().split("Recommended: ")[0].splitlines()
    assert max(len(line) for line in table) <= width
    for name in ("lora", "full", "qlora", "failed", "held-out loss"):
        assert any(name in line for line in table)


def test_a_pipe_gets_the_whole_table(result: ComparisonResult) -> None:
    file = io.StringIO()
    print_comparison(result, Console(file=file, width=80))
    assert "…" not in file.getvalue() and "on disk" in file.getvalue()


def test_progress_is_one_line_per_run_and_counts_only_what_was_trained_here() -> None:
    file = io.StringIO()
    good = made("lora", [2.5]).trials[0]
    with CompareProgress(3, Console(file=file, width=80)) as overview:
        overview.finish_run(good, kept=True)
        overview.finish_run(good, kept=False)
        overview.finish_run(replace(good, failure="out of luck"), kept=False)
    first, second, third = file.getvalue().splitlines()
    assert first.startswith("1/3") and "already finished" in first and "left" not in first
    assert second.startswith("2/3") and "2.500" in second and second.endswith("left")
    assert third.startswith("3/3") and third.endswith("failed: out of luck")


def test_progress_on_a_terminal_shows_where_the_run_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    file = io.StringIO()
    job = made("lora", [2.5]).trials[0].job
    (tmp_path / "metrics.jsonl").write_text('{"step": 7, "loss": 3.25}\n{"step": 7, "eval_loss": 3.0}\n')
    with CompareProgress(3, Console(file=file, width=100, force_terminal=True, legacy_windows=False)) as overview:
        overview.show_run(job, tmp_path)
    assert "run 1 of 3" in file.getvalue()
    assert "lora, lr 1e-3, seed 0" in file.getvalue() and "step 7, loss 3.250" in file.getvalue()


finite = st.floats(-1e6, 1e6)


@given(values=st.lists(st.tuples(finite, st.none() | st.floats(0, 1e9)), min_size=1, max_size=12))
def test_any_intervals_give_well_formed_svg_inside_its_frame(values: list[tuple[float, float | None]]) -> None:
    marks = [Mark("a<b", value, margin, [value, value], 0, "-28.6 ± 44.8 points & more") for value, margin in values]
    svg = ElementTree.fromstring(interval_plot(marks, label='"x"', x_name="loss"))
    _, _, width, height = map(float, svg.attrib["viewBox"].split())
    dots = [(float(dot.attrib["cx"]), float(dot.attrib["cy"])) for dot in svg.iter("circle") if dot.attrib["r"] == "5"]
    assert len(dots) == len(values)
    assert all(0 <= x <= width and 0 <= y <= height for x, y in dots)
    # Digits and most letters are at most 6 pixels wide on the page.
    texts = [one for one in svg.iter("text") if one.text and one.text.endswith("more")]
    assert len(texts) == len(values) and all(float(one.attrib["x"]) + 6 * len(one.text or "") <= width for one in texts)
    in_order = [x for _, (x, _) in sorted(zip([value for value, _ in values], dots, strict=True))]
    assert in_order == sorted(in_order)
