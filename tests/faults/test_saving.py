"""What transformers refuses to save, and what is saved for chatting."""

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.support.data import read_json
from tests.support.faults import Fault, Scene

PROMISE = "Saving is tried before step 1"

_TOKENIZER = """
from transformers import PreTrainedTokenizerFast


class OddTokenizer(PreTrainedTokenizerFast):
    def save_pretrained(self, *args, **kwargs):
        raise NotImplementedError("this tokenizer cannot be saved")
"""


def sampling_without_do_sample(scene: Scene) -> None:
    settings = {"eos_token_id": 0, "temperature": 0.6, "top_p": 0.9}
    (scene.base / "generation_config.json").write_text(json.dumps(settings))
    scene.sections = {"method": "full", "training": {"save_strategy": "steps", "save_steps": 4}}


def is_mended(scene: Scene) -> None:
    for folder in (scene.run, scene.run / "checkpoints" / "checkpoint-4"):
        settings = read_json(folder / "generation_config.json")
        assert (settings["do_sample"], settings["temperature"], settings["top_p"]) == (True, 0.6, 0.9)
    assert "do_sample" in read_json(scene.run / "run.json")["notes"][0]


def tokenizer_that_cannot_be_saved(scene: Scene) -> None:
    (scene.base / "odd_tokenizer.py").write_text(_TOKENIZER)
    config = read_json(scene.base / "tokenizer_config.json")
    config |= {"tokenizer_class": "OddTokenizer", "auto_map": {"AutoTokenizer": [None, "odd_tokenizer.OddTokenizer"]}}
    (scene.base / "tokenizer_config.json").write_text(json.dumps(config))
    scene.sections = {"model": {"trust_remote_code": True}}


def broken_generation_settings(scene: Scene) -> None:
    (scene.base / "generation_config.json").write_text('{"eos_token_id": 0,')


FAULTS = (
    Fault("a generation_config.json that is cut off", PROMISE, broken_generation_settings,
          ("generation settings cannot be loaded",)),
    Fault("sampling settings without do_sample", PROMISE, sampling_without_do_sample,
          ("do_sample is set to true, because it has temperature 0.6, top_p 0.9",), 0, after=is_mended),
    Fault("a tokenizer that cannot be saved", PROMISE, tokenizer_that_cannot_be_saved,
          ("the tokenizer cannot be saved and loaded again: this tokenizer cannot be saved",)),
)  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_saving(fault: Fault, tmp_path: Path) -> None:
    fault.check(tmp_path)


def test_stock_batched_generation_equals_single_generation_from_run_and_merge(tmp_path: Path) -> None:
    scene = Scene.build(tmp_path)
    scene.train()
    assert scene.peftchat("merge", scene.run, "-o", tmp_path / "merged").returncode == 0
    prompts = ["the cat", "the cat sat on a mat and then it saw two dogs", "dogs"]
    for folder in (scene.run, tmp_path / "merged"):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        if folder == scene.run:
            base = AutoModelForCausalLM.from_pretrained(scene.base)
            base.resize_token_embeddings(len(tokenizer), mean_resizing=False)
            model = PeftModel.from_pretrained(base, folder)
        else:
            model = AutoModelForCausalLM.from_pretrained(folder)

        def answers(texts: list[str], tokenizer=tokenizer, model=model) -> list[list[int]]:  # type: ignore[no-untyped-def]
            inputs = tokenizer(texts, return_tensors="pt", padding=True)
            with torch.no_grad():
                output = model.generate(**inputs, max_new_tokens=8, min_new_tokens=8, do_sample=False)
            return output[:, inputs["input_ids"].shape[1] :].tolist()  # type: ignore[no-any-return]

        assert answers(prompts) == [answers([prompt])[0] for prompt in prompts]
