"""Combined adapters: stock PEFT loads the result, and it computes what the rule says of the exact updates."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from peft import LoraConfig, PeftModel
from peft.utils import merge_utils
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from peftchat.errors import UserError, VerificationError
from peftchat.export.combine import CombineOptions, combine_into_adapter, combine_into_model
from peftchat.merging.combination import Combination
from peftchat.merging.combined_inputs import overlaps
from tests.support.adapters import IDS, VOCABULARY, apart, load, make_base, merged_logits, oracle, train_by_noise
from tests.support.in_process import peftchat_in_process
from tests.support.recipes import write_recipe

LINEAR = ["q_proj", "v_proj", "down_proj"]
WEIGHTS = [0.7, -0.4]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("model") / "base", "llama-bias")


@pytest.fixture(scope="module")
def runs(base: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two LoRAs of other ranks, scales and layers."""
    folder = tmp_path_factory.mktemp("runs")
    one = LoraConfig(r=4, lora_alpha=6, target_modules=LINEAR, rank_pattern={"q_proj": 3})
    other = LoraConfig(r=6, lora_alpha=5, target_modules=["q_proj", "o_proj", "down_proj"], use_rslora=True)
    train_by_noise(base, folder / "one", one, noise=0.1)
    train_by_noise(base, folder / "other", other, noise=0.12)
    return [folder / "one", folder / "other"]


def stock_logits(base: Path, folder: Path, rows: int = 0) -> torch.Tensor:
    model = PeftModel.from_pretrained(load(base, rows), folder).eval()
    with torch.no_grad():
        return model(IDS).logits


def stock_updates(base: Path, run: Path) -> dict[str, torch.Tensor]:
    """What stock PEFT adds to each weight, in float64."""
    before, after = load(base).double().state_dict(), PeftModel.from_pretrained(load(base).double(), run)
    merged = after.double().merge_and_unload().state_dict()
    found = {name: merged[name] - before[name] for name in before}
    return {name: update for name, update in found.items() if bool(update.any())}


def moved_logits(base: Path, updates: dict[str, torch.Tensor]) -> torch.Tensor:
    model = load(base)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in updates:
                parameter.copy_((parameter.double() + updates[name]).float())
        return model(IDS).logits


def test_linear_is_the_weighted_sum_of_the_updates_at_the_sum_of_the_ranks(
    base: Path, runs: list[Path], tmp_path: Path
) -> None:
    report = combine_into_adapter(runs, CombineOptions(tmp_path / "both", weights=WEIGHTS))
    assert report.is_exact and report.rank == 10 and report.worst_layer[1] < 1e-6
    assert report.proof.kl < 1e-9 and report.proof.top1_agreement == 1.0
    found = stock_updates(base, tmp_path / "both")
    one, other = (stock_updates(base, run) for run in runs)
    assert found.keys() == one.keys() | other.keys()
    for name, update in found.items():
        expected = sum(weight * part[name] for weight, part in zip(WEIGHTS, (one, other), strict=True) if name in part)
        assert float((update - expected).norm() / expected.norm()) < 1e-5
        assert report.layer_errors[name.removesuffix(".weight")] < 1e-6
    config = json.loads((tmp_path / "both" / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"], config["use_rslora"]) == ("LORA", 10, 10, False)
    assert json.loads((tmp_path / "both" / "combination.json").read_text()) == json.loads(json.dumps(report.as_dict()))


def test_peft_s_cat_is_the_same_and_its_linear_is_not(base: Path, tmp_path: Path) -> None:
    """Once PEFT's `linear` is exact, the sentences about it in `combination.py` and docs/merge.md can go."""
    runs = [tmp_path / "one", tmp_path / "other"]
    for run, noise in zip(runs, (0.1, -0.13), strict=True):
        train_by_noise(base, run, LoraConfig(r=4, lora_alpha=6, target_modules=LINEAR), noise=noise)
    combine_into_adapter(runs, CombineOptions(tmp_path / "both", weights=[0.6, 0.4]))
    model = PeftModel.from_pretrained(load(base), runs[0], adapter_name="one")
    model.load_adapter(runs[1], adapter_name="other")
    logits = {}
    for kind in ("cat", "linear"):
        model.add_weighted_adapter(["one", "other"], [0.6, 0.4], kind, combination_type=kind)
        model.set_adapter(kind)
        with torch.no_grad():
            logits[kind] = model.eval()(IDS).logits
    found = stock_logits(base, tmp_path / "both")
    assert apart(found, logits["cat"]) < 1e-5 < 1e-3 < apart(found, logits["linear"])


def by_hand(rule: str, density: float, updates: Sequence[np.ndarray], weights: Sequence[float]) -> np.ndarray:
    """Entry by entry, from the papers."""
    kept = []
    for update, weight in zip(updates, weights, strict=True):
        least = np.sort(np.abs(update).ravel())[-int(density * update.size)]
        kept.append(weight * np.where(np.abs(update) >= least, update, 0))
    if rule == "magnitude_prune":
        return sum(kept)
    result = np.zeros_like(kept[0])
    for place in np.ndindex(result.shape):
        entries = [update[place] for update in kept]
        agreeing = [entry for entry in entries if entry * (1 if sum(entries) >= 0 else -1) > 0]
        result[place] = sum(agreeing) / len(agreeing) if agreeing else 0
    return result


@pytest.mark.parametrize("rule", ["ties", "magnitude_prune"])
@pytest.mark.parametrize("weights", [[1.0, 1.0, 1.0], [0.5, 2.0, -1.0], [1.0, 0.0, 1.0]])
def test_rules_entry_by_entry(rule: str, weights: list[float]) -> None:
    draw = np.random.default_rng(0)
    updates = [draw.normal(size=(12, 9)) for _ in weights]
    parts = [(n, weight, torch.tensor(update)) for n, (weight, update) in enumerate(zip(weights, updates, strict=True))]
    found = Combination.of(rule, 0.3).combine("layer", parts).numpy()
    assert np.allclose(found, by_hand(rule, 0.3, updates, weights), atol=1e-12)
    if rule == "ties" and weights == [1.0, 1.0, 1.0]:
        stock = merge_utils.ties([update for _, _, update in parts], torch.ones(3, dtype=torch.float64), 0.3)
        assert np.allclose(found, stock.numpy(), atol=1e-12)


def test_dare_keeps_random_entries_enlarged_and_its_mean_is_the_sum() -> None:
    updates = [(0, 1.0, torch.randn(40, 30, dtype=torch.float64)), (1, -2.0, torch.randn(40, 30, dtype=torch.float64))]
    one = Combination.of("dare_linear", 0.4, seed=1).combine("layer", updates[:1])
    kept = one != 0
    assert torch.allclose(one[kept], updates[0][2][kept] / 0.4) and 0.3 < float(kept.double().mean()) < 0.5
    state = torch.random.get_rng_state()
    drawn = [Combination.of("dare_linear", 0.4, seed=seed).combine("layer", updates) for seed in range(100)]
    assert torch.equal(state, torch.random.get_rng_state())
    total = updates[0][2] - 2 * updates[1][2]
    deviation = (torch.stack(drawn).mean(0) - total) / torch.stack(drawn).std(0) * 10
    assert 0.85 < float(deviation.std()) < 1.15
    assert torch.equal(drawn[3], Combination.of("dare_linear", 0.4, seed=3).combine("layer", updates))
    assert not torch.equal(drawn[3], Combination.of("dare_linear", 0.4, seed=3).combine("other layer", updates))


@pytest.mark.parametrize("rule", ["ties", "dare_linear"])
def test_adapter_and_merged_weights_compute_the_same(rule: str, base: Path, runs: list[Path], tmp_path: Path) -> None:
    options = CombineOptions(tmp_path / "adapter", rule, density=0.6, rank=64)
    report = combine_into_adapter(runs, options)
    assert report.proof.kl < 1e-9 and not report.is_exact
    result, losses = combine_into_model(runs, CombineOptions(tmp_path / "model", rule, density=0.6))
    assert apart(merged_logits(tmp_path / "model"), stock_logits(base, tmp_path / "adapter")) < 1e-5
    assert losses[0].written == pytest.approx(losses[0].combined, abs=1e-5)
    assert losses[0].adapters == pytest.approx(report.losses[0].adapters, abs=1e-5)
    assert result.report.combination == Combination(rule, 0.6)  # type: ignore[arg-type]


def test_other_variants_are_combined_by_what_they_add(base: Path, runs: list[Path], tmp_path: Path) -> None:
    train_by_noise(base, tmp_path / "dora", LoraConfig(r=4, target_modules=LINEAR, use_dora=True))
    train_by_noise(base, tmp_path / "loha", peft.LoHaConfig(r=4, target_modules=["q_proj"]), noise=0.2)
    inputs = [runs[0], tmp_path / "dora", tmp_path / "loha"]
    report = combine_into_adapter(inputs, CombineOptions(tmp_path / "all", weights=[1, 1, 0.5], rank=64))
    updates = [stock_updates(base, run) for run in inputs]
    weighted = [(1, updates[0]), (1, updates[1]), (0.5, updates[2])]
    names = {name for part in updates for name in part}
    total = {name: sum(weight * part[name] for weight, part in weighted if name in part) for name in names}
    assert apart(stock_logits(base, tmp_path / "all"), moved_logits(base, total)) < 1e-5
    assert report.proof.kl < 1e-9 and report.worst_layer[1] < 1e-4


@pytest.mark.parametrize("kind", ["llama", "llama-tied"])
def test_embeddings_of_added_tokens_are_averaged_by_weight(kind: str, tmp_path: Path) -> None:
    base, ids = make_base(tmp_path / "base", kind), [VOCABULARY, VOCABULARY + 1]
    names = ["embed_tokens"] if kind == "llama-tied" else ["embed_tokens", "lm_head"]
    runs = [tmp_path / "one", tmp_path / "other"]
    for run, noise in zip(runs, (0.3, -0.2), strict=True):
        config = LoraConfig(r=3, target_modules=LINEAR, trainable_token_indices=dict.fromkeys(names, ids))
        train_by_noise(base, run, config, ids[-1] + 1, noise=noise)
    report = combine_into_adapter(runs, CombineOptions(tmp_path / "both", weights=[0.75, 0.25]))
    assert report.added_tokens == ids
    one, other, both = (oracle(base, run, ids[-1] + 1).merged for run in (*runs, tmp_path / "both"))
    for name in [name for name in both if name.endswith(("embed_tokens.weight", "lm_head.weight"))]:
        assert torch.allclose(both[name][ids], 0.75 * one[name][ids] + 0.25 * other[name][ids], atol=1e-6)
        assert torch.equal(both[name][:VOCABULARY], one[name][:VOCABULARY])
    with pytest.raises(UserError, match=r"add up to -0\.5, expected more than 0"):
        combine_into_adapter(runs, CombineOptions(tmp_path / "minus", weights=[0.5, -1.0]))


def test_layers_that_store_their_weights_transposed(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "gpt2")
    runs = [tmp_path / "one", tmp_path / "other"]
    for run, rank in zip(runs, (2, 3), strict=True):
        config = LoraConfig(r=rank, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True)
        train_by_noise(base, run, config, noise=0.1)
    combine_into_adapter(runs, CombineOptions(tmp_path / "dare", "dare_linear", seed=5, rank=64))
    combine_into_model(runs, CombineOptions(tmp_path / "model", "dare_linear", seed=5))
    assert apart(merged_logits(tmp_path / "model"), stock_logits(base, tmp_path / "dare")) < 1e-5


def test_experts_are_combined_into_a_model_and_refused_as_an_adapter(tmp_path: Path) -> None:
    base, runs = make_base(tmp_path / "base", "qwen3_moe"), [tmp_path / "one", tmp_path / "other"]
    experts = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    for run, rank, noise in zip(runs, (2, 3), (0.1, -0.15), strict=True):
        config = LoraConfig(r=rank, target_modules=["q_proj"], target_parameters=experts)
        train_by_noise(base, run, config, noise=noise)
    with pytest.raises(UserError, match=r"stacked experts .*--as model"):
        combine_into_adapter(runs, CombineOptions(tmp_path / "both"))
    assert not (tmp_path / "both").exists()
    _, losses = combine_into_model(runs, CombineOptions(tmp_path / "model", weights=WEIGHTS))
    assert losses[0].written == pytest.approx(losses[0].combined, abs=1e-6)
    one, other = (stock_updates(base, run) for run in runs)
    total = {name: WEIGHTS[0] * one[name] + WEIGHTS[1] * other[name] for name in one}
    assert any("experts" in name for name in total)
    assert apart(merged_logits(tmp_path / "model"), moved_logits(base, total)) < 1e-5


def test_a_rank_that_is_too_low_is_refused_and_leaves_nothing(runs: list[Path], tmp_path: Path) -> None:
    with pytest.raises(VerificationError, match=r"what the combination computes.*Rank \d+ is within .*--as model"):
        combine_into_adapter(runs, CombineOptions(tmp_path / "low", rank=1, tolerance=1e-7))
    assert not list(tmp_path.iterdir())


def test_a_copy_of_the_base_is_the_same_base_and_the_search_ends_at_the_exact_rank(
    base: Path, runs: list[Path], tmp_path: Path
) -> None:
    other = shutil.copytree(runs[1], tmp_path / "other")
    config = json.loads((other / "adapter_config.json").read_text())
    copied = {**config, "base_model_name_or_path": str(shutil.copytree(base, tmp_path / "copy"))}
    (other / "adapter_config.json").write_text(json.dumps(copied))
    report = combine_into_adapter([runs[0], other], CombineOptions(tmp_path / "both", tolerance=1e-9))
    assert report.rank == 10 and report.is_exact and {one.rank for one in report.tried} == {8, 10}


def write_tokenizer(folder: Path, token: str, template: str) -> None:
    backend = Tokenizer(models.BPE(vocab={"<unk>": 0}, merges=[], unk_token="<unk>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
    tokenizer.add_special_tokens({"additional_special_tokens": [token]})
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)


def test_adapters_that_do_not_fit_together_are_one_message(runs: list[Path], tmp_path: Path) -> None:
    one, other = (shutil.copytree(run, tmp_path / run.name) for run in runs)
    write_tokenizer(one, "<|end|>", "{{ messages }}")
    write_tokenizer(other, "<|im_end|>", "{{ messages[0] }}")
    make_base(tmp_path / "base2", "llama-bias", num_hidden_layers=1)
    config = json.loads((other / "adapter_config.json").read_text())
    (other / "adapter_config.json").write_text(
        json.dumps({**config, "base_model_name_or_path": str(tmp_path / "base2")})
    )
    with pytest.raises(UserError) as refused:
        combine_into_adapter([one, other], CombineOptions(tmp_path / "both"))
    said = str(refused.value)
    assert all(part in said for part in ("another base", "'<|im_end|>', not '<|end|>'", "another chat template"))
    assert not (tmp_path / "both").exists()


MISTAKES: dict[str, tuple[tuple[str, ...], str]] = {
    "no rule": (("{one}", "{other}"), "got 2 runs, expected one"),
    "stray options": (("{one}", "--weights", "1,2", "--rank", "3"), "only --combine has these options"),
    "unknown rule": (("{one}", "{other}", "--combine", "slerp", "-o", "{out}"), "no rule 'slerp'"),
    "cat": (("{one}", "{other}", "--combine", "cat", "-o", "{out}"), "`linear` is what PEFT calls cat"),
    "no output": (("{one}", "{other}", "--combine", "linear"), "Name its folder"),
    "one run": (("{one}", "--combine", "linear", "-o", "{out}"), "expected two or more"),
    "twice": (("{one}", "{one}", "--combine", "linear", "-o", "{out}"), "named twice"),
    "words": (("{one}", "{other}", "--combine", "linear", "--weights", "a,b", "-o", "{out}"), "expected numbers"),
    "count": (("{one}", "{other}", "--combine", "linear", "--weights", "1", "-o", "{out}"), "1 weight for 2 adapters"),
    "nan": (("{one}", "{other}", "--combine", "linear", "--weights", "1,nan", "-o", "{out}"), "not a finite number"),
    "zeros": (("{one}", "{other}", "--combine", "linear", "--weights", "0,0", "-o", "{out}"), "all weights are 0"),
    "density": (("{one}", "{other}", "--combine", "linear", "--density", "0.5", "-o", "{out}"), "no density"),
    "range": (("{one}", "{other}", "--combine", "ties", "--density", "1.5", "-o", "{out}"), "at most 1"),
    "seed": (("{one}", "{other}", "--combine", "ties", "--seed", "1", "-o", "{out}"), "nothing is drawn at random"),
    "rank": (
        ("{one}", "{other}", "--combine", "linear", "--rank", "99", "-o", "{out}"),
        "no adapted matrix has one above 64",
    ),
    "blend": (("{one}", "{other}", "--combine", "linear", "--scale", "2", "-o", "{out}"), "takes the place"),
    "dtype": (("{one}", "{other}", "--combine", "linear", "--dtype", "float16", "-o", "{out}"), "`--as model`"),
    "model rank": (
        ("{one}", "{other}", "--combine", "linear", "--as", "model", "--rank", "4", "-o", "{out}"),
        "merged weights have no rank",
    ),
    "onto an input": (("{one}", "{other}", "--combine", "linear", "--overwrite", "-o", "{other}"), "is the run itself"),
    "onto the base": (("{one}", "{other}", "--combine", "linear", "--overwrite", "-o", "{base}"), "the base model"),
    "model onto an input": (
        ("{one}", "{other}", "--combine", "linear", "--as", "model", "--overwrite", "-o", "{other}"),
        "is an adapter itself",
    ),
    "foreign": (("{one}", "{other}", "--combine", "linear", "--overwrite", "-o", "{mine}"), "never replaced"),
    "no adapter": (("{one}", "{base}", "--combine", "linear", "-o", "{out}"), "not an adapter"),
    "scales activations": (("{one}", "{ia3}", "--combine", "linear", "-o", "{out}"), "`--as model`"),
}


@pytest.fixture(scope="module")
def ia3(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ia3") / "ia3"
    train_by_noise(base, folder, peft.IA3Config(target_modules=LINEAR, feedforward_modules=["down_proj"]))
    return folder


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_one_message(
    name: str, base: Path, runs: list[Path], ia3: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, why = MISTAKES[name]
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "mine.txt").write_text("mine")
    places: dict[str, Any] = {"one": runs[0], "other": runs[1], "base": base, "ia3": ia3, "mine": mine}
    given = [argument.format(**places, out=tmp_path / "out") for argument in arguments]
    before = sorted(runs[0].parent.rglob("*"))
    done = peftchat_in_process(capsys, "merge", *given)
    said = " ".join(done.stderr.split())
    assert (done.returncode, done.stdout) == (2, "") and said.startswith("Error: ") and why in said
    assert "Traceback" not in said and [path.name for path in tmp_path.iterdir()] == ["mine"]
    assert sorted(runs[0].parent.rglob("*")) == before and [file.name for file in mine.iterdir()] == ["mine.txt"]


def test_the_words_a_user_sees_and_overwriting(
    runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ("merge", *runs, "--combine", "linear", "-o", tmp_path / "both")
    done = peftchat_in_process(capsys, *given)
    assert done.returncode == 0 and done.stdout.strip() == str(tmp_path / "both"), done.stderr
    said = " ".join(done.stderr.split())
    assert "by linear, weights 0.5, 0.5: a LoRA of rank 10, which holds the result exactly." in said
    assert "same next token at 100.0%" in said and "one" in said and "combined" in said
    assert "already exists" in peftchat_in_process(capsys, *given).stderr
    again = peftchat_in_process(capsys, *given, "--overwrite", "--weights", "1,1", "--json")
    assert json.loads(again.stdout)["adapters"] == [[str(run), 1.0] for run in runs]
    model = peftchat_in_process(capsys, *given[:-1], tmp_path / "model", "--as", "model", "--no-verify", "--json")
    assert json.loads(model.stdout)["combination"] == {"rule": "linear", "density": 1.0, "seed": 0}


def test_a_run_that_begins_at_another_one_of_them_is_told(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("first", "second", "other")]
    for folder in folders:
        folder.mkdir()
        begin = {"model": {"adapter": str(folders[0])}} if folder.name == "second" else {}
        write_recipe(folder / "recipe.yaml", tmp_path / "base", tmp_path / "train.jsonl", **begin)
    (told,) = overlaps(folders)
    assert told.startswith(f"{folders[1]} begins at {folders[0]} ")
    assert not overlaps(folders[1:])
