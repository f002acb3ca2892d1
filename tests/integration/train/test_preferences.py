"""Preference runs: TRL's own loss and gradients, the base as reference, and a rule that is learned."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM

from peftchat.recipe import load_recipe
from peftchat.training.context import TrainOptions
from peftchat.training.preference_trainer import PreferenceTrainer
from peftchat.training.reference import reference_model
from peftchat.training.train import train
from tests.support.data import read_json, read_json_lines
from tests.support.launch import peftchat_in_processes
from tests.support.models import small_model
from tests.support.pairs import open_trainer, pair_recipe, save_chatml_base, write_pairs

ADAPTER = {"r": 4, "alpha": 8}
CHATML = {"template": "chatml"}


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pairs(tmp_path_factory.mktemp("pairs") / "train.jsonl", rounds=2)


@pytest.fixture(scope="module")
def held_out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pairs(tmp_path_factory.mktemp("pairs") / "eval.jsonl", 7, seed=1)


@pytest.fixture(scope="module")
def chatml_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base whose tokenizer has the tokens of the template, so that stock libraries need no more than the adapter."""
    return save_chatml_base(tmp_path_factory.mktemp("base"))


def move(model: torch.nn.Module, *, noise: float = 0.05) -> None:
    """Move every trained weight, so that the model is no longer its reference."""
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * noise)


def batch_of(trainer: PreferenceTrainer, count: int) -> dict[str, Any]:
    """Return the batch of the first pairs."""
    packs = [trainer.train_dataset[number] for number in range(count)]
    return dict(trainer._prepare_inputs(trainer._collators["train"](packs)))


def loss_of(trainer: PreferenceTrainer, batch: dict[str, Any]) -> Tensor:
    """Return the loss of one batch as a whole optimizer step, with its gradients in the model."""
    items = trainer._get_num_items_in_batch([batch], trainer.args.device)
    trainer.current_examples, trainer._target_counts = batch["examples"], batch["target_counts"]
    inputs = {name: value for name, value in batch.items() if name not in ("examples", "target_counts")}
    loss = trainer.compute_loss(trainer.model, inputs, num_items_in_batch=items)
    loss.backward()
    return loss.detach()


def gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: one.grad.clone() for name, one in model.named_parameters() if one.grad is not None}


def trl_loss(
    base: Path, model: PeftModel, rows: list[dict[str, Any]], **config: Any
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return loss and gradients by TRL's own trainer, with the same adapter on a model that stock libraries load."""
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    settings = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    stock = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    arguments = DPOConfig(
        output_dir=str(base / "trl"), report_to="none", bf16=False, use_cpu=True, gradient_checkpointing=False, **config
    )
    text = Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}])
    tokenizer = AutoTokenizer.from_pretrained(base)
    # An adapter that the model has already would be TRL's reference; a new one is switched off for it.
    trainer = DPOTrainer(
        model=stock, args=arguments, train_dataset=text, processing_class=tokenizer, peft_config=settings
    )
    own = dict(model.named_parameters())
    with torch.no_grad():
        for name, parameter in trainer.model.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(own[name])
    loss = trainer.compute_loss(trainer.model, trainer.data_collator(rows))
    loss.backward()
    return loss.detach(), gradients(trainer.model)


def rows_of(trainer: PreferenceTrainer, count: int) -> list[dict[str, Any]]:
    """Return the first pairs as TRL's collator takes them: a prompt and two completions, by what is trained."""
    store, rows = trainer._context.splits["train"].store, []
    for first in range(0, 2 * count, 2):
        row: dict[str, Any] = {}
        for name, example in (("chosen", store[first]), ("rejected", store[first + 1])):
            labels = trainer._collators["train"]._labels(example)
            targets = [place for place, label in enumerate(labels) if label >= 0]
            # TRL has no targets but those at the end; what the template writes behind an answer is cut off.
            assert targets == list(range(targets[0], targets[-1] + 1))
            ids = example.ids.tolist()
            assert row.setdefault("prompt_ids", ids[: targets[0]]) == ids[: targets[0]]
            row[f"{name}_ids"] = ids[targets[0] : targets[-1] + 1]
        rows.append(row)
    return rows


LOSSES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "sigmoid": ({"beta": 0.3}, {"beta": 0.3}),
    "hinge": ({"loss_type": "hinge"}, {"loss_type": ["hinge"]}),
    "ipo": ({"loss_type": "ipo"}, {"loss_type": ["ipo"]}),
    "robust": (
        {"loss_type": "robust", "label_smoothing": 0.2},
        {"loss_type": ["robust"], "label_smoothing": 0.2},
    ),
    "rpo": ({"rpo_alpha": 0.7}, {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.7]}),
}
"""Our options, and TRL's for the same loss."""


@pytest.mark.parametrize("name", LOSSES)
def test_loss_and_gradients_are_those_of_trl(name: str, chatml_base: Path, pairs: Path, tmp_path: Path) -> None:
    ours, theirs = LOSSES[name]
    recipe = pair_recipe(tmp_path, chatml_base, pairs, None, chat=CHATML, adapter=ADAPTER, dpo=ours)
    trainer = open_trainer(recipe)
    move(trainer.model)
    loss = loss_of(trainer, batch_of(trainer, 6))
    found = gradients(trainer.model)
    expected, wanted = trl_loss(chatml_base, trainer.model, rows_of(trainer, 6), **theirs)
    check_equal(loss, found, expected, wanted)
    # The reference took part: the rewards are not zero.
    assert float(trainer._sums[3]) != 0.0


def stock_log_probs(trainer: PreferenceTrainer, count: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the answers' log-probabilities and numbers of tokens, chosen and rejected, by the model's own logits."""
    sums: dict[str, list[Tensor]] = {"chosen": [], "rejected": []}
    lengths: dict[str, list[int]] = {"chosen": [], "rejected": []}
    for row in rows_of(trainer, count):
        for side in sums:
            ids = torch.tensor([row["prompt_ids"] + row[f"{side}_ids"]])
            places = range(len(row["prompt_ids"]), ids.shape[1])
            log_probs = trainer.model(input_ids=ids, use_cache=False).logits[0].log_softmax(-1)
            sums[side].append(sum((log_probs[place - 1, ids[0, place]] for place in places), torch.zeros(())))
            lengths[side].append(len(places))
    return *map(torch.stack, sums.values()), *map(torch.tensor, lengths.values())


def trl_formula(name: str, options: dict[str, Any], log_probs: tuple[Tensor, Tensor, Tensor, Tensor]) -> Tensor:
    """Return the loss by the methods of TRL's trainers; prompts are not in the likelihood, as everywhere here."""
    from trl.experimental.cpo import CPOTrainer
    from trl.experimental.orpo import ORPOTrainer

    chosen, rejected, chosen_tokens, rejected_tokens = log_probs
    likelihood = -chosen.sum() / chosen_tokens.sum()
    trl = SimpleNamespace(
        alpha=0.0, label_smoothing=0.0, loss_type="sigmoid", accelerator=SimpleNamespace(device="cpu"), **options
    )
    if name == "orpo":
        ratio = ORPOTrainer.odds_ratio_loss(trl, chosen / chosen_tokens, rejected / rejected_tokens)[0]
        return likelihood - ratio.mean()
    if name == "simpo":
        trl.loss_type, trl.simpo_gamma = "simpo", trl.gamma
        return CPOTrainer.cpo_loss(trl, chosen / chosen_tokens, rejected / rejected_tokens)[0].mean()
    return CPOTrainer.cpo_loss(trl, chosen, rejected)[0].mean() + 0.6 * likelihood


FREE: dict[str, dict[str, Any]] = {
    "orpo": {"beta": 0.3},
    "simpo": {"beta": 2.5, "gamma": 0.7},
    "cpo": {"beta": 0.2},
}
"""The objectives without a reference, and options of ours that TRL has under the same name."""


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("name", FREE)
def test_objectives_without_a_reference_are_those_of_trl(
    name: str, method: str, chatml_base: Path, pairs: Path, tmp_path: Path
) -> None:
    ours = {**FREE[name], **({"alpha": 0.6} if name == "cpo" else {})}
    sections: dict[str, Any] = {"objective": name, name: ours, "method": method}
    sections |= {"adapter": ADAPTER} if method == "lora" else {}
    trainer = open_trainer(pair_recipe(tmp_path, chatml_base, pairs, None, chat=CHATML, **sections))
    move(trainer.model)
    loss = loss_of(trainer, batch_of(trainer, 6))
    found = gradients(trainer.model)
    trainer.model.zero_grad()
    expected = trl_formula(name, FREE[name], stock_log_probs(trainer, 6))
    expected.backward()
    check_equal(loss, found, expected.detach(), gradients(trainer.model))


def test_full_fine_tuning_computes_the_reference_before_the_first_step(
    chatml_base: Path, pairs: Path, held_out: Path, tmp_path: Path
) -> None:
    recipe = pair_recipe(tmp_path, chatml_base, pairs, held_out, chat=CHATML, method="full")
    trainer = open_trainer(recipe)
    trainer.model_wrapped = trainer.model
    trainer.prepare()
    with torch.no_grad():
        reference = stock_log_probs(trainer, 6)
    known = trainer.reference.known
    assert not any(torch.isnan(torch.from_numpy(one)).any() for one in known.values())
    for place, side in enumerate((known["train"][:12:2], known["train"][1:12:2])):
        torch.testing.assert_close(torch.from_numpy(side), reference[place], rtol=1e-5, atol=1e-4)
    move(trainer.model)
    loss = loss_of(trainer, batch_of(trainer, 6))
    found = gradients(trainer.model)
    trainer.model.zero_grad()
    policy = stock_log_probs(trainer, 6)
    margin = policy[0] - reference[0] - policy[1] + reference[1]
    expected = -torch.nn.functional.logsigmoid(0.1 * margin).mean()
    expected.backward()
    check_equal(loss, found, expected.detach(), gradients(trainer.model))


def check_equal(loss: Tensor, found: dict[str, Tensor], expected: Tensor, wanted: dict[str, Tensor]) -> None:
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)
    assert found.keys() == wanted.keys()
    largest = max(float(one.abs().max()) for one in wanted.values())
    for key, gradient in wanted.items():
        torch.testing.assert_close(found[key], gradient, rtol=1e-4, atol=1e-5 * largest)


def test_batches_and_layouts_do_not_matter(tmp_path: Path) -> None:
    """Six pairs in one line without padding are six pairs one at a time, and pairs in padded rows.

    Added tokens are trained here, so that the head's gradients are weighed in the backward pass. Some of the prompts
    are long enough to be shared, and one is in more than one block of queries.
    """
    pairs = write_pairs(tmp_path / "pairs.jsonl", 6, rounds=4)
    lines = pairs.read_text().splitlines()
    longer = json.loads(lines[3])
    longer |= {"chosen": longer["chosen"] * 40, "rejected": longer["rejected"] * 30}
    pairs.write_text("\n".join([*lines[:3], json.dumps(longer), *lines[4:]]))
    losses, grads, tokens = [], [], []
    for name, batches, overrides in (
        ("shared", [6], ()), ("whole", [6], ()), ("single", [1] * 6, ()), ("padded", [6], ("model.attention=sdpa",)),
    ):  # fmt: skip
        folder = tmp_path / name
        folder.mkdir()
        recipe = pair_recipe(
            folder, small_model(tied=False), pairs, None, adapter=ADAPTER, data={"max_length": 2048}
        )  # fmt: skip
        trainer = open_trainer(recipe, *overrides)
        assert trainer.layout == ("padded" if overrides else "varlen")
        if name == "whole":
            trainer.share_prompts(False)
        move(trainer.model)
        packs = [trainer.train_dataset[number] for number in range(6)]
        starts = [sum(batches[:place]) for place in range(len(batches))]
        made = [
            dict(trainer._prepare_inputs(trainer._collators["train"](packs[start : start + size])))
            for start, size in zip(starts, batches, strict=True)
        ]
        items = trainer._get_num_items_in_batch(made, trainer.args.device)
        assert items[0] == 6
        total = 0.0
        for batch in made:
            trainer.current_examples, trainer._target_counts = batch.pop("examples"), batch.pop("target_counts")
            loss = trainer.compute_loss(trainer.model, batch, num_items_in_batch=items)
            loss.backward()
            total += float(loss.detach())
        losses.append(total)
        grads.append(gradients(trainer.model))
        tokens.append(sum(int(batch["real_tokens"]) for batch in made))
        positions = sum(batch["input_ids"].numel() for batch in made)
        assert positions > tokens[-1] if overrides else positions == tokens[-1]
        if not overrides:
            # Each token attends to itself and all before it, those of a shared prompt included.
            pairs_found = sum(int(batch["attended_pairs"]) for batch in made)
            assert pairs_found == sum(int((batch["position_ids"] + 1).sum()) for batch in made)
    assert tokens[0] == tokens[2] < tokens[1] == tokens[3]
    assert losses == pytest.approx([losses[0]] * 4, rel=1e-5)
    assert any("added_tokens" in name for name in grads[0])
    largest = max(float(one.abs().max()) for one in grads[0].values())
    for other in grads[1:]:
        for key, gradient in grads[0].items():
            torch.testing.assert_close(other[key], gradient, rtol=1e-4, atol=1e-5 * largest)


@pytest.mark.parametrize("variant", ["lora", "pissa", "prompt_tuning", "ln_tuning", "trainable_tokens"])
def test_the_reference_is_the_base_bit_for_bit(variant: str, pairs: Path, tmp_path: Path) -> None:
    base = small_model(tied=True)
    recipe = pair_recipe(tmp_path, base, pairs, None, adapter={"variant": variant})
    trainer = open_trainer(recipe)
    ids = torch.arange(40).reshape(2, 20)
    with torch.no_grad():
        start = trainer.model.eval()(input_ids=ids).logits
    move(trainer.model, noise=0.2)
    trained = {name for name, one in trainer.model.named_parameters() if one.requires_grad}
    stock = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    with torch.no_grad():
        moved = trainer.model(input_ids=ids).logits
        with reference_model(trainer.model, trainer._initial_embeddings):
            found = trainer.model(input_ids=ids).logits
        again = trainer.model(input_ids=ids).logits
        own = stock(input_ids=ids).logits
    assert torch.equal(found[..., : own.shape[-1]], own)
    assert torch.equal(again, moved)
    assert not torch.equal(moved[:, -20:], found[:, -20:])
    if variant == "lora":
        # Added tokens too: before training the model is its own reference.
        assert torch.equal(found, start)
    assert {name for name, one in trainer.model.named_parameters() if one.requires_grad} == trained


def test_a_rule_is_learned_and_told(pretrained: Path, held_out: Path, tmp_path: Path) -> None:
    train_file = write_pairs(tmp_path / "train.jsonl", 64, seed=2)
    training = {"max_steps": 12, "per_device_train_batch_size": 8, "learning_rate": 5e-3, "logging_steps": 1}
    recipe = pair_recipe(tmp_path, pretrained, train_file, held_out, training=training)
    summary = train(load_recipe(recipe))
    run = tmp_path / "run"
    told, lines = summary.eval_pairs, read_json_lines(run / "eval_pairs.jsonl")
    assert summary.objective == "dpo" and summary.train_examples == 64 and summary.eval_examples == 7
    assert told is not None and told.pairs == len(lines) == 7
    assert summary.eval_loss_before == pytest.approx(0.693147, abs=1e-5)
    assert summary.eval_loss is not None and summary.eval_loss < 0.3
    assert told.right > 0.9
    assert told.margin == pytest.approx(sum(line["margin"] for line in lines) / 7)
    metrics = read_json_lines(run / "metrics.jsonl")
    before, *_, after = (line for line in metrics if "eval_loss" in line)
    assert before["eval_accuracy"] == 0.5 and before["eval_rewards/margins"] == 0.0
    assert after["eval_accuracy"] == told.right
    assert before["eval_reference_kl"] == pytest.approx(0.0, abs=1e-6)
    assert told.reference_kl == pytest.approx(after["eval_reference_kl"]) and told.reference_kl > 0.01
    steps = [line for line in metrics if "loss" in line]
    assert steps[-1]["rewards/accuracies"] > 0.9 and steps[-1]["rewards/margins"] > steps[0]["rewards/margins"]
    # Log-probabilities of whole answers, by stock libraries.
    for line in lines:
        assert line["chosen_reward"] == pytest.approx(
            0.1 * (line["chosen_logp"] - line["chosen_logp_before"]), abs=1e-4
        )
    assert read_json(run / "run.json")["eval_pairs"]["pairs"] == 7


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_resumed_run_is_the_uninterrupted_one(method: str, pairs: Path, held_out: Path, tmp_path: Path) -> None:
    """Across the border of an epoch, where the reference is looked up and not computed."""
    settings = {
        "max_steps": 6, "per_device_train_batch_size": 3, "save_strategy": "steps", "save_steps": 3,
        "save_total_limit": 9, "learning_rate": 5e-3,
    }  # fmt: skip
    recipe = pair_recipe(tmp_path, small_model(tied=True), pairs, held_out, training=settings, method=method)
    run = tmp_path / "run"
    train(load_recipe(recipe))
    weights = "adapter_model.safetensors" if method == "lora" else "model.safetensors"

    def left() -> tuple[bytes, str, list[Any]]:
        lines = [
            {key: value for key, value in line.items() if key not in ("seconds", "tokens_per_second", "memory_bytes")}
            for line in read_json_lines(run / "metrics.jsonl")
        ]
        return (run / weights).read_bytes(), (run / "eval_pairs.jsonl").read_text(), lines

    whole = left()
    for name in ("run.json", weights):
        (run / name).unlink()
    shutil.rmtree(run / "checkpoints" / "checkpoint-6")
    train(load_recipe(recipe), TrainOptions(resume=True))
    assert left() == whole
    assert json.loads(whole[1].splitlines()[0])["chosen_logp_before"] is not None


@pytest.mark.distributed
def test_two_processes_that_share_all_weights_train_as_one(chatml_base: Path, tmp_path: Path) -> None:
    """ZeRO-3 with a trained head: its weights are gathered for the loss of pairs, and are not in the backward pass.

    With five pairs, the second process has none in the last step, nor in the end of an evaluation. The base has all
    tokens, so that no process has gathered its embeddings when the run is summarized.
    """
    train_file, held_out = (write_pairs(tmp_path / f"{seed}.jsonl", 5, seed, rounds=2) for seed in (0, 1))
    lines, told = [], []
    for name, processes in (("one", 1), ("two", 2)):
        folder = tmp_path / name
        folder.mkdir()
        training = {
            "max_steps": 2, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2 // processes,
            "per_device_eval_batch_size": 2, "learning_rate": 1e-3,
        }  # fmt: skip
        strategy = {"strategy": "single" if processes == 1 else "zero3", "processes": processes}
        recipe = pair_recipe(
            folder, chatml_base, train_file, held_out, training=training, method="full", chat=CHATML,
            distributed=strategy, dpo={"rpo_alpha": 0.5},
        )  # fmt: skip
        if processes == 1:
            train(load_recipe(recipe))
        else:
            done = peftchat_in_processes(processes, "train", recipe)
            assert done.returncode == 0, done.stderr
        lines.append(read_json_lines(folder / "run" / "metrics.jsonl"))
        told.append(read_json_lines(folder / "run" / "eval_pairs.jsonl"))
    for one, other in zip(*lines, strict=True):
        assert one.keys() == other.keys() and ("loss" in one or one["eval_pairs"] == 5)
        for key in {"loss", "rewards/margins", "grad_norm", "eval_loss", "eval_accuracy", "eval_rewards/margins"} & {
            *one
        }:
            assert one[key] == pytest.approx(other[key], rel=1e-4, abs=1e-5), key
    assert [line["source"] for line in told[0]] == [line["source"] for line in told[1]]
