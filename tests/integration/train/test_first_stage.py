"""A second stage that begins at a finished run: what it starts from, what its reference is, and what is refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from peftchat.errors import UserError
from peftchat.merging.merge import merge_run
from peftchat.merging.merge_job import MergeOptions
from peftchat.models.saving import load_adapter_state
from peftchat.recipe import load_recipe
from peftchat.training.build_trainer import build_trainer, sft_config
from peftchat.training.context import TrainOptions, open_context
from peftchat.training.first_stage import begin_note
from peftchat.training.model import load_trainable_model
from peftchat.training.reference import reference_model
from peftchat.training.train import train
from tests.support.data import read_json, write_small_talk
from tests.support.models import small_model
from tests.support.pairs import open_trainer, pair_recipe, write_pairs
from tests.support.recipes import write_training_recipe
from tests.support.stock import stock_run

IDS = torch.arange(40).reshape(2, 20) + 60
"""Some of the ids are added tokens."""


@pytest.fixture(scope="module")
def talk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small_talk(tmp_path_factory.mktemp("talk") / "train.jsonl", 8)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pairs(tmp_path_factory.mktemp("pairs") / "train.jsonl", 6)


Runs = Callable[..., tuple[Path, Path]]


@pytest.fixture(scope="module")
def first_runs(tmp_path_factory: pytest.TempPathFactory, talk: Path) -> Runs:
    """Return a function that gives the recipe and the folder of a finished run; each is trained once."""
    known: dict[str, tuple[Path, Path]] = {}

    def run(method: str = "lora", variant: str = "lora", *, tied: bool = True) -> tuple[Path, Path]:
        name = f"{method}-{variant}-{tied}"
        if name not in known:
            folder = tmp_path_factory.mktemp(name)
            sections: dict[str, Any] = {} if method == "full" else {"adapter": {"variant": variant}}
            recipe = write_training_recipe(
                folder / "sft.yaml", small_model(tied=tied), talk, None, folder / "run", method=method,
                training={"max_steps": 2, "learning_rate": 5e-2}, **sections,
            )  # fmt: skip
            train(load_recipe(recipe))
            known[name] = recipe, folder / "run"
        return known[name]

    return run


def move(model: torch.nn.Module) -> None:
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.2)


def logits_of(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model.eval()(input_ids=IDS, use_cache=False).logits
    return found


def end_of(recipe: Path, run: Path) -> Tensor:
    """Return the logits of a run's model as it was trained: its recipe's model with its files in it."""
    context = open_context(load_recipe(recipe, [f"output_dir={run}.again"]), TrainOptions())
    config = sft_config(context)
    trainer = build_trainer(context, load_trainable_model(context), config)
    assert context.recipe.adapter is not None
    load_adapter_state(trainer.model, context.recipe.adapter, run)
    return logits_of(trainer.model)


def second(folder: Path, run: Path, pairs: Path, **sections: Any) -> Path:
    sections["model"] = {"adapter": str(run), **sections.get("model", {})}
    return pair_recipe(folder, small_model(tied=True), pairs, None, **sections)


@pytest.mark.parametrize(
    ("method", "variant"),
    [("lora", "lora"), ("lora", "pissa"), ("lora", "trainable_tokens"), ("qlora", "lora")],
)
def test_the_reference_is_the_first_stage_bit_for_bit(
    method: str, variant: str, first_runs: Runs, pairs: Path, tmp_path: Path
) -> None:
    recipe, run = first_runs(method, variant)
    trained = end_of(recipe, run)
    trainer = open_trainer(second(tmp_path, run, pairs, method=method))
    assert torch.equal(logits_of(trainer.model), trained)
    move(trainer.model)
    moved = logits_of(trainer.model)
    with reference_model(trainer.model, trainer._initial_embeddings, trainer._start):
        reference = logits_of(trainer.model)
    assert torch.equal(reference, trained)
    assert torch.equal(logits_of(trainer.model), moved)
    assert not torch.allclose(moved, trained, atol=1e-2)
    if variant == "pissa":
        stock, _ = stock_run(run, small_model(tied=True), method)
        torch.testing.assert_close(logits_of(stock), trained, rtol=1e-3, atol=1e-4)


def test_full_training_begins_at_what_merge_writes(first_runs: Runs, pairs: Path, tmp_path: Path) -> None:
    _, run = first_runs()
    merged = merge_run(run, MergeOptions(output=tmp_path / "merged")).folder
    trainer = open_trainer(second(tmp_path, run, pairs, method="full"))
    found = trainer.model.state_dict()
    written = load_file(merged / "model.safetensors")
    assert written.keys() <= found.keys()
    for name, tensor in written.items():
        assert torch.equal(found[name], tensor), name
    trainer.model_wrapped = trainer.model
    trainer.prepare()
    assert not trainer.reference.lacks("train")


def test_full_training_begins_at_the_quantized_base_of_the_run(first_runs: Runs, pairs: Path, tmp_path: Path) -> None:
    recipe, run = first_runs("qlora")
    trainer = open_trainer(second(tmp_path, run, pairs, method="full"))
    torch.testing.assert_close(logits_of(trainer.model), end_of(recipe, run), rtol=1e-3, atol=2e-3)


def test_a_second_stage_is_told_resumed_and_merged(first_runs: Runs, pairs: Path, tmp_path: Path) -> None:
    _, run = first_runs(tied=False)
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "learning_rate": 1e-2}
    sections: dict[str, Any] = {"model": {"adapter": str(run)}, "training": settings}
    recipe = pair_recipe(tmp_path, small_model(tied=False), pairs, None, **sections)
    summary = train(load_recipe(recipe))
    folder = tmp_path / "run"
    assert summary.first_stage == str(run) == read_json(folder / "run.json")["first_stage"]
    (note,) = [note for note in summary.notes if "begins at" in note]
    assert note.endswith("its adapter goes on; the reference is that run, not the base.")
    before, after = (load_file(one / "adapter_model.safetensors") for one in (run, folder))
    assert before.keys() == after.keys() and any(not torch.equal(before[key], after[key]) for key in before)
    weights = (folder / "adapter_model.safetensors").read_bytes()
    for gone in (folder / "run.json", folder / "adapter_model.safetensors"):
        gone.unlink()
    shutil.rmtree(folder / "checkpoints" / "checkpoint-4")
    train(load_recipe(recipe), TrainOptions(resume=True))
    assert (folder / "adapter_model.safetensors").read_bytes() == weights
    # The second run stands for itself: it loads in stock libraries, and merges, without the first.
    stock, _ = stock_run(folder, small_model(tied=False), "lora")
    merged = merge_run(folder, MergeOptions(output=tmp_path / "merged")).folder
    model = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)
    torch.testing.assert_close(logits_of(model), logits_of(stock), rtol=1e-3, atol=1e-4)
    # A run that begins at a second stage begins at its adapter, and one of conversations has no reference.
    third = write_training_recipe(
        tmp_path / "third.yaml", small_model(tied=False), pairs, None, tmp_path / "third",
        model={"adapter": str(folder)}, training={"max_steps": 1},
    )  # fmt: skip
    (note,) = [note for note in train(load_recipe(third)).notes if "begins at" in note]
    assert note == f"The run begins at {folder}: its adapter goes on."


def test_what_the_run_determines_need_not_be_written(first_runs: Runs, pairs: Path, tmp_path: Path) -> None:
    sft, run = first_runs("qlora")
    path = tmp_path / "dpo.yaml"
    values = {"model": {"adapter": str(run)}, "objective": "dpo", "data": {"train": [{"path": str(pairs)}]}}
    path.write_text(json.dumps({**values, "output_dir": str(tmp_path / "run")}))
    found, before = load_recipe(path).recipe, load_recipe(sft).recipe
    assert (found.method, found.model.name, found.quantization) == ("qlora", before.model.name, before.quantization)
    assert found.chat == before.chat and found.adapter is not None and found.adapter.variant == "lora"
    assert (
        found.data.max_length
        == before.data.max_length
        != load_recipe(path, ["data.max_length=99"]).recipe.data.max_length
    )
    first, second = begin_note(load_recipe(path, ["data.max_length=99"]).recipe)
    assert "its adapter goes on" in first and second.startswith("data.max_length is 99 tokens, and was 128 in")
    # The run is what a second run's own recipe was completed from, and may be gone later.
    (tmp_path / "whole.yaml").write_text(sft.read_text())
    gone = load_recipe(tmp_path / "whole.yaml", ["model.adapter=/nowhere/run"], to_train=False)
    assert gone.recipe.model.adapter == "/nowhere/run"


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no such run": ({"model": {"adapter": "/nowhere/run"}}, "there is no such run folder"),
    "rank": ({"adapter": {"r": 5}}, r"adapter\.r: the run that it begins at has `16`, got `5`"),
    "variant": ({"adapter": {"variant": "dora"}}, "of the variant `lora`, which cannot go on as `dora`"),
    "method": ({"method": "qlora"}, "was trained with `method: lora`, got `qlora`"),
    "template": ({"chat": {"template": "chatml"}}, "has `starchat`, got `chatml`: the chat template is the run's"),
    "system": ({"chat": {"system": "Be kind."}}, "has `null`, got `Be kind.`"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_recipe_that_contradicts_the_run_is_refused(case: str, first_runs: Runs, pairs: Path, tmp_path: Path) -> None:
    sections, words = REFUSED[case]
    with pytest.raises(UserError, match=words) as error:
        load_recipe(second(tmp_path, first_runs()[1], pairs, **sections))
    assert error.value.hint and not (tmp_path / "run").exists()


def test_a_run_that_cannot_go_on_is_refused(first_runs: Runs, pairs: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(first_runs()[1], tmp_path / "first"))

    def refused(words: str, **sections: Any) -> None:
        with pytest.raises(UserError, match=words):
            open_trainer(second(tmp_path, run, pairs, **sections))

    recipe = second(tmp_path, run, pairs)
    with pytest.raises(UserError, match="not what the run that it begins at was trained with: base: "):
        open_trainer(recipe, f"model.name={small_model(tied=False)}")
    with pytest.raises(UserError, match="trained every weight, so its folder is a model"):
        load_recipe(second(tmp_path, first_runs("full")[1], pairs))
    (run / "chat_template.jinja").write_text("{{ messages }}")
    refused("the run's own chat_template.jinja differs")
    shutil.copy(first_runs()[1] / "chat_template.jinja", run)
    weights = (run / "adapter_model.safetensors").read_bytes()
    (run / "adapter_model.safetensors").write_bytes(weights[:-100])
    refused("damaged safetensors file")
    (run / "adapter_model.safetensors").unlink()
    refused("the file is missing")
    (run / "adapter_config.json").unlink()
    refused("the run has not finished")
    (run / "recipe.yaml").unlink()
    refused("expected a run folder, and this one has no recipe.yaml")
    with pytest.raises(UserError, match="cannot go on: a finished run does not hold its"):
        open_trainer(second(tmp_path, first_runs("lora", "p_tuning")[1], pairs))
