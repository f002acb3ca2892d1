"""The held-out loss by kind of text: what stock transformers computes at the places of that kind, and it falls."""

import itertools
import json
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from peftchat.recipe import load_recipe
from peftchat.training.context import TrainOptions
from peftchat.training.train import train
from tests.support.models import small_model
from tests.support.recipes import write_training_recipe
from tests.support.stock import stock_run

ANSWER = re.compile(
    r"<\|im_start\|>assistant\n(?P<reasoning><think>.*?</think>\s*)?(?P<content>.*?)"
    r"(?P<tool_calls>\n?<tool_call>.*?)?(?P<other><\|im_end\|>)",
    re.DOTALL,
)


def write_talks(path: Path, names: list[str]) -> Path:
    """Write conversations in which a thought leads to a call, and its result to an answer."""
    records = []
    for name in names:
        call = {"type": "function", "function": {"name": "find", "arguments": {"who": name}}}
        thought = f"Look {name} up."
        looked = {"role": "assistant", "content": "Wait.", "reasoning_content": thought, "tool_calls": [call]}
        messages = [
            {"role": "user", "content": f"Where is {name}?"},
            looked,
            {"role": "tool", "content": "home"},
            {"role": "assistant", "content": f"{name} is at home."},
        ]
        records.append({"messages": messages})
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def stock_losses(model: Any, tokenizer: Any, path: Path) -> dict[str, list[float]]:
    """Return the loss of every token of each kind; the kinds are found in the text by `ANSWER`."""
    found = defaultdict(list)
    for line in path.read_text(encoding="utf-8").splitlines():
        text = tokenizer.apply_chat_template(json.loads(line)["messages"], tokenize=False)
        kinds = [""] * len(text)
        for answer in ANSWER.finditer(text):
            for kind in answer.groupdict():
                start, stop = answer.span(kind)
                kinds[start:stop] = [kind] * (stop - start)
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids = torch.tensor([encoded["input_ids"]])
        with torch.no_grad():
            losses = F.cross_entropy(model(input_ids=ids).logits[0, :-1].double(), ids[0, 1:], reduction="none")
        for (start, stop), loss in zip(encoded["offset_mapping"][1:], losses.tolist(), strict=True):
            covered = [kind for kind, _ in itertools.groupby(kinds[start:stop])]
            kind = covered[0] if len(covered) == 1 else "content"
            if kind:
                found[kind].append(loss)
    return found


@pytest.mark.parametrize("method", ["lora", "full"])
def test_each_kind_is_what_stock_computes_there_and_falls(method: str, tmp_path: Path) -> None:
    base = small_model(tied=True)
    held_out = write_talks(tmp_path / "eval.jsonl", ["Ida", "Tom"])
    recipe = write_training_recipe(
        tmp_path / "recipe.yaml",
        base,
        write_talks(tmp_path / "train.jsonl", ["Ada", "Bob", "Eva", "Max"]),
        held_out,
        tmp_path / "run",
        method=method,
        chat={"template": "chatml"},
        data={"max_length": 500},
        training={"max_steps": 30},
    )
    summary = train(load_recipe(recipe), TrainOptions())
    assert summary.eval_by is not None
    told = summary.eval_by["kind"]
    assert set(told) == {"content", "reasoning", "tool_calls", "other"}
    stock = stock_losses(*stock_run(tmp_path / "run", base, method), held_out)
    for kind, losses in stock.items():
        assert told[kind].tokens == len(losses), kind
        assert told[kind].after == pytest.approx(sum(losses) / len(losses), rel=1e-4), kind
        assert told[kind].after < told[kind].before, kind
    targets = sum(one.tokens for one in told.values())
    assert summary.eval_loss == pytest.approx(sum(one.after * one.tokens for one in told.values()) / targets, rel=1e-6)
    assert summary.eval_loss_before == pytest.approx(
        sum(one.before * one.tokens for one in told.values()) / targets, rel=1e-6
    )
