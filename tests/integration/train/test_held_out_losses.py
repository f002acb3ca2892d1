"""Held-out losses by conversation: those of stock transformers, and the same however an evaluation is cut up."""

import json
from pathlib import Path
from typing import Any

import pytest

from peftchat.recipe import load_recipe
from peftchat.training.context import TrainOptions
from peftchat.training.train import train
from tests.support.data import read_json, read_json_lines, write_small_talk
from tests.support.launch import peftchat_in_processes
from tests.support.models import small_model
from tests.support.recipes import write_training_recipe
from tests.support.stock import stock_loss, stock_run

TURNS = (("Name a river.", "The Loire runs to the sea."), ("And a hill?", "Ben Nevis is one."), ("Bye", "So long!"))


def write_turns(path: Path, counts: tuple[int, ...]) -> Path:
    """Write conversations of these numbers of turns, each different from the others."""
    lines = []
    for number, count in enumerate(counts):
        messages = []
        for asked, answer in TURNS[:count]:
            messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": f"{number}: {answer}"}]
        lines.append(json.dumps({"messages": messages}) + "\n")
    path.write_text("".join(lines))
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A training file and two held-out ones."""
    folder = tmp_path_factory.mktemp("data")
    return [
        write_small_talk(folder / "train.jsonl", 8),
        write_turns(folder / "one.jsonl", (1, 3, 2, 1)),
        write_turns(folder / "two.jsonl", (2, 1, 3)),
    ]


def recipe(run: Path, data: list[Path], *, packing: bool = True, batch: int = 1, **sections: Any) -> Path:
    training = {
        "max_steps": 2,
        "per_device_eval_batch_size": batch,
        "eval_on_start": True,
        **sections.pop("training", {}),
    }
    files = {"eval": [{"path": str(path)} for path in data[1:]], "packing": packing}
    return write_training_recipe(
        run.parent / f"{run.name}.yaml", small_model(tied=True), data[0], data[1], run,
        data=files, training=training, **sections,
    )  # fmt: skip


def check_sums(run: Path) -> list[dict[str, Any]]:
    """Check that conversations, their parts and every way to group them add up to `eval_loss`; return the lines."""
    lines, facts = read_json_lines(run / "eval_losses.jsonl"), read_json(run / "run.json")
    tokens = sum(line["tokens"] for line in lines)
    for after, key in (("loss", "eval_loss"), ("loss_before", "eval_loss_before")):
        assert sum(line[after] for line in lines) / tokens == pytest.approx(facts[key], rel=1e-6)
        assert all(sum(part[after] for part in line["parts"]) == pytest.approx(line[after]) for line in lines)
    for groups in facts["eval_by"].values():
        assert sum(group["tokens"] for group in groups.values()) == tokens
        for when, key in (("after", "eval_loss"), ("before", "eval_loss_before")):
            total = sum(group["tokens"] * group[when] for group in groups.values())
            assert total / tokens == pytest.approx(facts[key], rel=1e-6)
    return lines


def test_each_conversation_has_the_loss_of_stock_transformers(tmp_path: Path, data: list[Path]) -> None:
    run = tmp_path / "run"
    train(load_recipe(recipe(run, data)))
    lines = {line["source"]: line for line in check_sums(run)}
    assert len(lines) == 7
    model, tokenizer = stock_run(run, small_model(tied=True), "lora")
    for path in data[1:]:
        for number, text in enumerate(path.read_text().splitlines(), start=1):
            (tmp_path / "one-line.jsonl").write_text(text)
            line = lines[f"{path}:{number}"]
            assert line["mean"] == pytest.approx(stock_loss(model, tokenizer, tmp_path / "one-line.jsonl"), rel=1e-5)
            turns = len(json.loads(text)["messages"]) // 2
            assert {part["turn"] for part in line["parts"]} == set(range(1, turns + 1))
            assert {part["role"] for part in line["parts"]} == {"assistant"}
    groups = read_json(run / "run.json")["eval_by"]
    assert {name: one["conversations"] for name, one in groups["source"].items()} == {"one.jsonl": 4, "two.jsonl": 3}
    assert {name: one["conversations"] for name, one in groups["turn"].items()} == {"1": 7, "2": 4, "3": 2}
    assert list(groups["role"]) == ["assistant"]


@pytest.mark.parametrize(("packing", "batch"), [(False, 1), (False, 3), (True, 8)])
def test_batches_and_packs_do_not_matter(packing: bool, batch: int, tmp_path: Path, data: list[Path]) -> None:
    """Before training the models are the same, so each conversation's loss is too."""
    train(load_recipe(recipe(tmp_path / "run", data, packing=packing, batch=batch)))
    train(load_recipe(recipe(tmp_path / "other", data)))
    lines, others = check_sums(tmp_path / "run"), check_sums(tmp_path / "other")
    assert [(line["source"], line["tokens"]) for line in lines] == [(one["source"], one["tokens"]) for one in others]
    for line, other in zip(lines, others, strict=True):
        assert line["loss_before"] == pytest.approx(other["loss_before"], rel=1e-5)


@pytest.mark.distributed
def test_two_processes_see_each_conversation_once(tmp_path: Path, data: list[Path]) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    train(load_recipe(recipe(one, data, packing=False)))
    settings = {"distributed": {"strategy": "ddp", "processes": 2}}
    done = peftchat_in_processes(2, "train", recipe(two, data, packing=False, **settings))
    assert done.returncode == 0, done.stderr
    first, second = check_sums(one), check_sums(two)
    assert [(line["source"], line["tokens"]) for line in first] == [(line["source"], line["tokens"]) for line in second]
    for line, other in zip(first, second, strict=True):
        assert line["loss_before"] == pytest.approx(other["loss_before"], rel=1e-5)


def test_the_kept_weights_count_and_a_resume_keeps_what_was_before(tmp_path: Path, data: list[Path]) -> None:
    """A resumed run does not evaluate before its first step, and here not after its last one either."""
    settings = {
        "max_steps": 4, "learning_rate": 0.1, "eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps",
        "save_steps": 4, "load_best_model_at_end": True, "save_total_limit": 9,
    }  # fmt: skip
    run = tmp_path / "run"
    train(load_recipe(recipe(run, data, training=settings)))
    lines = check_sums(run)
    (run / "run.json").unlink()
    train(load_recipe(recipe(run, data, training=settings)), TrainOptions(resume=True))
    assert check_sums(run) == lines
