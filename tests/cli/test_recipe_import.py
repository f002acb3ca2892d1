"""`peftchat recipe import` as a program: what it prints and writes, its status, and what it never overwrites."""

import json
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from tests.support.in_process import peftchat_in_process

GOOD = (
    "base_model: org/base\nadapter: lora\nlora_r: 8\nlora_alpha: 16\ndatasets: [{path: a.jsonl, type: chat_template}]\n"
)


def source(folder: Path, text: str = GOOD) -> Path:
    path = folder / "axolotl.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_a_recipe_is_written_once_and_says_what_is_still_to_give(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "recipe.yaml"
    done = peftchat_in_process(capsys, "recipe", "import", source(tmp_path), "-o", out)
    assert done.returncode == 0, done.stderr
    assert "Give it, or look at it: data.train.0.path: a.jsonl is not here." in done.stderr
    assert YAML(typ="safe").load(out.read_text(encoding="utf-8"))["adapter"]["r"] == 8
    before = out.read_text(encoding="utf-8")
    again = peftchat_in_process(capsys, "recipe", "import", source(tmp_path), "-o", out)
    assert (again.returncode, again.stdout) == (2, ""), "nothing is read before the output is known to be free"
    assert out.read_text(encoding="utf-8") == before
    assert peftchat_in_process(capsys, "recipe", "import", source(tmp_path), "-o", out, "--force").returncode == 0


def test_a_refused_line_writes_nothing_unless_it_is_left_out_knowingly(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, path = tmp_path / "recipe.yaml", source(tmp_path, f"{GOOD}neftune_noise_alpha: 5\n")
    done = peftchat_in_process(capsys, "recipe", "import", path, "-o", out)
    assert done.returncode == 1
    assert not out.exists()
    assert "--partial" in done.stderr
    assert peftchat_in_process(capsys, "recipe", "import", path, "-o", out, "--partial").returncode == 0
    assert "REFUSED" in out.read_text(encoding="utf-8")


def test_another_kind_of_training_is_never_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, path = tmp_path / "recipe.yaml", source(tmp_path, f"{GOOD}rl: grpo\n")
    done = peftchat_in_process(capsys, "recipe", "import", path, "-o", out, "--partial")
    assert done.returncode == 1
    assert f"{path}:6: rl: no recipe can do what this file asks for" in done.stderr
    assert not out.exists()


def test_json_is_one_object_and_check_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "recipe.yaml"
    done = peftchat_in_process(capsys, "recipe", "import", source(tmp_path), "-o", out, "--check", "--json")
    told = json.loads(done.stdout)
    assert (told["tool"], told["written"], out.exists()) == ("axolotl", None, False)
    assert sum(told["counts"].values()) == len(told["lines"]) == 6
    assert YAML(typ="safe").load(told["recipe"])["model"]["name"] == "org/base"


def test_the_source_is_never_the_output(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = source(tmp_path)
    done = peftchat_in_process(capsys, "recipe", "import", path, "-o", path, "--force")
    assert done.returncode == 2
    assert path.read_text(encoding="utf-8") == GOOD
