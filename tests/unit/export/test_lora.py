"""A converted adapter: stock PEFT loads it, and it computes what its proof says."""

import json
import resource
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora.conversion import convert_to_lora
from peft.tuners.tuners_utils import BaseTunerLayer

from peftchat.errors import UserError, VerificationError
from peftchat.export.lora import LoraOptions, export_lora, unconvertible
from peftchat.models.peft_model import model_shape
from peftchat.variants import ADAPTERS
from tests.support.adapters import IDS, VOCABULARY, Trained, apart, load, make_base, train_by_noise
from tests.support.in_process import peftchat_in_process
from tests.support.models import random_model

LINEAR = ["q_proj", "v_proj", "down_proj"]

CONVERTIBLE: dict[str, Callable[[], Any]] = {
    "dora": lambda: LoraConfig(r=4, target_modules=LINEAR, use_dora=True),
    "dora with patterns": lambda: LoraConfig(
        r=4, target_modules=LINEAR, use_dora=True, use_rslora=True, rank_pattern={"down_proj": 6}
    ),
    "uneven ranks, as of eva": lambda: LoraConfig(
        r=4, target_modules=LINEAR, rank_pattern={"q_proj": 2}, alpha_pattern={"v_proj": 3}
    ),
    "pissa": lambda: LoraConfig(r=4, target_modules=LINEAR, init_lora_weights="pissa"),
    "some layers": lambda: LoraConfig(r=4, target_modules=LINEAR, layers_to_transform=[1], use_dora=True),
    "modules_to_save": lambda: LoraConfig(r=4, target_modules=LINEAR, modules_to_save=["lm_head"], use_dora=True),
    "loha": lambda: peft.LoHaConfig(r=4, target_modules=LINEAR),
    "lokr": lambda: peft.LoKrConfig(r=4, target_modules=LINEAR),
    "gralora": lambda: peft.GraloraConfig(r=4, target_modules=["q_proj"]),
    "delora": lambda: peft.DeloraConfig(r=4, target_modules=LINEAR),
    "miss": lambda: peft.MissConfig(r=4, target_modules=LINEAR),
    "vera": lambda: peft.VeraConfig(r=4, target_modules=["q_proj", "o_proj"]),
    "randlora": lambda: peft.RandLoraConfig(r=4, target_modules=LINEAR),
    "fourierft": lambda: peft.FourierFTConfig(n_frequency=10, target_modules=LINEAR),
    "waveft": lambda: peft.WaveFTConfig(n_frequency=10, target_modules=LINEAR),
    "c3a": lambda: peft.C3AConfig(block_size=16, target_modules=["q_proj"]),
    "tinylora": lambda: peft.TinyLoraConfig(target_modules=["q_proj"]),
    "unilora": lambda: peft.UniLoraConfig(target_modules=["q_proj"]),
    "vblora": lambda: peft.VBLoRAConfig(num_vectors=8, vector_length=8, topk=2, r=2, target_modules=LINEAR),
}

CONV1D = {"c_attn": ("gpt2", ["c_attn", "c_fc"]), "qkv": ("phi3", ["qkv_proj"])}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("model") / "base", "llama-bias")


@pytest.fixture
def dora(base: Path, tmp_path: Path) -> Trained:
    return train_by_noise(base, tmp_path / "run", CONVERTIBLE["dora"]())


def stock_logits(base: Path, folder: Path, rows: int = 0) -> torch.Tensor:
    model = PeftModel.from_pretrained(load(base, rows), folder).eval()
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.parametrize("name", CONVERTIBLE)
def test_at_full_rank_stock_peft_computes_the_same(name: str, base: Path, tmp_path: Path) -> None:
    trained = train_by_noise(base, tmp_path / "run", CONVERTIBLE[name](), noise=0.02)
    folder, report = export_lora(trained.run, LoraOptions(rank=64))
    assert apart(stock_logits(base, folder), trained.logits) < 1e-5
    assert report.proof.kl < 1e-9 and report.proof.top1_agreement == 1.0 and report.proof.update_error < 1e-3
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"], config["use_dora"]) == ("LORA", 64, 64, False)
    assert config["base_model_name_or_path"] == str(base)
    assert not config["rank_pattern"] and not config["alpha_pattern"]


@pytest.mark.parametrize("layers", CONV1D)
def test_layers_that_store_their_weights_otherwise(layers: str, tmp_path: Path) -> None:
    kind, targets = CONV1D[layers]
    base = make_base(tmp_path / "base", kind)
    config = LoraConfig(r=4, target_modules=targets, use_dora=True, fan_in_fan_out=kind == "gpt2")
    trained = train_by_noise(base, tmp_path / "run", config)
    folder, _ = export_lora(trained.run, LoraOptions(rank=64))
    assert apart(stock_logits(base, folder), trained.logits) < 1e-5


@pytest.mark.parametrize("kind", ["llama", "llama-tied"])
@pytest.mark.parametrize("beside", [False, True], ids=["in one file", "beside"])
def test_embeddings_of_added_tokens_come_along(kind: str, beside: bool, tmp_path: Path) -> None:
    base, ids = make_base(tmp_path / "base", kind), [VOCABULARY, VOCABULARY + 1]
    names = ["embed_tokens"] if kind == "llama-tied" else ["embed_tokens", "lm_head"]
    run = tmp_path / "run"
    if beside:
        rows = peft.TrainableTokensConfig(target_modules=names, token_indices=ids)
        train_by_noise(base, run / "token_rows", rows, ids[-1] + 1, noise=0.5)
        grown = PeftModel.from_pretrained(load(base, ids[-1] + 1), run / "token_rows").merge_and_unload()
        grown.save_pretrained(tmp_path / "grown")
        trained = train_by_noise(tmp_path / "grown", run, peft.LoHaConfig(r=4, target_modules=LINEAR), noise=0.02)
        point_at(run, base)
    else:
        token_ids = dict.fromkeys(names, ids)
        config = LoraConfig(r=4, target_modules=LINEAR, use_dora=True, trainable_token_indices=token_ids)
        trained = train_by_noise(base, run, config, ids[-1] + 1, noise=0.5)
    folder, report = export_lora(run, LoraOptions(rank=64))
    assert report.added_tokens == ids
    assert apart(stock_logits(base, folder, ids[-1] + 1), trained.logits) < 1e-4
    assert "embeddings of new tokens" in " ".join(report.vllm_reasons) and report.vllm is None


def point_at(run: Path, base: Path) -> None:
    config = json.loads((run / "adapter_config.json").read_text())
    (run / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": str(base)}))


def test_the_smallest_sufficient_rank_is_found(dora: Trained) -> None:
    folder, report = export_lora(dora.run, LoraOptions(tolerance=1e-3))
    by_rank = {one.rank: one for one in report.tried}
    assert by_rank[report.rank].within(1e-3) and not by_rank[report.rank // 2].within(1e-3)
    # The proof's figures, from stock PEFT on prompts of the test's own.
    expected, found = dora.logits.double().log_softmax(-1), stock_logits(dora.base, folder).double().log_softmax(-1)
    kl = float((expected.exp() * (expected - found)).sum(-1).mean())
    assert report.proof.kl / 5 < kl < report.proof.kl * 5
    assert report.vllm is not None and f"--max-lora-rank {max(8, report.rank)}" in report.vllm
    assert json.loads((folder / "lora_conversion.json").read_text()) == json.loads(json.dumps(report.as_dict()))


def test_a_rank_beyond_the_tolerance_is_refused_and_leaves_nothing(dora: Trained) -> None:
    before = sorted(dora.run.rglob("*"))
    with pytest.raises(VerificationError, match=r"rank 1 does not compute .* Rank \d+ is within the tolerance"):
        export_lora(dora.run, LoraOptions(rank=1, tolerance=1e-6))
    with pytest.raises(VerificationError, match="No rank up to it"):
        export_lora(dora.run, LoraOptions(tolerance=1e-300))
    assert sorted(dora.run.rglob("*")) == before


def test_a_lora_of_a_higher_rank_becomes_one_of_a_lower(base: Path, tmp_path: Path) -> None:
    trained = train_by_noise(base, tmp_path / "run", LoraConfig(r=16, target_modules=LINEAR, use_rslora=True))
    with pytest.raises(UserError, match="a plain LoRA of rank 16 already"):
        export_lora(trained.run, LoraOptions())
    with pytest.raises(UserError, match="has rank 16 already"):
        export_lora(trained.run, LoraOptions(rank=16))
    folder, report = export_lora(trained.run, LoraOptions(rank=8, tolerance=1.0))
    assert 0 < apart(stock_logits(base, folder), trained.logits) < 0.5
    assert report.parameters_after == report.parameters_before // 2
    # The best approximation of rank 8 that there is, by the singular values of what stock PEFT added.
    before, after = load(base).state_dict(), trained.merged
    left_out = total = 0.0
    for name in before:
        values = torch.linalg.svdvals((after[name] - before[name]).double()) if before[name].dim() == 2 else None
        if values is not None:
            left_out, total = left_out + float(values[8:].square().sum()), total + float(values.square().sum())
    assert report.proof.update_error == pytest.approx((left_out / total) ** 0.5, rel=1e-3)


def test_peft_itself_leaves_out_the_magnitudes_of_dora(dora: Trained) -> None:
    """Once PEFT's conversion of DoRA is exact, the sentence about it in `export/lora.py` can go."""
    model = PeftModel.from_pretrained(load(dora.base), dora.run).eval()
    config, tensors = convert_to_lora(model, rank=32)
    converted = peft.get_peft_model(load(dora.base), config)
    peft.set_peft_model_state_dict(converted, {name.replace("default.", ""): value for name, value in tensors.items()})
    with torch.no_grad():
        assert apart(converted.eval()(IDS).logits, dora.logits) > 1e-3


@pytest.mark.parametrize("name", ADAPTERS)
def test_what_is_refused_is_what_peft_refuses(name: str) -> None:
    model = random_model("llama", VOCABULARY)
    config = ADAPTERS[name](**({"r": 4} if name == "lora_ga" else {})).peft_config(model_shape(model))
    if config is None:
        config = peft.TrainableTokensConfig(target_modules=["embed_tokens"], token_indices=[1])
    config.task_type = "CAUSAL_LM"
    if name in ("pissa", "olora", "corda", "lora_ga", "eva", "loftq"):
        config.init_lora_weights = True
    if name == "adalora":
        config.total_step = 10
    layers = [module for module in peft.get_peft_model(model, config).modules() if isinstance(module, BaseTunerLayer)]
    converts = bool(layers) and all(layer.supports_lora_conversion("default") for layer in layers)
    assert (unconvertible(str(config.peft_type.value)) is None) == converts


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "ia3": (lambda: peft.IA3Config(target_modules=LINEAR, feedforward_modules=["down_proj"]), "scales activations"),
    "shira": (lambda: peft.ShiraConfig(r=2, target_modules=["q_proj"]), "sparse"),
    "hira": (lambda: peft.HiraConfig(r=4, target_modules=LINEAR), "multiplies the weight"),
    "prompts": (lambda: peft.PromptTuningConfig(num_virtual_tokens=4), "before the prompt"),
    "biases": (lambda: LoraConfig(target_modules=LINEAR, use_dora=True, bias="lora_only"), "trained biases"),
    "embeddings": (
        lambda: LoraConfig(target_modules=["embed_tokens"], use_dora=True),
        "on model.embed_tokens (Embedding)",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_converted_is_one_message(
    name: str, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, why = REFUSED[name]
    settings = config()
    settings.task_type = "CAUSAL_LM"
    run = tmp_path / "run"
    peft.get_peft_model(load(base), settings).save_pretrained(run, save_embedding_layers=False)
    point_at(run, base)
    done = peftchat_in_process(capsys, "export", run, "--to", "lora")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("Error: ") and why in done.stderr and "Traceback" not in done.stderr
    assert not (run / "lora").exists() and not list(run.glob("*.partial*"))


@pytest.mark.parametrize(
    ("arguments", "status", "why"),
    [
        (("--rank", "0"), 2, "expected at least 1"),
        (("--rank", "65"), 2, "no adapted matrix has one above 64"),
        (("--tolerance", "nan"), 2, "the tolerance is nan"),
        (("--type", "f16"), 2, "float32"),
        (("-o", "{run}"), 2, "the output is the run itself"),
        (("-o", "{base}"), 2, "the output is the base model itself"),
        (("-o", "{run}/token_rows"), 2, "would be taken for the run's own embeddings"),
        (("-o", "{other}", "--overwrite"), 2, "not a converted adapter of peftchat's"),
        (("-o", "{other}"), 2, "already exists"),
        (("--rank", "1", "--tolerance", "1e-9"), 1, "is within the tolerance"),
    ],
)
def test_mistakes_are_one_message(
    arguments: tuple[str, ...], status: int, why: str, dora: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "mine.txt").write_text("mine")
    given = [one.format(run=dora.run, base=dora.base, other=other) for one in arguments]
    done = peftchat_in_process(capsys, "export", dora.run, "--to", "lora", *given)
    assert (done.returncode, done.stdout) == (status, "")
    said = " ".join(done.stderr.split())
    assert said.startswith("Error: " if status == 2 else "Failed: ") and why in said and "Traceback" not in said
    assert [file.name for file in other.iterdir()] == ["mine.txt"] and not (dora.run / "lora").exists()


def test_overwrite_replaces_a_conversion_and_nothing_else(dora: Trained, capsys: pytest.CaptureFixture[str]) -> None:
    first, _ = export_lora(dora.run, LoraOptions(rank=8, tolerance=1.0))
    done = peftchat_in_process(capsys, "export", dora.run, "--to", "lora", "--overwrite", "--rank", "64", "--json")
    assert done.returncode == 0 and json.loads(done.stdout)["rank"] == 64
    assert json.loads((first / "adapter_config.json").read_text())["r"] == 64
    (first / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match=r"holds `mine.txt`"):
        export_lora(dora.run, LoraOptions(overwrite=True))
    assert not list(dora.run.glob("lora.*"))


def test_a_base_that_has_moved_is_named(dora: Trained, tmp_path: Path) -> None:
    moved = shutil.copytree(dora.base, tmp_path / "moved")
    point_at(dora.run, tmp_path / "gone")
    with pytest.raises(UserError, match="gone"):
        export_lora(dora.run, LoraOptions(rank=64))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)  # The file is read from any folder.
        folder, report = export_lora(dora.run, LoraOptions(rank=64, base="moved"))
    written = json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert written == report.base == str(moved) and apart(stock_logits(moved, folder), dora.logits) < 1e-5


def test_a_disk_without_room_is_one_message(dora: Trained) -> None:
    # A limit of the process on the size of files does what a full disk does.
    former, limits = signal.signal(signal.SIGXFSZ, signal.SIG_IGN), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(UserError, match="cannot write: "):
            export_lora(dora.run, LoraOptions())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, former)
    assert not list(dora.run.glob("lora*"))


def test_stacked_experts_are_refused_and_attention_beside_them_is_not(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "qwen3_moe")
    experts = LoraConfig(r=2, target_modules=["q_proj"], target_parameters=["mlp.experts.gate_up_proj"])
    with pytest.raises(UserError, match="stacked experts"):
        export_lora(train_by_noise(base, tmp_path / "experts", experts).run, LoraOptions())
    attention = train_by_noise(base, tmp_path / "run", LoraConfig(r=2, target_modules=["q_proj"], use_dora=True))
    folder, _ = export_lora(attention.run, LoraOptions(rank=64))
    assert apart(stock_logits(base, folder), attention.logits) < 1e-5
