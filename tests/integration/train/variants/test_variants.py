"""Every variant learns, and what it leaves behind is what was trained: in stock peft, and merged."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from peftchat.errors import UserError
from peftchat.export.combine import CombineOptions, combine_into_adapter
from peftchat.export.lora import LoraOptions, export_lora
from peftchat.merging import MergeOptions, merge_run
from peftchat.runs.run_folder import RunFolder
from peftchat.runs.run_summary import RunSummary
from peftchat.variants import VARIANTS
from tests.support.models import small_model
from tests.support.variants import TrainedVariant, VariantTrainer, stock_adapter


def check_run(train: VariantTrainer, trained: TrainedVariant, merged: Path) -> None:
    """Check that the run has learned, that stock libraries see its loss, and that merging keeps it or is refused."""
    run, summary = trained.run, trained.summary
    assert summary["eval_loss"] < summary["eval_loss_before"]
    assert train.held_out_loss(train.stock_model(run), run) == pytest.approx(summary["eval_loss"], rel=2e-5)
    variant = VARIANTS[trained.name]
    if not variant.mergeable:
        with pytest.raises(UserError):
            merge_run(run, MergeOptions(output=merged))
        return
    result = merge_run(run, MergeOptions(output=merged))
    assert result.report.verification is not None and result.report.verification.passed
    model = AutoModelForCausalLM.from_pretrained(result.folder, dtype=torch.float32).eval()
    assert train.held_out_loss(model, run) == pytest.approx(summary["eval_loss"], rel=2e-5)


@pytest.mark.parametrize("name", VARIANTS)
def test_variant_trains_reloads_and_merges(name: str, train: VariantTrainer, tmp_path: Path) -> None:
    check_run(train, train(name), tmp_path / "merged")


@pytest.mark.parametrize("name", ["dora", "loha", "eva"])
def test_a_run_becomes_a_plain_lora_with_its_tokens_and_its_loss(
    name: str, train: VariantTrainer, tmp_path: Path
) -> None:
    trained = train(name)
    folder, report = export_lora(trained.run, LoraOptions(output=tmp_path / "lora"))
    assert report.data == "held-out conversations" and report.method == name
    assert report.proof.loss_before == pytest.approx(trained.summary["eval_loss"], rel=2e-5)
    assert report.added_tokens == [token["id"] for token in trained.summary["new_tokens"]]
    loss = train.held_out_loss(stock_adapter(folder, train.base), folder)
    assert loss == pytest.approx(report.proof.loss_after, rel=2e-5)


def test_runs_are_combined_with_their_tokens_and_the_losses_are_those_of_the_runs(
    train: VariantTrainer, tmp_path: Path
) -> None:
    trained = [train("dora"), train("loha")]
    report = combine_into_adapter([one.run for one in trained], CombineOptions(tmp_path / "both"))
    (losses,) = report.losses
    assert losses.data.runs == tuple(str(one.run) for one in trained)
    for one, loss in zip(trained, losses.adapters, strict=True):
        assert loss == pytest.approx(one.summary["eval_loss"], rel=2e-5)
    assert report.added_tokens == [token["id"] for token in trained[0].summary["new_tokens"]]
    assert train.held_out_loss(stock_adapter(tmp_path / "both", train.base), tmp_path / "both") == pytest.approx(
        losses.written, rel=2e-5
    )


def test_a_variant_on_a_model_that_others_trained(stories: Path, train: VariantTrainer, tmp_path: Path) -> None:
    on_stories = VariantTrainer(stories, train.conversations, train.held_out, tmp_path)
    check_run(on_stories, on_stories("dora"), tmp_path / "merged")


@pytest.mark.parametrize("name", ["ia3", "trainable_tokens", "prompt_tuning", "adalora"])
def test_added_tokens_of_an_untied_head(name: str, train: VariantTrainer, tmp_path: Path) -> None:
    untied = VariantTrainer(small_model(tied=False), train.conversations, train.held_out, tmp_path)
    trained = untied(name)
    assert all(token["input_moved"] > 0 and token["output_moved"] > 0 for token in trained.summary["new_tokens"][1:])
    check_run(untied, trained, tmp_path / "merged")


@pytest.mark.parametrize("name", ["lora", "ia3", "oft", "vera"])
def test_variants_on_a_4_bit_base(name: str, train: VariantTrainer) -> None:
    trained = train(name, method="qlora")
    loss = train.held_out_loss(train.stock_model(trained.run), trained.run)
    assert loss == pytest.approx(trained.summary["eval_loss"], rel=2e-5)


def test_an_adapter_with_added_tokens_beside_it_names_both_in_its_card(train: VariantTrainer) -> None:
    from peftchat.reports.model_card import model_card

    trained = train("ia3")
    card = model_card(
        RunSummary.read(RunFolder(trained.run)), (trained.run / "recipe.yaml").read_text(encoding="utf-8")
    )
    assert 'PeftModel.from_pretrained(model, f"{run}/token_rows").merge_and_unload()' in card


def test_chat_loads_added_tokens_beside_the_adapter(train: VariantTrainer) -> None:
    from peftchat.serving.chat_model import load_for_chat

    trained = train("road")
    model = load_for_chat(str(trained.run)).model
    loss = train.held_out_loss(model.float(), trained.run)
    assert loss == pytest.approx(trained.summary["eval_loss"], rel=2e-5)
