"""Questions that are answered at each evaluation, without any effect on training; the losses of a finished run."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from peftchat.chat_template.chat_format import make_format
from peftchat.errors import UserError
from peftchat.evaluating.run_evaluation import EvaluateOptions, evaluate_data
from peftchat.models.added_tokens import resize_embeddings
from peftchat.recipe import load_recipe
from peftchat.runs.eval_losses import read_eval_losses
from peftchat.training.questions import sample_answers
from peftchat.training.recipe_questions import read_questions
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


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("run"), "with", evaluation={"questions": QUESTIONS, "max_new_tokens": 8})


def test_answers_are_kept_and_change_nothing(run: Path, tmp_path: Path) -> None:
    without = train(tmp_path, "without")
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


def test_losses_of_data_are_those_of_training(run: Path, tmp_path: Path) -> None:
    """The run and its base, loaded again, have the losses that the run wrote after and before training."""
    options = EvaluateOptions(output=tmp_path / "out")
    found, folder = evaluate_data(str(run), run.parent / "talk.jsonl", options)
    written = read_eval_losses(run / "eval_losses.jsonl")
    ours, base = (read_eval_losses(folder / f"losses-{number}.jsonl") for number in (1, 2))
    assert [one.source for one in ours] == [one.source for one in base] == [one.source for one in written]
    assert [one.loss for one in ours] == pytest.approx([one.loss for one in written], rel=1e-5)
    assert [one.loss for one in base] == pytest.approx([one.loss_before for one in written], rel=1e-5)
    summary = json.loads((run / "run.json").read_text())
    rows = {(row.by, row.group): row for row in found.rows}
    assert rows["all", ""].losses == pytest.approx((summary["eval_loss"], summary["eval_loss_before"]), rel=1e-5)
    for by, groups in summary["eval_by"].items():
        for group, values in groups.items() if len(groups) > 1 else ():
            assert rows[by, group].tokens == values["tokens"]
            assert rows[by, group].losses == pytest.approx((values["after"], values["before"]), rel=1e-4)


def test_answers_of_a_batch_are_those_of_stock_generate_for_one_prompt(stories: Path) -> None:
    """Ten prompts of many lengths, in two batches; some answers end and others go on."""
    model = AutoModelForCausalLM.from_pretrained(str(stories), dtype=torch.float32).eval()
    chat = make_format("chatml", None, AutoTokenizer.from_pretrained(str(stories)))
    resize_embeddings(model, chat.tokenizer, chat.new_tokens, "mean")
    model.generation_config.pad_token_id = chat.tokenizer.pad_token_id
    model.generation_config.eos_token_id = None
    prompts = ["Once upon a time " + "there was a cat " * number for number in range(10)]
    written = []
    for prompt in prompts:
        ids = chat.tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )["input_ids"]
        alone = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=16, do_sample=False)
        written.append(alone[0, ids.shape[1] :].tolist())
    # A token of some answers, and not of all of them, ends them from now on.
    counts = {token: sum(token in one for one in written) for one in written for token in one}
    end = next(token for token, count in counts.items() if 0 < count < len(prompts))
    model.generation_config.eos_token_id = end
    answers = sample_answers(model, chat, prompts, 16)
    assert [one.prompt for one in answers] == prompts
    assert {one.stopped for one in answers} == {True, False}
    for found, ids in zip(answers, written, strict=True):
        assert found.stopped == (end in ids)
        expected = ids[: ids.index(end)] if end in ids else ids
        assert found.answer == chat.tokenizer.decode(expected, skip_special_tokens=True).strip()


def test_something_else_than_questions_is_one_problem(tmp_path: Path) -> None:
    data = write_small_talk(tmp_path / "talk.jsonl")
    for wrong in ([], [3], "", {"a": "b"}):
        recipe = write_training_recipe(
            tmp_path / "r.yaml", small_model(), data, None, tmp_path / "run", evaluation={"questions": wrong}
        )
        with pytest.raises(UserError, match=r"evaluation\.questions: expected a list of questions as texts") as found:
            load_recipe(recipe)
        assert "problems" not in str(found.value)


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
