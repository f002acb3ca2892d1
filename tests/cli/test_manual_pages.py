"""Every error names a page of the manual that exists."""

import itertools
from pathlib import Path

import pytest

from peftchat.cli.main import cli
from peftchat.cli.manual_pages import COMMAND_PAGES, SECTION_PAGES, manual_page
from peftchat.errors import UserError
from peftchat.recipe import Recipe
from tests.docs.fences import PROJECT
from tests.support.in_process import peftchat_in_process


def test_every_command_and_section_has_a_page_that_exists():
    assert set(COMMAND_PAGES) == set(cli.commands)
    assert set(SECTION_PAGES) == set(Recipe.model_fields)
    for page in itertools.chain(COMMAND_PAGES.values(), SECTION_PAGES.values()):
        assert (PROJECT / "docs" / f"{page}.md").is_file()


@pytest.mark.parametrize(
    ("error", "arguments", "page"),
    [
        (UserError("bad", where="my.yaml:7: chat.template"), ["train", "my.yaml"], "templates"),
        (UserError("bad", where="distributed.nodes"), ["train", "my.yaml"], "clusters"),
        (UserError("bad", where="model.adapter: runs/one"), ["plan", "my.yaml"], "training"),
        (UserError("the table has no row"), ["merge", "runs/one"], "merge"),
        (UserError("the record is empty", where="/data/chat/rows.jsonl:3"), ["train", "my.yaml"], "training"),
        (UserError("the record is empty", where="model.jsonl:3"), ["data", "stats", "model.jsonl"], "data"),
        (UserError("bad", hint="Set `data.truncation: drop`."), ["compare", "my.yaml"], "data"),
        (UserError("no known format (`peftchat data formats` shows them)"), ["train", "my.yaml"], "data"),
        (UserError("bad"), ["-q", "judge", "a", "b"], "evaluate"),
    ],
)
def test_the_page_is_that_of_the_section_or_of_the_command(error: UserError, arguments: list[str], page: str) -> None:
    assert manual_page(error, arguments) == f"docs/{page}.md"


def test_an_error_ends_with_its_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    done = peftchat_in_process(capsys, "merge", tmp_path / "nothing")
    assert done.returncode == 2
    assert done.stderr.count("Error:") == 1 and " ".join(done.stderr.split()).endswith(" See docs/merge.md.")


@pytest.mark.parametrize("arguments", [("merge", "--no-such-option"), ("merge",)])
def test_a_mistake_on_the_command_line_names_the_page_too(
    arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    done = peftchat_in_process(capsys, *arguments)
    assert done.returncode == 2
    assert "See docs/merge.md." in done.stderr
