"""QLoRA runs: the base as bitsandbytes held it while training."""

import json
from collections.abc import Iterator
from pathlib import Path

import bitsandbytes
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import BitsAndBytesConfig

from peftchat.errors import UserError
from peftchat.merging import MergeOptions, merge_run
from tests.support.adapters import IDS, apart, load, make_base, merged_logits, tensors_of

RECIPE = """
model: {{name: {base}, dtype: {dtype}}}
method: qlora
quantization: {{bits: 4, type: nf4, double: {double}}}
adapter: {{r: 4}}
data: {{train: [{{path: nothing.jsonl}}]}}
output_dir: {run}
"""


def train(tmp_path: Path, kind: str, double: bool, targets: object = "all-linear") -> tuple[Path, torch.nn.Module]:
    """A QLoRA adapter by noise, and the trained model: quantized base and adapter, as transformers and PEFT hold it."""
    base, run = make_base(tmp_path / "base", kind), tmp_path / "run"
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=double,
        bnb_4bit_compute_dtype=torch.float32,
    )
    model = load(base, quantization_config=quantization)
    model = get_peft_model(model, LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM"))
    torch.manual_seed(3)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(torch.randn_like(parameter) * 0.05)
    model.save_pretrained(run)
    (run / "recipe.yaml").write_text(
        RECIPE.format(base=base, run=run, dtype="float32", double=str(double).lower()), encoding="utf-8"
    )
    return run, PeftModel.from_pretrained(load(base, quantization_config=quantization), run).eval()


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "llama-tied"])
def test_dequantized_is_what_was_trained_and_is_the_default(kind: str, double: bool, tmp_path: Path) -> None:
    run, trained = train(tmp_path, kind, double)
    held = dict(dequantized_weights(trained))
    with torch.no_grad():
        wanted = trained(IDS).logits.float()
    automatic = merge_run(run, MergeOptions(dtype=torch.float32))
    choice = automatic.report.base
    assert choice.kind == "dequantized"
    assert choice.distance_dequantized == 0 and choice.distance_original is not None and choice.distance_original > 0.01
    original = merge_run(run, MergeOptions(base="original", output=tmp_path / "original"))
    assert original.report.base.kind == "original"
    assert original.report.verification is not None and original.report.verification.passed
    # The kernel of the CPU computes in bfloat16, so logits agree to its precision only; the weights agree exactly.
    near = apart(merged_logits(automatic.folder), wanted)
    assert near < 1e-2
    assert near < apart(merged_logits(original.folder), wanted) / 5
    plain = merge_run(run, MergeOptions(base="dequantized", scale=0.0, verify=False, output=tmp_path / "plain"))
    found = tensors_of(plain.folder)
    assert held and all(torch.equal(found[name], value) for name, value in held.items())


def dequantized_weights(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Every 4-bit weight in the trained model, dequantized, under its name and in its orientation in the base."""
    base = model.get_base_model()
    for name, module in base.named_modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            weight = bitsandbytes.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
            conv = base.config.model_type == "gpt2"
            yield name.removesuffix(".base_layer") + ".weight", weight.T if conv else weight


def test_what_transformers_does_not_quantize_stays(tmp_path: Path) -> None:
    run, _ = train(tmp_path, "llama", True, ["q_proj"])
    merged, base = tensors_of(merge_run(run, MergeOptions()).folder), tensors_of(tmp_path / "base")
    same = {name for name in base if torch.equal(merged[name], base[name])}
    assert {"model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"} <= same
    assert "model.layers.0.mlp.up_proj.weight" not in same


def test_dequantized_is_refused_for_a_run_that_was_not_quantized(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "llama")
    get_peft_model(load(base), LoraConfig(r=4, target_modules=["q_proj"])).save_pretrained(tmp_path / "run")
    with pytest.raises(UserError, match=r"not trained on a quanti[sz]ed base"):
        merge_run(tmp_path / "run", MergeOptions(base="dequantized"))
    assert json.loads((tmp_path / "run" / "adapter_config.json").read_text())["r"] == 4
