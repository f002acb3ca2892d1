"""What the shell is told to complete, in the form that click's script for bash reads."""

from pathlib import Path

import pytest
from click.shell_completion import BashComplete

from peftchat.cli.main import cli
from peftchat.recipe.shipped import shipped_recipes
from peftchat.variants import VARIANTS


@pytest.fixture
def offered(monkeypatch, tmp_path):
    """Return a function: what bash is offered for the last of some words, in a folder with one recipe."""
    monkeypatch.chdir(tmp_path)
    Path("recipe.yaml").touch()

    def offer(*words: str) -> list[str]:
        monkeypatch.setenv("COMP_WORDS", " ".join(("peftchat", *words)))
        monkeypatch.setenv("COMP_CWORD", str(len(words)))
        return BashComplete(cli, {}, "peftchat", "_PEFTCHAT_COMPLETE").complete().splitlines()

    return offer


@pytest.mark.parametrize("words", [("train", "rec"), ("merge", "rec"), ("chat", "rec"), ("merge", "run", "-o", "rec")])
def test_the_shell_completes_files(offered, words):
    assert offered(*words) == ["file,rec"]


@pytest.mark.parametrize("beginning", ["", "$HOME/re", "~no-such-user/re", "no/such/folder/re", "zzz"])
def test_a_word_that_is_no_recipe_is_left_to_the_shell(offered, beginning):
    assert offered("train", beginning) == [f"file,{beginning}"]


def test_recipes_of_the_package_are_offered_where_no_file_begins_so(offered):
    recipe = shipped_recipes()[0]
    assert f"plain,{recipe.name}" in offered("train", recipe.name[:2])
    assert f"plain,recipes/{recipe.path.name}" in offered("plan", "recipes/")
    Path(recipe.name).touch()
    assert offered("train", recipe.name) == [f"file,{recipe.name}"]
    assert offered("recipes", recipe.name) == [f"plain,{recipe.name}"]


def test_variants_are_offered_in_a_list(offered):
    assert offered("compare", "recipe.yaml", "--variants", "lora,do") == [
        f"plain,lora,{name}" for name in VARIANTS if name.startswith("do")
    ]


def test_variants_are_offered(offered):
    assert offered("variants", "do") == [f"plain,{name}" for name in VARIANTS if name.startswith("do")]
