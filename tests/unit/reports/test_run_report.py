import json
import re
from pathlib import Path
from typing import Any

import pytest

from peftchat.errors import UserError
from peftchat.reports.run_report import write_report
from tests.support.reports import RECIPE, RUN_JSON, Page, run_folder


def page_of(folder: Path) -> Page:
    return Page(write_report(folder).read_text(encoding="utf-8"))


def leaves(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return [leaf for inner in value.values() for leaf in leaves(inner)]
    if isinstance(value, list):
        return [leaf for inner in value for leaf in leaves(inner)]
    return [value]


def test_the_page_needs_nothing_from_elsewhere(tmp_path: Path) -> None:
    report = write_report(run_folder(tmp_path / "demo"))
    html = report.read_text(encoding="utf-8")
    page = Page(html)
    assert report.name == "report.html"
    assert page.unmatched == []
    for tag, attributes in page.tags:
        assert tag not in ("script", "link", "iframe", "object", "embed", "img", "base", "form")
        assert not {"src", "href", "xlink:href", "srcset", "action", "style-src"} & set(attributes)
        assert not any(name.startswith("on") for name in attributes)
    style = re.search(r"<style>(.*?)</style>", html, re.DOTALL)
    assert style is not None
    assert "url(" not in style[1]
    assert "@import" not in style[1]
    assert "prefers-color-scheme: dark" in style[1]


def test_what_a_model_or_a_user_wrote_is_shown_and_never_run(tmp_path: Path) -> None:
    page = page_of(run_folder(tmp_path / "demo<b>"))
    for sample in (*RUN_JSON["samples_before"], *RUN_JSON["samples_after"]):
        assert sample["answer"] in page.text
        assert sample["prompt"] in page.text
    assert {"b", "u", "s", "brief"}.isdisjoint(tag for tag, _ in page.tags)
    assert "<|user|>" in page.text
    assert RUN_JSON["command"] in page.text
    assert RECIPE in page.text


def test_every_value_of_run_json_is_on_the_page(tmp_path: Path) -> None:
    text = page_of(run_folder(tmp_path / "demo")).text
    for leaf in leaves(RUN_JSON):
        assert json.dumps(leaf, ensure_ascii=False) in text
    for words in ("52,310", "32,955", "63 %", "3.1 %", "1.27 GB", "4,886,784", "4 min 18 s", "1.419", "12 %"):
        assert words in text
    assert "Held-out loss fell from 2.930 to 1.419, by 52 %." in text


def test_what_was_left_out_of_the_data_is_on_the_page(tmp_path: Path) -> None:
    note = "train data: left out: 94 conversations in another language"
    folder = run_folder(tmp_path / "demo", {**RUN_JSON, "dropped": {"other_language": 94}, "notes": [note]})
    text = " ".join(page_of(folder).text.split())
    assert text.count(note) == 2  # in words, and in the record
    assert "· conversations in another language94" in text.replace(" 94", "94")


def test_the_token_table_tells_what_moved(tmp_path: Path) -> None:
    html = write_report(run_folder(tmp_path / "demo")).read_text(encoding="utf-8")
    section = html.split("<h2>New tokens</h2>")[1].split("</table>")[0]
    rows = [
        [Page(cell).text for cell in re.findall(r"<td.*?</td>", row, re.DOTALL)] for row in section.split("<tr>")[2:]
    ]
    assert [row[0] for row in rows] == ["<|user|>", "<|end|>", "<s>"]
    assert [row[-1] for row in rows] == ["learned", "did not move", "not in the data"]


def test_plots_hold_each_measured_point(tmp_path: Path) -> None:
    html = write_report(run_folder(tmp_path / "demo")).read_text(encoding="utf-8")
    titles = re.findall(r"<title>([^<]* at step [^<]*)</title>", html)
    assert "held out: 2 at step 0" in titles
    assert "held out: 1 at step 60" in titles
    assert "training: 3 at step 1" in titles
    assert "tokens per second: 260 at step 60" in titles
    assert not any(title.startswith(("gradient norm", "training: nan")) for title in titles)
    assert html.count("<svg") == 3
    assert "nan" not in re.sub(r"<pre>.*?</pre>", "", html.lower().split("<svg", 1)[1], flags=re.DOTALL)


def test_a_run_that_measured_nothing_still_has_a_page(tmp_path: Path) -> None:
    folder = tmp_path / "bare"
    folder.mkdir()
    (folder / "run.json").write_text(json.dumps(dict.fromkeys(RUN_JSON)))
    page = page_of(folder)
    assert page.unmatched == []
    assert page.text.count("not measured") > 15
    assert "No steps were logged." in page.text
    assert "None" not in page.text.split("To run it again")[0]


def test_worse_and_failed_runs_are_called_so(tmp_path: Path) -> None:
    worse = page_of(run_folder(tmp_path / "worse", {"eval_loss_before": 1.0, "eval_loss": 1.5}))
    assert "Held-out loss rose from 1 to 1.500, by 50 %" in worse.text
    failed = page_of(run_folder(tmp_path / "failed", {"eval_loss_before": 1.0, "eval_loss": float("nan")}))
    assert "training failed" in failed.text


def test_an_odd_text_does_not_stop_the_page(tmp_path: Path) -> None:
    samples = [{"prompt": "\ud800", "answer": "\x00\u202e{{ 7 * 7 }} 🙂", "stopped": None}]
    page = page_of(run_folder(tmp_path / "odd", {"samples_after": samples}))
    assert "{{ 7 * 7 }} 🙂" in page.text


@pytest.mark.parametrize("content", [None, "[1]", "{", '"text"'])
def test_a_folder_that_is_no_run_is_refused_and_left_as_it_was(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "run.json").write_text(content)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(UserError):
        write_report(tmp_path)
    assert sorted(tmp_path.iterdir()) == before
