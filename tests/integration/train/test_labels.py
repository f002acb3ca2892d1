"""Kahneman-Tversky optimization: TRL's own loss and gradients, labels of every spelling, and a rule that is learned."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from peftchat.conversations import ProblemLog, ReadOptions, read_conversations
from peftchat.errors import UserError
from peftchat.recipe import load_recipe
from peftchat.training.label_trainer import LabelTrainer
from peftchat.training.train import train
from tests.support.data import read_json_lines
from tests.support.models import small_model
from tests.support.pairs import open_trainer, pair_recipe, save_chatml_base, write_labels


@pytest.fixture(scope="module")
def labels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_labels(tmp_path_factory.mktemp("labels") / "train.jsonl", 9)


@pytest.fixture(scope="module")
def chatml_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_chatml_base(tmp_path_factory.mktemp("base"))


def rows_of(trainer: LabelTrainer, count: int) -> list[dict[str, Any]]:
    """Return the first answers as TRL's collator takes them."""
    split, rows = trainer._context.splits["train"], []
    for number in range(count):
        row: dict[str, Any] = {"label": split.stats.labels[number]}
        for name, example in (("", split.store[2 * number]), ("KL_", split.store[2 * number + 1])):
            targets = [place for place, label in enumerate(trainer._collators["train"]._labels(example)) if label >= 0]
            ids = example.ids.tolist()
            assert row.setdefault("prompt_ids", ids[: targets[0]]) == ids[: targets[0]]
            row[f"{name}completion_ids"] = ids[targets[0] : targets[-1] + 1]
        rows.append(row)
    return rows


def trl_loss(base: Path, trainer: LabelTrainer, rows: list[dict[str, Any]], **config: Any) -> tuple[Tensor, Any, float]:
    """Return loss, gradients and KL term by TRL's own trainer, with the same adapter on a stock model."""
    from datasets import Dataset
    from trl import KTOConfig, KTOTrainer

    settings = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    arguments = KTOConfig(
        output_dir=str(base / "trl"), report_to="none", bf16=False, use_cpu=True, gradient_checkpointing=False, **config
    )
    text = Dataset.from_list([{"prompt": "a", "completion": "b", "label": True}] * 2)
    theirs = KTOTrainer(
        model=AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), args=arguments, train_dataset=text,
        processing_class=AutoTokenizer.from_pretrained(base), peft_config=settings,
    )  # fmt: skip
    own = dict(trainer.model.named_parameters())
    with torch.no_grad():
        for name, parameter in theirs.model.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(own[name])
    theirs.model.train()
    loss = theirs.compute_loss(theirs.model, theirs.data_collator(rows))
    loss.backward()
    found = {name: one.grad.clone() for name, one in theirs.model.named_parameters() if one.grad is not None}
    return loss.detach(), found, theirs._metrics["train"]["kl"][0]


@pytest.mark.parametrize(
    "options",
    [
        {"beta": 0.3, "desirable_weight": 0.7, "undesirable_weight": 1.4},
        {"loss_type": "apo_zero_unpaired"},
    ],
)
def test_loss_and_gradients_are_those_of_trl(
    options: dict[str, Any], chatml_base: Path, labels: Path, tmp_path: Path
) -> None:
    recipe = pair_recipe(
        tmp_path, chatml_base, labels, None, objective="kto", kto=options, chat={"template": "chatml"},
        adapter={"r": 4, "alpha": 8},
    )  # fmt: skip
    trainer = open_trainer(recipe)
    assert isinstance(trainer, LabelTrainer)
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    packs = [trainer.train_dataset[number] for number in range(6)]
    batch = dict(trainer._prepare_inputs(trainer._collators["train"](packs)))
    items = trainer._get_num_items_in_batch([batch], trainer.args.device)
    trainer.current_examples, trainer._target_counts = batch.pop("examples"), batch.pop("target_counts")
    loss = trainer.compute_loss(trainer.model, batch, num_items_in_batch=items)
    loss.backward()
    found = {name: one.grad for name, one in trainer.model.named_parameters() if one.grad is not None}
    expected, wanted, kl = trl_loss(chatml_base, trainer, rows_of(trainer, 6), **options)
    assert float(loss.detach()) == pytest.approx(float(expected), rel=1e-5)
    assert found.keys() == wanted.keys()
    largest = max(float(one.abs().max()) for one in wanted.values())
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-5 * largest)
    means = trainer._means(trainer._sums.tolist())
    assert means["kl"] == pytest.approx(kl, rel=1e-4, abs=1e-5)
    assert kl > 0 or options.get("loss_type")


def test_a_rule_is_learned_from_labels(pretrained: Path, tmp_path: Path) -> None:
    train_file, held_out = write_labels(tmp_path / "train.jsonl", 64, 2), write_labels(tmp_path / "eval.jsonl", 9, 1)
    training = {"max_steps": 14, "per_device_train_batch_size": 8, "learning_rate": 5e-3, "logging_steps": 1}
    summary = train(load_recipe(pair_recipe(
        tmp_path, pretrained, train_file, held_out, objective="kto", training=training,
    )))  # fmt: skip
    assert summary.objective == "kto" and (summary.train_examples, summary.eval_examples) == (64, 9)
    lines = read_json_lines(tmp_path / "run" / "metrics.jsonl")
    before, *_, after = (line for line in lines if "eval_loss" in line)
    assert before["eval_loss"] == pytest.approx(0.5) and before["eval_accuracy"] == 0.5 and before["eval_kl"] == 0.0
    assert after["eval_rewards/chosen"] > 0 > after["eval_rewards/rejected"]
    told, answers = summary.eval_labels, read_json_lines(tmp_path / "run" / "eval_answers.jsonl")
    assert told is not None and (told.good, told.bad) == (6, 3) and told.right == after["eval_accuracy"]
    assert (told.good_reward, told.kl) == pytest.approx((after["eval_rewards/chosen"], after["eval_kl"]))
    assert told.good_logp_before == pytest.approx(before["eval_logps/chosen"])
    assert sum(line["loss"] for line in answers) / 9 == pytest.approx(after["eval_loss"])
    for line in answers:
        assert line["reward"] == pytest.approx(0.1 * (line["logp"] - line["logp_before"]), abs=1e-4)
    assert after["eval_loss"] < 0.46 and after["eval_rewards/margins"] > 1 and after["eval_accuracy"] > 0.5


def test_an_evaluation_does_not_depend_on_its_batches(labels: Path, tmp_path: Path) -> None:
    """The KL term is a mean over all held-out answers, and answers to other prompts are never trained."""
    found = []
    for size in (2, 9):
        folder = tmp_path / str(size)
        folder.mkdir()
        training = {"per_device_eval_batch_size": size}
        trainer = open_trainer(
            pair_recipe(folder, small_model(tied=True), labels, labels, objective="kto", training=training)
        )
        batch = trainer.micro_batch(0, 2)
        assert int((batch["labels"] >= 0).sum()) == batch["target_counts"][::2].sum()
        # The other answers become likelier.
        trainer.model(**trainer.model_inputs(batch["others"]), supervised=True).loss.backward()
        with torch.no_grad():
            for parameter in trainer.model.parameters():
                if parameter.grad is not None:
                    parameter -= 1e-2 * parameter.grad
        trainer.model_wrapped = trainer.model
        found.append(trainer.held_out_metrics())
    assert found[0] == pytest.approx(found[1], rel=1e-5, abs=1e-6) and found[0]["eval_kl"] > 0


def read(path: Path, *records: Any, log: ProblemLog | None = None) -> list[tuple[str, bool | None]]:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    found = read_conversations(path, problems=log, options=ReadOptions(labels=True))
    return [(one.messages[-1].content, one.label) for one in found]


def test_labels_are_read_from_every_spelling(tmp_path: Path, shared_data: Path) -> None:
    path = tmp_path / "a.jsonl"
    asked, said = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}
    assert read(
        path,
        {"prompt": "Hi", "completion": "Hello!", "label": True},
        {"prompt": [asked], "completion": [{**said, "content": "What?"}], "label": False},
    ) == [("Hello!", True), ("What?", False)]
    of_turns = [{"messages": [asked, said], "label": label} for label in (0, "true", 1.0)]
    assert read(path, *of_turns) == [("Hello!", False), ("Hello!", True), ("Hello!", True)]
    pair = {"prompt": "Hi", "chosen": "Hello!", "rejected": "No."}
    assert read(path, pair) == [("Hello!", True), ("No.", False)]
    with pytest.raises(UserError, match="no field 'label'") as error:
        read(path, {"prompt": "Hi", "completion": "a"})
    assert "`peftchat data prepare --labels`" in str(error.value.hint)
    log = ProblemLog()
    wrong = [{"prompt": "Hi", "completion": "a"}, {"prompt": "Hi", "completion": "a", "label": 5}]
    assert read(path, *wrong, log=log) == []
    assert log.problems == {"missing_field": 1, "wrong_type": 1}
    ranked = list(read_conversations(shared_data / "oasst_trees_en_60.jsonl", options=ReadOptions(labels=True)))
    assert [one.label for one in ranked] == [True, False] * 118


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"training": {"per_device_train_batch_size": 1}}, "one answer is no mean"),
        ({"dpo": {"beta": 0.2}}, "`objective: kto` has no such options"),
        ({"data": {"packing": True}}, "one line without padding already"),
        ({"kto": {"beta": 0}}, "kto.beta"),
        ({"kto": {"loss_type": "sigmoid"}}, "kto.loss_type"),
    ],
)
def test_what_does_not_fit_is_refused(sections: dict[str, Any], words: str, labels: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=words):
        load_recipe(pair_recipe(tmp_path, small_model(tied=True), labels, None, objective="kto", **sections))
