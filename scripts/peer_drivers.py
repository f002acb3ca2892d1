"""Train with a peer and measure it, in the peer's own environment; `scripts/bench_peers.py` starts this.

    FOLDER/llamafactory/bin/python scripts/peer_drivers.py "LLaMA-Factory packed" spec.json

Rows come with their token ids and labels, so every peer computes the same tokens. Every optimizer's step is a mark of
the clock, whatever loop runs around it. Besides seconds, CPU seconds of the process are measured, because other work on
the machine does not change them much. Only the standard library and the peer are imported.
"""

import argparse
import json
import re
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from importlib.machinery import ModuleSpec
from importlib.util import find_spec, module_from_spec
from pathlib import Path
from typing import Any

BEGAN = time.time()
IGNORED = -100

Row = Mapping[str, list[int]]


class Enough(Exception):
    """All steps are done; what a peer would do behind them is not measured."""


class Clock:
    """Marks the end of every optimizer step, and counts the tokens of every micro-batch.

    Attributes:
        stamps: time at the end of each step.
        cpu_stamps: CPU seconds of the process at the end of each step.
        counts: for each micro-batch the step it belongs to, real tokens and supervised tokens.
        losses: of each step.
        hook: what `remove` ends the marks with.
    """

    def __init__(self, steps: int, *, ends: bool = False) -> None:
        from torch.optim.optimizer import register_optimizer_step_post_hook

        self.stamps: list[float] = []
        self.cpu_stamps: list[float] = []
        self.counts: list[tuple[int, int, int]] = []
        self.losses: list[float] = []
        self._steps, self._ends = steps, ends
        self.hook = register_optimizer_step_post_hook(self._stamp)

    def _stamp(self, *_: Any) -> None:
        self.stamps.append(time.time())
        self.cpu_stamps.append(time.process_time())
        if self._ends and len(self.stamps) == self._steps:
            raise Enough

    def count(self, rows: Sequence[Row], batch: int, seen: int) -> None:
        """Count the rows of a micro-batch that begins behind so many rows, with so many rows in a step."""
        supervised = sum(label != IGNORED for row in rows for label in row["labels"][1:])
        # Padding of packs is no real token; a pack's mask marks it with 0.
        real = sum(sum(map(bool, row.get("attention_mask") or [1] * len(row["input_ids"]))) for row in rows)
        self.counts.append((seen // batch, real, supervised))

    @property
    def cpu_share(self) -> float:
        """CPU seconds of the process per second behind the first step."""
        return (self.cpu_stamps[-1] - self.cpu_stamps[0]) / (self.stamps[-1] - self.stamps[0])

    def measured(self) -> dict[str, Any]:
        """Return what `bench_train.Measured` has, and `cpu_share`."""
        seconds = self.stamps[-1] - self.stamps[0]
        later = [count for count in self.counts if 0 < count[0] < len(self.stamps)]
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
        peak = re.search(r"^VmHWM:\s+(\d+) kB", status, re.MULTILINE)
        return {
            "speed": sum(real for _, real, _ in later) / seconds,
            "supervised": sum(supervised for _, _, supervised in later) / seconds,
            "peak": int(peak[1]) * 1024 if peak else 0,
            "to_first_step": self.stamps[0] - BEGAN,
            "losses": self.losses,
            "utilization": None,
            "cpu_share": self.cpu_share,
        }


def packs(rows: Sequence[Row], size: int) -> list[dict[str, list[int]]]:
    """Return packs of so many rows in LLaMA-Factory's form: the mask numbers the rows, and padding fills up to 8."""
    found = []
    for first in range(0, len(rows), size):
        pack: dict[str, list[int]] = {"input_ids": [], "labels": [], "attention_mask": [], "position_ids": []}
        for number, row in enumerate(rows[first : first + size], start=1):
            length = len(row["input_ids"])
            pack["input_ids"] += row["input_ids"]
            # The first token of a row is not the target of the last one of the row before it.
            pack["labels"] += [IGNORED, *row["labels"][1:]]
            pack["attention_mask"] += [number] * length
            pack["position_ids"] += range(length)
        missing = -len(pack["input_ids"]) % 8
        for name, filler in (("input_ids", 0), ("labels", IGNORED), ("attention_mask", 0), ("position_ids", 0)):
            pack[name] += [filler] * missing
        found.append(pack)
    return found


def llamafactory(spec: Mapping[str, Any], rows: Sequence[Row], *, packed: bool) -> dict[str, Any]:
    """Run LLaMA-Factory's `sft` stage on rows that are encoded already (its `tokenized_path`)."""
    if find_spec("torchaudio") is None:
        # It imports it for recordings, which these rows have none of, and no build may fit a torch for CPUs.
        sys.modules["torchaudio"] = module_from_spec(ModuleSpec("torchaudio", None))
    from datasets import Dataset, DatasetDict
    from llamafactory.data import collator as collators
    from llamafactory.train.tuner import run_exp
    from transformers import TrainerCallback

    folder, batch = Path(spec["folder"]), spec["batch"]
    data = packs(rows, batch) if packed else [{**row, "attention_mask": [1] * len(row["input_ids"])} for row in rows]
    DatasetDict({"train": Dataset.from_list(data)}).save_to_disk(str(folder / "tokenized"))
    model = folder / "model"
    shutil.copytree(spec["model"], model)
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    # It computes in the dtype that the config names.
    config["dtype"] = config["torch_dtype"] = spec["dtype"]
    (model / "config.json").write_text(json.dumps(config), encoding="utf-8")
    clock = Clock(spec["steps"])

    class Losses(TrainerCallback):
        def on_log(self, *_: Any, logs: Mapping[str, float], **__: Any) -> None:
            clock.losses += [logs["loss"]] if "loss" in logs else []

    size = 1 if packed else batch
    collate = collators.SFTDataCollatorWith4DAttentionMask.__call__

    def counted(self: Any, features: list[dict[str, Any]]) -> Any:
        clock.count(features, size, len(clock.counts) * size)
        return collate(self, features)

    collators.SFTDataCollatorWith4DAttentionMask.__call__ = counted
    settings: dict[str, Any] = {
        "stage": "sft", "do_train": True, "model_name_or_path": str(model), "template": "chatml", "dataset": "rows",
        "tokenized_path": str(folder / "tokenized"), "output_dir": str(folder / "output"),
        "finetuning_type": "full" if spec["method"] == "full" else "lora",
        "per_device_train_batch_size": size, "gradient_accumulation_steps": 1, "max_steps": spec["steps"],
        "learning_rate": spec["rate"], "lr_scheduler_type": "constant", "logging_steps": 1, "save_strategy": "no",
        "report_to": "none", "optim": "adamw_torch", "seed": 0, "disable_shuffling": True,
        "use_cpu": not spec["on_gpu"], "bf16": spec["dtype"] == "bfloat16",
    }  # fmt: skip
    if spec["method"] != "full":
        settings |= {"lora_rank": 16, "lora_alpha": 32, "lora_target": "all", "lora_dropout": 0.0}
    if spec["method"] == "qlora":
        settings |= {"quantization_bit": 4, "double_quantization": True}
    if packed:
        longest = max(len(pack["input_ids"]) for pack in data)
        settings |= {"packing": True, "neat_packing": True, "cutoff_len": longest}
        settings |= {"disable_gradient_checkpointing": True}
    run_exp(args=settings, callbacks=[Losses()])
    return clock.measured()


def litgpt(spec: Mapping[str, Any], rows: Sequence[Row]) -> dict[str, Any]:
    """Run LitGPT's fine-tuning with one row in a micro-batch, so that nothing is padded."""
    import torch
    from litgpt.args import EvalArgs, TrainArgs
    from litgpt.data import DataModule
    from litgpt.data.base import get_sft_collate_fn
    from litgpt.finetune import full, lora
    from litgpt.scripts.convert_hf_checkpoint import convert_hf_checkpoint
    from torch.utils.data import DataLoader

    folder, batch = Path(spec["folder"]), spec["batch"]
    checkpoint = folder / spec["litgpt_config"]
    shutil.copytree(spec["model"], checkpoint)
    convert_hf_checkpoint(checkpoint, model_name=spec["litgpt_config"])
    program = full if spec["method"] == "full" else lora
    clock, losses, collate = Clock(spec["steps"], ends=True), [], get_sft_collate_fn()
    compute = program.chunked_cross_entropy

    def noted(*args: Any, **kwargs: Any) -> Any:
        loss = compute(*args, **kwargs)
        if torch.is_grad_enabled():
            losses.append(loss.item())
        return loss

    program.chunked_cross_entropy = noted

    class Rows(DataModule):
        def connect(self, *_: Any, **__: Any) -> None:
            pass

        def _loader(self, chosen: Sequence[Row], counts: bool) -> DataLoader:
            def collated(samples: list[dict[str, Any]]) -> Any:
                if counts:
                    clock.count([sample["row"] for sample in samples], batch, len(clock.counts))
                return collate(samples)

            samples = [
                {
                    "input_ids": torch.tensor(row["input_ids"]), "labels": torch.tensor(row["labels"]), "row": row,
                    "token_counts": {"raw": len(row["input_ids"]), "raw_plus_prompt_template": len(row["input_ids"])},
                }
                for row in chosen
            ]  # fmt: skip
            return DataLoader(samples, batch_size=1, collate_fn=collated)

        def train_dataloader(self) -> DataLoader:
            return self._loader(rows, counts=True)

        def val_dataloader(self) -> DataLoader:
            return self._loader(rows[:1], counts=False)

    options: dict[str, Any] = {}
    if spec["method"] != "full":
        names = ("query", "key", "value", "projection", "mlp")
        options = {"lora_r": 16, "lora_alpha": 32, "lora_dropout": 0.0, **{f"lora_{name}": True for name in names}}
    if spec["method"] == "qlora":
        options["quantize"] = "bnb.nf4-dq"
    with suppress(Enough):
        program.setup(
            checkpoint_dir=checkpoint, out_dir=folder / "output", devices=1, data=Rows(), seed=0,
            precision="bf16-true" if spec["dtype"] == "bfloat16" else "32-true",
            train=TrainArgs(
                save_interval=None, log_interval=1, global_batch_size=batch, micro_batch_size=1, lr_warmup_steps=1,
                epochs=2, max_steps=spec["steps"] + 1, max_seq_length=None,
            ),
            eval=EvalArgs(interval=10**6, max_new_tokens=1, max_iters=1),
            optimizer={"class_path": "torch.optim.AdamW", "init_args": {"lr": spec["rate"], "weight_decay": 0.0}},
            **options,
        )  # fmt: skip
    clock.losses = [sum(losses[first : first + batch]) / batch for first in range(0, batch * spec["steps"], batch)]
    return clock.measured()


def torchtune(spec: Mapping[str, Any], rows: Sequence[Row]) -> dict[str, Any]:
    """Find out whether torchtune's last release can be imported, which a current torchao prevents."""
    import torchtune  # noqa: F401

    raise SystemExit("torchtune can be imported here; this script cannot hand it encoded rows yet")


def trl(spec: Mapping[str, Any], rows: Sequence[Row], name: str) -> dict[str, Any]:
    """Run TRL as `bench_train.py` does."""
    import bench_train

    clock = Clock(spec["steps"])
    settings = argparse.Namespace(**spec, max_length=1024)
    found: dict[str, Any] = bench_train.train_with_trl(name, spec["method"], Path(spec["rows"]), settings)
    return {**found, "cpu_share": clock.cpu_share}


def peftchat(spec: Mapping[str, Any], rows: Sequence[Row]) -> dict[str, Any]:
    """Run the command `peftchat train` in this process, on the rows of a recipe."""
    from peftchat.cli.main import cli

    clock = Clock(spec["steps"])
    cli(["train", spec["recipe"]], standalone_mode=False)
    run = Path(json.loads(Path(spec["recipe"]).read_text(encoding="utf-8"))["output_dir"])
    summary = json.loads((run / "run.json").read_text(encoding="utf-8"))
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    steps = [line for line in lines if "loss" in line]
    tokens = sum(line["tokens"] for line in steps[1:])
    speed = tokens / (clock.stamps[-1] - clock.stamps[0])
    supervised = sum(line["tokens"] * line["supervised_share"] for line in steps[1:]) / tokens
    return {
        "speed": speed, "supervised": speed * supervised, "peak": summary["peak_memory_bytes"],
        "to_first_step": clock.stamps[0] - BEGAN, "losses": [line["loss"] for line in steps], "utilization": None,
        "cpu_share": clock.cpu_share,
    }  # fmt: skip


DRIVERS: Mapping[str, Callable[[Mapping[str, Any], Sequence[Row]], dict[str, Any]]] = {
    "LLaMA-Factory": lambda spec, rows: llamafactory(spec, rows, packed=False),
    "LLaMA-Factory packed": lambda spec, rows: llamafactory(spec, rows, packed=True),
    "LitGPT": litgpt,
    "torchtune": torchtune,
    "TRL": lambda spec, rows: trl(spec, rows, "trl"),
    "TRL padding-free": lambda spec, rows: trl(spec, rows, "trl tuned"),
    "peftchat": peftchat,
    "peftchat compiled": peftchat,
}


def main() -> None:
    """Train as a file says, and print what was measured as the last line."""
    name, file = sys.argv[1:]
    spec = json.loads(Path(file).read_text(encoding="utf-8"))
    lines = Path(spec["rows"]).read_text(encoding="utf-8").splitlines()
    print("\n" + json.dumps(DRIVERS[name](spec, [json.loads(line) for line in lines])), flush=True)


if __name__ == "__main__":
    main()
