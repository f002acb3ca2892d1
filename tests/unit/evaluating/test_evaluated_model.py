"""What a model of an evaluation computes in."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from peftchat.evaluating.evaluated_model import EvaluatedModel
from peftchat.models import loading
from peftchat.serving import chat_model
from tests.support.chat_models import save_model


def test_bfloat16_is_computed_in_float32_on_a_cpu_without_kernels_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_model(tmp_path / "model")
    AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).save_pretrained(folder)
    stock = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").state_dict()
    keys = []
    for has_kernels, computed in ((True, torch.bfloat16), (False, torch.float32)):
        for module in (loading, chat_model):
            monkeypatch.setattr(module, "has_bfloat16_kernels", lambda found=has_kernels: found)
        opened = EvaluatedModel.open(str(folder))
        model = opened.load()
        keys.append(opened.key())
        assert {one.dtype for one in model.parameters()} == {computed}
        assert all(torch.equal(weight, stock[name].to(computed)) for name, weight in model.state_dict().items())
    assert keys[0] != keys[1], "answers of the one are not those of the other"
