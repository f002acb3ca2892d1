"""Recipes that come with the package: listed, printed, and taken by name where no such file is."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from peftchat import shipped_files
from peftchat.cli.common import RecipeType
from peftchat.cli.main import cli
from peftchat.errors import UserError
from peftchat.recipe import load_recipe
from peftchat.recipe.shipped import find_shipped_recipe, shipped_recipes
from tests.support.cli import PROJECT

NAMES = sorted(path.stem for path in (PROJECT / "recipes").glob("*.yaml"))


def test_every_recipe_is_listed_with_a_sentence() -> None:
    listed = json.loads(CliRunner().invoke(cli, ["recipes", "--json"]).stdout)
    assert [one["name"] for one in listed] == NAMES
    for one in listed:
        assert one["summary"] in " ".join(Path(one["path"]).read_text().replace("#", "").split())
        assert len(one["summary"].split()) > 4


@pytest.mark.parametrize("name", NAMES)
def test_a_printed_recipe_is_a_recipe(name: str, tmp_path: Path) -> None:
    printed = CliRunner().invoke(cli, ["recipes", name]).stdout
    copy = tmp_path / "my.yaml"
    copy.write_text(printed)
    assert (
        load_recipe(copy, to_train=False).recipe == load_recipe(PROJECT / f"recipes/{name}.yaml", to_train=False).recipe
    )


@pytest.mark.parametrize("spelling", ["lora_1gpu", "lora_1gpu.yaml", "recipes/lora_1gpu.yaml", "./lora_1gpu.yaml"])
def test_a_recipe_is_found_where_no_such_file_is(
    spelling: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    path = RecipeType().convert(spelling, None, None)
    assert path.samefile(PROJECT / "recipes/lora_1gpu.yaml")
    assert str(path) in capsys.readouterr().err


def test_a_file_of_the_users_own_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    own = tmp_path / "recipes/lora_1gpu.yaml"
    own.parent.mkdir()
    own.write_text("method: lora\n")
    assert RecipeType().convert("recipes/lora_1gpu.yaml", None, None).samefile(own)
    # A link that leads nowhere is the user's too: it is refused, never replaced.
    own.unlink()
    own.symlink_to("gone.yaml")
    assert RecipeType().convert("recipes/lora_1gpu.yaml", None, None) == Path("recipes/lora_1gpu.yaml")


@pytest.mark.parametrize(
    "path", ["my/lora_1gpu.yaml", "/lora_1gpu.yaml", "lora_1gpu.json", "../recipes/lora_1gpu.yaml", "lora"]
)
def test_other_paths_are_not_replaced(path: str) -> None:
    assert find_shipped_recipe(Path(path)) is None


def test_an_unknown_name_is_one_message() -> None:
    with pytest.raises(UserError, match=r"no recipe `lora_2gpu` came with peftchat\. Give one of: demo_cpu, "):
        CliRunner().invoke(cli, ["recipes", "lora_2gpu"], catch_exceptions=False, standalone_mode=False)


def test_an_installed_package_has_them_in_share(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shipped_files, "_PROJECT", tmp_path / "lib")
    monkeypatch.setattr("sysconfig.get_path", lambda name, scheme: str(tmp_path / scheme / name))
    assert shipped_recipes() == []
    with pytest.raises(UserError, match=r"this installation has no recipes"):
        CliRunner().invoke(cli, ["recipes"], catch_exceptions=False, standalone_mode=False)
    import sysconfig

    installed = tmp_path / sysconfig.get_default_scheme() / "data/share/peftchat/recipes"
    installed.mkdir(parents=True)
    (installed / "one.yaml").write_text("# One sentence here.\n")
    assert [(one.name, one.summary) for one in shipped_recipes()] == [("one", "One sentence here")]
