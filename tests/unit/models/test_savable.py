from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, AutoTokenizer, GenerationConfig

from peftchat.models.savable import mend_generation_settings, pad_on_left
from tests.support.tokenizers import small_tokenizer

SETTINGS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"temperature": 0.6, "top_p": 0.9}, {"do_sample": True, "temperature": 0.6, "top_p": 0.9}),
    ({"temperature": 0.6, "do_sample": False}, {"do_sample": False}),
    ({"temperature": 0.0, "do_sample": True, "top_p": 0.5}, {}),
    ({"top_k": 5, "pad_token_id": -1}, {"do_sample": True, "top_k": 5}),
    ({"early_stopping": True, "length_penalty": 2.0, "eos_token_id": 1}, {"eos_token_id": 1}),
    ({"num_beams": 3, "early_stopping": True}, {"num_beams": 3, "early_stopping": True}),
    ({"use_cache": False, "cache_implementation": "static"}, {"use_cache": False}),
    ({"output_scores": True, "min_p": 0.1}, {"do_sample": True, "min_p": 0.1}),
]


@pytest.mark.parametrize(("given", "kept"), SETTINGS)
def test_generation_settings_are_saved_as_they_mean(
    given: dict[str, Any], kept: dict[str, Any], tmp_path: Path
) -> None:
    settings = GenerationConfig(**given)
    unsavable = given != kept
    if unsavable and given.get("temperature") != 0:
        with pytest.raises(ValueError, match="invalid"):
            settings.save_pretrained(tmp_path)
    notes = mend_generation_settings(AutoConfig.for_model("llama"), settings)
    assert bool(notes) == unsavable
    settings.save_pretrained(tmp_path)
    read = GenerationConfig.from_pretrained(tmp_path).to_diff_dict()
    read.pop("transformers_version")
    assert read == kept


def test_generation_settings_in_the_model_config_move(tmp_path: Path) -> None:
    config, settings = AutoConfig.for_model("llama"), GenerationConfig(top_p=0.8)
    config.temperature, config.top_p = 0.7, 0.1
    with pytest.raises(ValueError, match="generation parameters"):
        config.save_pretrained(tmp_path)
    assert len(mend_generation_settings(config, settings)) == 2
    config.save_pretrained(tmp_path)
    settings.save_pretrained(tmp_path)
    read = GenerationConfig.from_pretrained(tmp_path)
    assert (read.temperature, read.top_p, read.do_sample) == (0.7, 0.8, True)


def test_a_saved_tokenizer_pads_on_the_left(tmp_path: Path) -> None:
    tokenizer = small_tokenizer()
    tokenizer.padding_side = "right"
    pad_on_left(tokenizer)
    tokenizer.save_pretrained(tmp_path)
    ids = AutoTokenizer.from_pretrained(tmp_path)(["the", "the cat sat"], padding=True)["input_ids"]
    assert ids[0][0] == tokenizer.pad_token_id
    assert ids[0][-1] != tokenizer.pad_token_id
