"""Questions that are answered at each evaluation: kept, shown, and without any effect on training."""

import json
from pathlib import Path
from typing import Any

from peftchat.recipe import load_recipe
from peftchat.training.questions import read_questions
from tests.support.cli import peftchat
from tests.support.data import write_small_talk
from tests.support.models import small_model
from tests.support.recipes import write_training_recipe

QUESTIONS = ["Which of these is a cat?", "And which is not?"]


def train(folder: Path, name: str, **sections: Any) -> Path:
    data = write_small_talk(folder / "talk.jsonl")
    settings = {"training": {"eval_strategy": "steps", "eval_steps": 2}, "adapter": {"dropout": 0.3}, **sections}
    recipe = write_training_recipe(folder / f"{name}.yaml", small_model(), data, data, folder / name, **settings)
    done = peftchat("train", recipe)
    assert done.returncode == 0, done.stderr
    return folder / name


def test_answers_are_kept_and_change_nothing(tmp_path: Path) -> None:
    without = train(tmp_path, "without")
    run = train(tmp_path, "with", evaluation={"questions": QUESTIONS, "max_new_tokens": 8})
    name = "adapter_model.safetensors"
    assert (run / name).read_bytes() == (without / name).read_bytes()
    lines = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    steps = {line["step"] for line in lines}
    assert {2, 4} <= steps
    assert [line["prompt"] for line in lines] == QUESTIONS * len(steps)
    logged = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    shares = {line["step"]: line["eval_answers_ended"] for line in logged if "eval_answers_ended" in line}
    assert shares == {
        step: sum(line["stopped"] for line in lines if line["step"] == step) / len(QUESTIONS) for step in steps
    }
    summary = json.loads((run / "run.json").read_text())
    assert [one["prompt"] for one in summary["samples_after"]] == QUESTIONS
    last = [line["answer"] for line in lines if line["step"] == 4]
    assert [one["answer"] for one in summary["samples_after"]] == last
    assert "Answers while it was trained" in (run / "report.html").read_text()
    assert not (without / "samples.jsonl").exists()


def test_questions_of_a_file(tmp_path: Path) -> None:
    data = write_small_talk(tmp_path / "talk.jsonl")
    texts = {"asked.txt": "one\n\n two \n", "asked.jsonl": '{"prompt": "one"}\n"two"\n'}
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
        recipe = write_training_recipe(
            tmp_path / "r.yaml", small_model(), data, None, tmp_path / "run", evaluation={"questions": name}
        )
        assert read_questions(load_recipe(recipe)) == ("one", "two")
    (tmp_path / "asked.jsonl").write_text('{"text": 1}\n')
    for name, said in (("asked.jsonl", "asked.jsonl:1: the line holds no question"), ("none.txt", "cannot be read")):
        write_training_recipe(
            tmp_path / "r.yaml", small_model(), data, None, tmp_path / "run", evaluation={"questions": name}
        )
        done = peftchat("train", tmp_path / "r.yaml")
        assert done.returncode == 2
        assert said in done.stderr
        assert not (tmp_path / "run").exists()
