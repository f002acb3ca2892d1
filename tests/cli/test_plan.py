"""`peftchat plan` as a program: what it prints, what it refuses, and that it needs no weights."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from peftchat.errors import UserError
from peftchat.planning.hardware import find_hardware, gpu_catalog, system_memory
from tests.support.cli import peftchat
from tests.support.in_process import peftchat_in_process
from tests.support.machine import needs_bfloat16_kernels
from tests.support.planning import recipe_dict

GIB = 2**30


def written(folder: Path, name: str, method: str, **training: Any) -> Path:
    path = folder / "recipe.json"
    path.write_text(json.dumps(recipe_dict(name, folder, method, **training)), encoding="utf-8")
    return path


def test_json_is_one_object_about_a_model_that_has_a_config_only(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    done = peftchat_in_process(
        capsys, "plan", written(tmp_path, "small-gpt2", "full"), "--gpu", "A100-80GB", "--gpus", "2", "--json"
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["fits"] is True
    assert told["settings"]["strategy"] == "zero3"
    assert sum(told["memory"]["parts"].values()) == told["memory"]["total"] <= told["device_memory"]
    ways = {
        (cell["settings"]["method"], cell["settings"]["bits"], cell["settings"]["strategy"]) for cell in told["grid"]
    }
    assert ways == {
        (method, bits, strategy)
        for method, bits in (("full", None), ("lora", None), ("qlora", 8), ("qlora", 4))
        for strategy in ("ddp", "zero2", "zero3")
        if (bits, strategy) != (8, "zero3")
    }


def test_what_does_not_fit_says_so_first_and_names_the_flags(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = written(tmp_path, "llama-3.1-8b", "lora")
    arguments = ("--gpu", "3060", "--no-alternatives", "--set", "data.max_length=1024")
    done = peftchat_in_process(capsys, "plan", recipe, *arguments)
    assert done.returncode == 0, done.stderr
    first = re.split(r"\nmodel ", done.stdout)[0]
    assert first.startswith("It does not fit")
    assert "--set method=qlora" in " ".join(first.split())
    assert "The data was not read" in done.stdout


def test_an_unknown_card_gets_the_nearest_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    done = peftchat_in_process(capsys, "plan", written(tmp_path, "small", "lora"), "--gpu", "a100-88gb")
    assert done.returncode == 2
    assert "Did you mean `a100-80gb`?" in " ".join(done.stderr.split())
    assert not done.stdout


def test_a_folder_without_a_config_is_the_users_mistake(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = written(tmp_path, "small", "lora")
    (tmp_path / "small" / "config.json").unlink()
    done = peftchat_in_process(capsys, "plan", recipe, "--gpu", "cpu")
    assert done.returncode == 2
    assert "config.json" in done.stderr
    assert "Traceback" not in done.stderr


def test_every_card_is_found_by_its_name_however_it_is_written() -> None:
    for name, card in gpu_catalog().items():
        assert find_hardware(name.upper().replace("-", " "), 2).label == card.label
        assert 10 * GIB < card.memory < 300 * GIB
        assert card.source
    assert find_hardware("NVIDIA GeForce RTX 4090", 1).name == "rtx4090"
    with pytest.raises(UserError, match="not in the catalog"):
        find_hardware("voodoo", None)


def test_the_machine_has_no_more_memory_than_it_has() -> None:
    import psutil

    assert 0 < system_memory() <= psutil.virtual_memory().total
    assert find_hardware("cpu", 4).memory == system_memory() // 4


@needs_bfloat16_kernels
@pytest.mark.real
def test_a_probe_is_within_a_sixth_of_the_prediction(tmp_path: Path, demo_model: Path) -> None:
    recipe = recipe_dict("small", tmp_path, "lora", per_device_train_batch_size=1)
    recipe["model"]["name"] = str(demo_model)
    recipe["data"] = {"train": [{"path": str(tmp_path / "rows.jsonl")}], "max_length": 256}
    row = {"messages": [{"role": "user", "content": "Hello."}, {"role": "assistant", "content": "Hello to you. " * 50}]}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps(recipe), encoding="utf-8")
    done = peftchat("plan", path, "--gpu", "cpu", "--no-alternatives", "--probe", "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["memory"]["total"] == pytest.approx(told["probe"]["peak_bytes"], rel=0.17)
