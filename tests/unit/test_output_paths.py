"""Where a command may write: what is an input, by whatever name, is never an output."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from peftchat.errors import UserError
from peftchat.output_paths import InputPath, check_output, check_output_file, free_name, replace_folder


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a base model, data, and a run with a checkpoint."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for folder in ("home", "work/models/base", "work/data", "work/run/checkpoints/checkpoint-4", "work/other"):
        (tmp_path / folder).mkdir(parents=True)
    work = tmp_path / "work"
    (work / "models" / "base" / "model.safetensors").write_text("weights")
    (work / "data" / "train.jsonl").write_text("{}")
    (work / "run" / "recipe.yaml").write_text("method: lora")
    (work / "run" / "checkpoints" / "checkpoint-4" / "trainer_state.json").write_text("{}")
    monkeypatch.chdir(work)
    return work


INPUTS = (
    InputPath(Path("models/base"), "the base model"),
    InputPath(Path("data"), "the data", is_read_recursively=True),
    InputPath(Path("data/train.jsonl"), "the data file"),
    InputPath(Path("hub/name"), "a hub model"),
)


def link(name: str, target: str) -> Callable[[], None]:
    return lambda: Path(name).symlink_to(target)


def nothing() -> None:
    """Change nothing."""


@pytest.mark.parametrize(
    ("output", "says", "before"),
    [
        ("models/base", "is the base model", nothing),
        ("models/base/", "is the base model", nothing),
        ("./data/../models/base", "is the base model", nothing),
        ("{work}/models/base", "is the base model", nothing),
        ("alias", "is the base model", link("alias", "models/base")),
        ("alias/base", "is the base model", link("alias", "models")),
        ("models", "holds the base model", nothing),
        ("alias", "holds the base model", link("alias", "models")),
        ("data/out", "lies in the data", nothing),
        ("alias/out", "lies in the data", link("alias", "data")),
        ("data/train.jsonl/out", "is a file, not a folder", nothing),
        ("twin.jsonl", "is the data file", lambda: os.link("data/train.jsonl", "twin.jsonl")),
        (".", "is the working folder", nothing),
        ("..", "holds the working folder", nothing),
        ("{work}", "is the working folder", nothing),
        ("/", "is the root", nothing),
        ("{home}", "is your home folder", nothing),
        ("run/checkpoints", "is a checkpoint", nothing),
        ("run/checkpoints/new", "lies in a checkpoint", nothing),
        ("run/checkpoints/checkpoint-4", "is a checkpoint", nothing),
        ("run/checkpoints/checkpoint-4/x", "lies in a checkpoint", nothing),
        ("nowhere", "leads nowhere", link("nowhere", "absent")),
        ("nowhere/out", "leads nowhere", link("nowhere", "absent")),
        ("circle", "leads nowhere", link("circle", "circle")),
        ("a" * 300, "300 bytes", nothing),
        ("ü" * 130, "260 bytes", nothing),
        ("a" * 240, "240 bytes", nothing),
        ("/".join(["a" * 200] * 25), "5,024 bytes", nothing),
        ("/".join(["a" * 200] * 20), "no room", nothing),
        ("line\nbreak", "line break", nothing),
        ("trailing ", "blank", nothing),
        (" leading/x", "blank", nothing),
        ("nul\0", "NUL", nothing),
        ("s3://bucket/run", "is an address (`s3:`)", nothing),
        ("gs:/bucket/run", "is an address (`gs:`)", nothing),
    ],
)
def test_refused(place: Path, output: str, says: str, before: Callable[[], object]) -> None:
    before()
    output = output.replace("{work}", str(place)).replace("{home}", os.environ["HOME"])
    contents = sorted(place.rglob("*"))
    with pytest.raises(UserError) as error:
        check_output(Path(output), INPUTS, "-o")
    assert says in str(error.value)
    assert str(error.value).startswith("-o: ")
    assert sorted(place.rglob("*")) == contents


@pytest.mark.parametrize(
    "output",
    ["new", "a/b/c", "other", "models/merged", "models/base/merged", "run/merged", "with blank", "Ünïcode/日本"],
)
def test_allowed(place: Path, output: str) -> None:
    check_output(Path(output), INPUTS, "-o")


def test_an_input_that_is_a_link_is_protected_where_it_stands_and_where_it_leads(place: Path) -> None:
    Path("links").mkdir()
    Path("links/data.jsonl").symlink_to(place / "data" / "train.jsonl")
    inputs = [InputPath(Path("links/data.jsonl"), "the data")]
    for output, says in (("links", "holds the data"), ("data", "holds the data"), ("data/train.jsonl", "is the data")):
        with pytest.raises(UserError, match=says):
            check_output(Path(output), inputs, "-o")


def test_a_run_goes_on_from_within_its_folder(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place / "run")
    with pytest.raises(UserError, match="working folder"):
        check_output(Path(), (), "output_dir")
    check_output(Path(), (), "output_dir", continues=True)


@pytest.mark.parametrize("output", ["/dev/null", "other", "data/train.jsonl", "notes.html"])
def test_a_file_of_another_kind_is_never_replaced(place: Path, output: str) -> None:
    Path("notes.html").write_text("mine")
    with pytest.raises(UserError):
        check_output_file(
            Path(output), INPUTS, "--html", is_ours=lambda path: path.read_bytes() == b"ours", kind="a page"
        )
    assert Path("/dev/null").is_char_device()
    assert Path("notes.html").read_text() == "mine"


def test_a_link_to_a_file_of_that_kind_is_followed(place: Path) -> None:
    Path("other/page.html").write_text("ours")
    Path("page.html").symlink_to("other/page.html")
    found = check_output_file(Path("page.html"), (), "--html", is_ours=lambda path: True, kind="a page")
    assert found == place / "other" / "page.html"


def test_a_folder_is_replaced_whole_or_stays(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("new", "out", "out.old"):
        Path(name).mkdir()
        (Path(name) / "file").write_text(name)
    rename = Path.rename

    def fail(path: Path, target: Path) -> Path:
        if path.name == "new":
            raise OSError(28, "No space left on device")
        return rename(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", fail)
        with pytest.raises(OSError, match="No space"):
            replace_folder(Path("new"), Path("out"))
    assert Path("out/file").read_text() == "out"
    replace_folder(Path("new"), Path("out"))
    assert Path("out/file").read_text() == "new"
    # The user's own folder of that name is untouched.
    assert Path("out.old/file").read_text() == "out.old"
    assert free_name(Path("out"), "old") == Path("out.old.2")
