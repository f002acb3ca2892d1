"""A base with eyes beside its language model keeps them when an adapter of the language model is merged."""

from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from transformers import AutoConfig, AutoModelForImageTextToText

from peftchat.merging import MergeOptions, merge_run
from tests.support.adapters import IDS, apart, merged_logits, tensors_of, train_by_noise
from tests.support.models import seeing_model


@pytest.mark.parametrize("kind", ["gemma3", "qwen3_5"])
def test_the_merged_model_is_read_with_its_eyes_and_without(kind: str, tmp_path: Path) -> None:
    base = tmp_path / "base"
    seeing_model(kind).save_pretrained(base)
    # Not the vision tower's layers of the same names.
    targets = r"(?!.*vision).*layers\.\d+\.(self_attn|mlp)\.(q_proj|down_proj)"
    trained = train_by_noise(base, tmp_path / "run", LoraConfig(r=4, target_modules=targets))
    folder = merge_run(tmp_path / "run", MergeOptions()).folder
    assert apart(merged_logits(folder), trained.merged_logits) < 1e-5
    whole, report = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(report.values())
    with torch.no_grad():
        assert apart(whole.eval()(input_ids=IDS).logits, trained.merged_logits) < 1e-5
    before, after = tensors_of(base), tensors_of(folder)
    eyes = [name for name in before if "vis" in name]
    assert eyes
    assert all(torch.equal(before[name], after[name]) for name in eyes)
    # vLLM goes by this key.
    found, expected = (AutoConfig.from_pretrained(place).architectures for place in (folder, base))
    assert found == expected
