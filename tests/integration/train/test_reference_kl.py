"""KL divergence from the reference in evaluations: the plain formula, 0 at the start, whatever the layout."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from peftchat.training.label_trainer import LabelTrainer
from peftchat.training.preference_trainer import PreferenceTrainer
from peftchat.training.reference import reference_model
from tests.support.models import small_model
from tests.support.pairs import open_trainer, pair_recipe, write_labels, write_pairs


def plain_kl(trainer: PreferenceTrainer, example: int) -> tuple[float, int]:
    """Return the KL divergence of a held-out answer by its formula, and the number of its trained tokens."""
    encoded = trainer._context.splits["eval"].store[example]
    ids = torch.tensor(encoded.ids.tolist())[None]
    labels = torch.as_tensor(trainer._collators["eval"]._labels(encoded))

    def log_probs() -> Tensor:
        with torch.no_grad():
            logits: Tensor = trainer.model.eval()(input_ids=ids, use_cache=False).logits
        return logits[0, :-1][labels[1:] >= 0].double().log_softmax(-1)

    own = log_probs()
    with reference_model(trainer.model, trainer._initial_embeddings, trainer._start):
        other = log_probs()
    return float((own.exp() * (own - other)).sum()), len(own)


@pytest.mark.parametrize("objective", ["dpo", "kto"])
@pytest.mark.parametrize("attention", ["auto", "sdpa"])
def test_the_divergence_is_that_of_the_formula(objective: str, attention: str, tmp_path: Path) -> None:
    """Added tokens are trained, and the reference has those of the start."""
    write = write_pairs if objective == "dpo" else write_labels
    data = write(tmp_path / "data.jsonl", 5)
    sections: dict[str, Any] = {"objective": objective, "training": {"per_device_eval_batch_size": 2}}
    trainer = open_trainer(
        pair_recipe(tmp_path, small_model(tied=False), data, data, **sections), f"model.attention={attention}"
    )
    trainer.model_wrapped = trainer.model
    before = trainer.held_out_metrics()
    assert before["eval_reference_kl"] == pytest.approx(0.0, abs=1e-6)
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    known = {split: one.copy() for split, one in trainer.reference.known.items()}
    after = trainer.held_out_metrics()
    has_labels = isinstance(trainer, LabelTrainer)
    examples = range(0, 10, 2 if has_labels else 1)
    expected = [plain_kl(trainer, example) for example in examples]
    found = (
        [one.kl for one in trainer.answers]
        if isinstance(trainer, LabelTrainer)
        else [kl for one in trainer.pairs for kl in (one.chosen_kl, one.rejected_kl)]
    )
    assert found == pytest.approx([kl for kl, _ in expected], rel=1e-5, abs=1e-5)
    assert after["eval_reference_kl"] == pytest.approx(
        sum(kl for kl, _ in expected) / sum(tokens for _, tokens in expected), rel=1e-5
    )
    assert after["eval_reference_kl"] > 1e-3
    # The reference's log-probabilities were known, and stay the numbers that they were.
    assert all((known["eval"] == trainer.reference.known["eval"]).tolist())


@pytest.mark.parametrize("case", ["full", "off"])
def test_where_the_reference_is_gone_none_is_told(case: str, tmp_path: Path) -> None:
    data = write_pairs(tmp_path / "data.jsonl", 3)
    trainer = open_trainer(
        pair_recipe(tmp_path, small_model(tied=True), data, data, method="full" if case == "full" else "lora")
    )
    trainer.model_wrapped = trainer.model
    trainer.compares_with_reference = case != "off"
    trainer.prepare()
    metrics = trainer.held_out_metrics()
    assert "eval_reference_kl" not in metrics and all(one.chosen_kl is None for one in trainer.pairs)
