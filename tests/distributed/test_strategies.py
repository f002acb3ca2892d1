"""Every method, tied and untied, under DDP and ZeRO: new tokens train, nothing else does, stock libraries agree."""

from itertools import product
from pathlib import Path

import pytest

from tests.support.checks import check_run
from tests.support.cli import peftchat, start
from tests.support.data import read_json_lines, write_small_talk
from tests.support.launch import free_port, peftchat_in_processes
from tests.support.models import small_model
from tests.support.recipes import write_training_recipe

pytestmark = pytest.mark.distributed


_CELLS = [
    *product(("full", "lora", "qlora"), ("tied", "untied"), ("zero3",)),
    # ZeRO-3 shards the embeddings themselves; for the others, each method meets one kind of them.
    ("full", "tied", "ddp"), ("lora", "untied", "ddp"), ("qlora", "tied", "ddp"),
    ("full", "untied", "zero2"), ("lora", "tied", "zero2"), ("qlora", "untied", "zero2"),
]  # fmt: skip


@pytest.mark.parametrize(("method", "embeddings", "strategy"), _CELLS)
def test_stock_libraries_see_what_was_trained(
    method: str, embeddings: str, strategy: str, conversations: Path, held_out: Path, tmp_path: Path
) -> None:
    tied = embeddings == "tied"
    base, run = small_model(tied=tied), tmp_path / "run"
    recipe = write_training_recipe(
        tmp_path / "recipe.yaml", base, conversations, held_out, run,
        method=method, distributed={"strategy": strategy, "processes": 2},
    )  # fmt: skip
    # `peftchat train` starts two interpreters by itself; one cell pays for them.
    if (method, embeddings, strategy) == ("lora", "untied", "zero3"):
        # A process that was killed while DeepSpeed compiled has left its lock behind.
        kernels = tmp_path / "kernels"
        lock = kernels / "deepspeed_cpu_adam" / "lock"
        lock.parent.mkdir(parents=True)
        lock.touch()
        done = peftchat("train", recipe, TORCH_EXTENSIONS_DIR=str(kernels))
        assert not lock.exists()
        assert list(kernels.iterdir()) == [lock.parent], "a kernel was compiled that nothing uses"
    else:
        done = peftchat_in_processes(2, "train", recipe)
    assert done.returncode == 0, done.stderr
    assert not done.stdout
    check_run(run, base, held_out, method=method, tied=tied, processes=2)


def test_every_strategy_takes_the_same_steps(tmp_path: Path) -> None:
    """DDP and ZeRO-3 shard the work, not the result: the losses of every step are those of one process.

    The last step of each epoch has one conversation, so that one of two processes has none. Behind step 7, one process
    goes on with what two have written; norms have no weight decay.
    """
    base, train = small_model(tied=False), write_small_talk(tmp_path / "train.jsonl", 5)
    losses = {}
    for name, strategy, processes, steps, *flags in (
        ("one", "single", 1, 10),
        ("two", "zero3", 2, 7),
        ("two", "zero3", 1, 10, "--resume", "--allow-changed"),
    ):
        run = tmp_path / name
        recipe = write_training_recipe(
            tmp_path / f"{name}.yaml", base, train, None, run, method="full",
            distributed={"strategy": strategy, "processes": processes},
            training={
                "gradient_accumulation_steps": 2 // processes, "per_device_train_batch_size": 1, "max_steps": steps,
                "weight_decay": 0.5, "save_strategy": "steps", "save_steps": 7,
            },
            data={"packing": False},
        )  # fmt: skip
        done = peftchat_in_processes(processes, "train", recipe, *flags)
        assert done.returncode == 0, done.stderr
        losses[name] = [line["loss"] for line in read_json_lines(run / "metrics.jsonl")]
    assert "Weights, optimizer and steps carry over exactly" in " ".join(done.stderr.split())
    assert not list((tmp_path / "two" / "checkpoints").glob("*/.universal"))
    assert losses["two"] == pytest.approx(losses["one"], rel=1e-4)


_SMALL_ADAPTERS = """
import deepspeed, sys, torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers.integrations import HfDeepSpeedConfig
from peftchat.models.fused_lora import fuse_lora_forward

config = {
    "train_micro_batch_size_per_gpu": 1, "bf16": {"enabled": True},
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
}
in_use = HfDeepSpeedConfig(config)
x = torch.randn(400, 256, generator=torch.Generator().manual_seed(3)).bfloat16()

def output(scale, is_fused):
    torch.manual_seed(0)
    model = get_peft_model(nn.Sequential(nn.Linear(256, 192)), LoraConfig(r=8, lora_alpha=16, target_modules=["0"]))
    with torch.no_grad():
        model.base_model.model[0].lora_B["default"].weight.normal_().mul_(scale)
    if is_fused:
        assert fuse_lora_forward(model) == 1
    engine = deepspeed.initialize(model=model, config=config)[0]
    assert all(parameter.numel() == 0 for parameter in model.parameters())
    return engine(x).detach().float()

for is_fused in (False, True):
    none, small, large = (output(scale, is_fused) for scale in (0.0, 1e-4, 1.0))
    share = ((small - none) * (large - none)).sum() / (large - none).square().sum() * 1e4
    print(float(share), file=sys.stderr)
"""


def test_a_small_adapter_counts_in_bfloat16_under_zero3() -> None:
    """An adapter that adds less than half a unit in the last place, whose weights are gathered with the base's."""
    variables = {
        "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()),
    }  # fmt: skip
    done = start("-c", _SMALL_ADAPTERS, environment=variables)
    _, stderr = done.communicate()
    assert done.wait() == 0, stderr
    of_peft, ours = map(float, stderr.split()[-2:])
    # PEFT loses most of it; where this fails, it does no more.
    assert of_peft < 0.5
    assert 0.9 < ours < 1.1


def test_an_error_in_many_processes_is_told_once(conversations: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.jsonl"
    broken.write_text("{not json}\n")
    recipe = write_training_recipe(
        tmp_path / "recipe.yaml", small_model(), broken, None, tmp_path / "run",
        distributed={"strategy": "ddp", "processes": 2},
    )  # fmt: skip
    done = peftchat("train", recipe)
    assert done.returncode == 2, done.stderr
    assert "JSON" in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.count("Error:") == 1
    assert not done.stdout
    assert not (tmp_path / "run").exists()
