"""Paths as users write them."""

import pwd
from pathlib import Path

import pytest

from peftchat.errors import UserError
from peftchat.paths import check_name, escape_path, expand_path


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("RUNS", "/scratch/runs")
    monkeypatch.setenv("TILDE", "~/models")
    monkeypatch.setenv("EMPTY", "")
    monkeypatch.delenv("ABSENT", raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("text", "expanded"),
    [
        ("~/x", "/home/me/x"),
        ("~", "/home/me"),
        ("~root/x", pwd.getpwnam("root").pw_dir + "/x"),
        ("$RUNS/x", "/scratch/runs/x"),
        ("a/${RUNS}x", "a//scratch/runsx"),
        ("$TILDE/x", "/home/me/models/x"),
        ("$$HOME", "$HOME"),
        ("costs 5$", "costs 5$"),
        ("$5", "$5"),
        ("./~/x", "./~/x"),
        ("runs/a~1", "runs/a~1"),
        ("org/name", "org/name"),
    ],
)
def test_expanded(text: str, expanded: str) -> None:
    assert expand_path(text, "key") == expanded


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("$ABSENT/x", "ABSENT in `$ABSENT/x` is not set"),
        ("${ABSENT}/x", "ABSENT"),
        ("$EMPTY/x", "EMPTY in `$EMPTY/x` is empty"),
        ("${HOME:-/tmp}/x", "not of the form"),
        ("${HOME", "not of the form"),
        ("${}", "not of the form"),
        ("~no-such-user/x", "no user `no-such-user`"),
        ("", "empty"),
        ("a\0b", "NUL"),
        ("a" * 256, "256 bytes"),
        ("é" * 128, "256 bytes"),
        ("a/" * 2100, "longer than 4,095"),
    ],
)
def test_refused(text: str, says: str) -> None:
    with pytest.raises(UserError) as error:
        expand_path(text, "r.yaml:3: output_dir")
    assert says in str(error.value)
    assert str(error.value).startswith("r.yaml:3: output_dir: ")


def test_a_path_that_exists_is_taken_as_written(place: Path) -> None:
    (place / "a$ABSENT").mkdir()
    assert expand_path("a$ABSENT", "key") == "a$ABSENT"
    # A folder named `~` is what earlier versions made of a quoted `~`.
    (place / "~").mkdir()
    assert expand_path("~", "key") == "/home/me"


@pytest.mark.parametrize("text", ["/a/$HOME/b", "/a/$$/b", "/a/${X}", "/plain"])
def test_an_escaped_path_means_itself_everywhere(text: str) -> None:
    assert expand_path(escape_path(text), "key") == text


def test_a_name_that_just_fits() -> None:
    check_name("a" * 255, "key")
