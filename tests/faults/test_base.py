"""A base that is not what it should be is refused before training, by every command that looks at it."""

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support.faults import Fault, Scene, anything
from tests.support.models import small_model

CHECKED = "The base is checked before it is trained"


def tensors(change: Callable[[dict[str, torch.Tensor]], Any], **config: object) -> Callable[[Scene], None]:
    """Return a fault in the tensors and the config of the base."""

    def inject(scene: Scene) -> None:
        file = scene.base / "model.safetensors"
        stored = load_file(file)
        change(stored)
        save_file(stored, file, metadata={"format": "pt"})
        settings = json.loads((scene.base / "config.json").read_text())
        (scene.base / "config.json").write_text(json.dumps({**settings, **config}))

    return inject


def pointer(file: str) -> Callable[[Scene], None]:
    """Return a fault: git-lfs left a pointer."""
    text = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    return lambda scene: (scene.base / file).write_text(text) and None


def spoil(stored: dict[str, torch.Tensor]) -> None:
    """Put a value that is no number into a matrix."""
    stored["model.layers.0.mlp.up_proj.weight"][0, 0] = float("nan")


def add_tokens(scene: Scene) -> None:
    """Give the tokenizer a token that the embedding lacks."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(scene.base)
    tokenizer.add_tokens(["<extra>"])
    tokenizer.save_pretrained(scene.base)


def choose_too_many_experts(scene: Scene) -> None:
    """Put a mixture in the place of the base, whose config asks for more experts than it has."""
    shutil.copytree(small_model("mixtral"), scene.base, dirs_exist_ok=True)
    settings = json.loads((scene.base / "config.json").read_text())
    (scene.base / "config.json").write_text(json.dumps({**settings, "num_experts_per_tok": 9}))


def lengthen(scene: Scene) -> None:
    """Ask for more tokens than the model has positions."""
    scene.sections["data"] = {"max_length": 1024}


QUANTIZED = tensors(len, quantization_config={"quant_method": "gptq", "bits": 4})
GPTQ = "stored quantized (gptq, 4 bits)"


def run(*command: str) -> Callable[[Scene], Sequence[object]]:
    """Return the arguments of a command on the recipe."""
    return lambda scene: (command[0], scene.recipe, *command[1:])


def base_file_damaged(scene: Scene) -> None:
    """Cut the end off the weights."""
    file = scene.base / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-9])


def untie_after_training(scene: Scene) -> None:
    """Train on a base, then change its config so that it ties what the files hold apart."""
    scene.train()
    settings = json.loads((scene.base / "config.json").read_text())
    (scene.base / "config.json").write_text(json.dumps({**settings, "tie_word_embeddings": True}))


FAULTS = (
    Fault("no head", CHECKED, tensors(lambda all: all.pop("lm_head.weight")), ("lack the language-model head",)),
    Fault("two matrices tied", CHECKED, tensors(len, tie_word_embeddings=True), ("two different matrices",)),
    Fault("a damaged shard", CHECKED, base_file_damaged, ("damaged safetensors file", "model.safetensors")),
    Fault("a pointer for weights", CHECKED, pointer("model.safetensors"), ("git-lfs pointer", "git lfs pull")),
    Fault("a pointer for the tokenizer", CHECKED, pointer("tokenizer.json"), ("git-lfs pointer", "tokenizer.json")),
    Fault("not a number", CHECKED, tensors(spoil), ("not finite numbers: model.layers.0.mlp.up_proj.weight",)),
    Fault("a token without a row", CHECKED, add_tokens, ("1 token beyond the embedding's", "'<extra>'")),
    Fault("a forward that fails", CHECKED, choose_too_many_experts, ("forward pass fails", "out of range")),
    Fault("too long", CHECKED, lengthen, ("1024 tokens do not fit the model's 512 positions", "data.max_length")),
    *(
        Fault(
            f"quantized, {' '.join(command)}",
            CHECKED,
            QUANTIZED,
            (GPTQ,),
            command=run(*command),
        )
        for command in (("train",), ("train", "--dry-run"), ("plan",))
    ),
    Fault(
        "a tie that is none, in a merge",
        CHECKED,
        untie_after_training,
        ("two different matrices",),
        command=lambda scene: ("merge", scene.run, "--no-verify", "--allow-changed"),
        after=anything,
    ),
)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_fault(fault: Fault, tmp_path: Path) -> None:
    fault.check(tmp_path)
