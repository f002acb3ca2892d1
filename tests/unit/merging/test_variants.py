"""Every variant that folds gives what stock `merge_and_unload` gives, on every kind of layer."""

import json
from pathlib import Path

import peft
import pytest
import torch
from peft import LoraConfig

from peftchat.errors import UserError
from peftchat.merging import MergeOptions, merge_run
from tests.support.adapters import apart, make_base, merged_logits, tensors_of, train_by_noise

LINEAR = ["q_proj", "v_proj", "down_proj"]

LORA = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "rank and alpha patterns": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}},
    "bias lora_only": {"bias": "lora_only"},
    "bias all": {"bias": "all"},
    "lora_bias": {"lora_bias": True},
    "modules_to_save": {"modules_to_save": ["lm_head"]},
    "some layers": {"layers_to_transform": [1]},
    "pissa": {"init_lora_weights": "pissa"},
    "olora": {"init_lora_weights": "olora"},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "gaussian": {"init_lora_weights": "gaussian"},
    "rslora dora pattern": {"use_rslora": True, "use_dora": True, "rank_pattern": {"down_proj": 6}},
}

LAYERS = {
    "linear": ("llama-bias", LINEAR),
    "conv1d": ("gpt2", ["c_attn", "c_proj", "c_fc"]),
    "fused projections": ("phi3", ["qkv_proj", "gate_up_proj"]),
    "bigcode": ("gpt_bigcode", ["c_attn", "c_fc"]),
    "embedding": ("llama", ["embed_tokens", "q_proj"]),
    "head": ("llama", ["lm_head", "o_proj"]),
}


def check(base: Path, run: Path, trained) -> None:
    result = merge_run(run, MergeOptions())
    proof = result.report.verification
    assert proof is not None and proof.passed
    assert apart(merged_logits(result.folder), trained.merged_logits) < 1e-5
    found = tensors_of(result.folder)
    for name, value in found.items():
        if name in trained.merged:
            torch.testing.assert_close(value, trained.merged[name], atol=2e-6, rtol=1e-5)
    before = tensors_of(base)
    assert any(not torch.equal(found[name], before[name]) for name in before)


@pytest.mark.parametrize("variant", LORA)
def test_lora_variants_equal_stock_merge(variant: str, tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "llama-bias")
    trained = train_by_noise(base, tmp_path / "run", LoraConfig(r=4, target_modules=LINEAR, **LORA[variant]))
    check(base, tmp_path / "run", trained)


@pytest.mark.parametrize("variant", ["lora", "dora"])
@pytest.mark.parametrize("layer", LAYERS)
def test_lora_on_every_kind_of_layer(variant: str, layer: str, tmp_path: Path) -> None:
    kind, targets = LAYERS[layer]
    base = make_base(tmp_path / "base", kind)
    config = LoraConfig(r=4, target_modules=targets, use_dora=variant == "dora")
    check(base, tmp_path / "run", train_by_noise(base, tmp_path / "run", config))


OTHERS = {
    "ia3": lambda: peft.IA3Config(target_modules=LINEAR, feedforward_modules=["down_proj"]),
    "loha": lambda: peft.LoHaConfig(r=4, target_modules=LINEAR),
    "lokr": lambda: peft.LoKrConfig(r=4, target_modules=LINEAR),
    "oft": lambda: peft.OFTConfig(r=0, oft_block_size=4, target_modules=LINEAR),
    "boft": lambda: peft.BOFTConfig(boft_block_size=4, target_modules=LINEAR),
    "hra": lambda: peft.HRAConfig(r=4, target_modules=LINEAR),
    "vera": lambda: peft.VeraConfig(r=4, target_modules=["q_proj", "o_proj"]),
    "pvera": lambda: peft.PveraConfig(r=4, target_modules=["q_proj", "o_proj"]),
    "miss": lambda: peft.MissConfig(r=4, target_modules=LINEAR),
    "fourierft": lambda: peft.FourierFTConfig(n_frequency=10, target_modules=LINEAR),
    "randlora": lambda: peft.RandLoraConfig(r=4, target_modules=LINEAR),
    "road": lambda: peft.RoadConfig(group_size=16, target_modules=LINEAR),
    "c3a": lambda: peft.C3AConfig(block_size=16, target_modules=["q_proj"]),
    "shira": lambda: peft.ShiraConfig(r=2, target_modules=["q_proj"]),
    "delora": lambda: peft.DeloraConfig(r=4, target_modules=LINEAR),
    "ln_tuning": lambda: peft.LNTuningConfig(target_modules=["input_layernorm"]),
    "adalora": lambda: peft.AdaLoraConfig(total_step=10, target_modules=LINEAR),
    "vblora": lambda: peft.VBLoRAConfig(num_vectors=8, vector_length=8, topk=2, r=2, target_modules=LINEAR),
    "trainable tokens": lambda: peft.TrainableTokensConfig(target_modules=["embed_tokens"], token_indices=[1, 2]),
    "waveft": lambda: peft.WaveFTConfig(n_frequency=10, target_modules=LINEAR),
    "gralora": lambda: peft.GraloraConfig(r=4, target_modules=["q_proj"]),
    "hira": lambda: peft.HiraConfig(r=4, target_modules=LINEAR),
    "tinylora": lambda: peft.TinyLoraConfig(target_modules=["q_proj"]),
    "unilora": lambda: peft.UniLoraConfig(target_modules=["q_proj"]),
}


@pytest.mark.parametrize("method", OTHERS)
def test_other_methods_equal_stock_merge(method: str, tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "llama-bias")
    check(base, tmp_path / "run", train_by_noise(base, tmp_path / "run", OTHERS[method](), noise=0.02))


CONV1D = {
    "ia3": lambda: peft.IA3Config(target_modules=["c_attn", "c_fc"], feedforward_modules=["c_fc"]),
    "vera": lambda: peft.VeraConfig(r=4, target_modules=["c_attn"]),
    "fourierft": lambda: peft.FourierFTConfig(n_frequency=10, target_modules=["c_attn"]),
    "adalora": lambda: peft.AdaLoraConfig(total_step=10, target_modules=["c_attn"]),
}


@pytest.mark.parametrize("method", CONV1D)
def test_other_methods_on_conv1d(method: str, tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "gpt2")
    config = CONV1D[method]()
    config.fan_in_fan_out = True
    check(base, tmp_path / "run", train_by_noise(base, tmp_path / "run", config, noise=0.02))


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe", "qwen3_5_moe_text"])
def test_expert_stacks(kind: str, tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", kind)
    config = LoraConfig(
        r=2, target_modules=["q_proj"], target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    )
    trained = train_by_noise(base, tmp_path / "run", config)
    result = merge_run(tmp_path / "run", MergeOptions())
    assert apart(merged_logits(result.folder), trained.merged_logits) < 1e-5
    # The names are the base's own: what read the base reads the merged model.
    assert tensors_of(result.folder).keys() == tensors_of(base).keys()


REFUSED = {
    "prompt tuning": (lambda: peft.PromptTuningConfig(num_virtual_tokens=4), "before the prompt"),
    "prefix tuning": (lambda: peft.PrefixTuningConfig(num_virtual_tokens=4), "before the prompt"),
    "p-tuning": (lambda: peft.PromptEncoderConfig(num_virtual_tokens=4), "before the prompt"),
    "osf": (lambda: peft.OSFConfig(target_modules=["q_proj"]), "merge_and_unload"),
    "psoft": (lambda: peft.PsoftConfig(r=4, target_modules=["q_proj"]), "merge_and_unload"),
    "alora": (lambda: LoraConfig(target_modules=["q_proj"], alora_invocation_tokens=[5, 6]), "aLoRA cannot be merged"),
    "lily": (lambda: peft.LilyConfig(target_modules=["q_proj"]), "depends on the input"),
}


@pytest.mark.parametrize("method", REFUSED)
def test_what_cannot_fold_is_refused_with_a_cure(method: str, tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "llama")
    config, reason = REFUSED[method][0](), REFUSED[method][1]
    config.task_type = "CAUSAL_LM"
    from tests.support.adapters import load

    peft.get_peft_model(load(base), config).save_pretrained(tmp_path / "run")
    with pytest.raises(UserError, match=reason):
        merge_run(tmp_path / "run", MergeOptions())
    assert not list((tmp_path / "run").glob("merged*"))


def test_a_setting_that_this_peft_does_not_know_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = make_base(tmp_path / "base", "llama")
    train_by_noise(base, tmp_path / "run", LoraConfig(target_modules=["q_proj"]))
    file = tmp_path / "run" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "use_newer": {"rate": 2}, "use_other": False}))
    merge_run(tmp_path / "run", MergeOptions(verify=False))
    told = capsys.readouterr().err
    assert "use_newer" in told and "use_other" not in told
