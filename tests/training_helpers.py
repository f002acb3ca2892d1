"""Small models, conversations and stock yardsticks for the training tests."""

import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

_SENTENCE = "the cat sat on a mat and then it saw two dogs run over green hills to find some fresh water there"
WORDS = tuple(re.findall(r"\w+", _SENTENCE))


def small_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained on the spot."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([" ".join(WORDS)] * 4, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>")
    fast.save_pretrained(str(folder))
    return fast


def config_for(architecture: str, vocabulary: int, *, tied: bool | None = None) -> Any:
    """A two-layer config of an architecture, by transformers' model type."""
    llama_like = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
    }
    special: dict[str, dict[str, Any]] = {
        "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256},
        "gpt_bigcode": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256},
        "falcon": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4},
        "opt": {
            "hidden_size": 32,
            "ffn_dim": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "word_embed_proj_dim": 16,
            "max_position_embeddings": 256,
        },
        "phi": {**llama_like, "num_key_value_heads": 4},
        "gemma": {**llama_like, "head_dim": 8},
        "gemma2": {**llama_like, "head_dim": 8},
        "gemma3_text": {**llama_like, "head_dim": 8},
    }
    settings = {**special.get(architecture, llama_like), "vocab_size": vocabulary, "pad_token_id": 0, "eos_token_id": 0}
    settings |= {"bos_token_id": 0}
    if tied is not None:
        settings["tie_word_embeddings"] = tied
    return AutoConfig.for_model(architecture, **settings)


def small_model(folder: Path, architecture: str = "llama", *, tied: bool | None = None, spare_rows: int = 0) -> Path:
    """Save a small model of random weights with its tokenizer; returns the folder."""
    tokenizer = small_tokenizer(folder)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config_for(architecture, len(tokenizer) + spare_rows, tied=tied))
    # The usual tiny spread makes every logit the same; a wider one lets mistakes show.
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() >= 2 or name.endswith("lm_head.bias"):
                parameter.normal_(0.0, 0.15)
    model.float().save_pretrained(str(folder))
    return folder


def write_conversations(path: Path, count: int = 24, seed: int = 0) -> Path:
    """Conversations of one to three exchanges, some with a system message."""
    pick = random.Random(seed)

    def say() -> str:
        return " ".join(pick.choices(WORDS, k=pick.randint(2, 9)))

    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            messages = [{"role": "system", "content": say()}] if number % 3 == 0 else []
            for _ in range(pick.randint(1, 3)):
                messages += [{"role": "user", "content": say()}, {"role": "assistant", "content": say()}]
            file.write(json.dumps({"messages": messages}) + "\n")
    return path


def write_recipe(
    path: Path, model_folder: Path, conversations: Path, evaluation: Path | None, run: Path, **sections: Any
) -> Path:
    """A recipe in float32 with few steps; `sections` are merged over the defaults, one level deep."""
    from ruamel.yaml import YAML

    recipe: dict[str, Any] = {
        "model": {"name": str(model_folder), "dtype": "float32"},
        "method": "lora",
        "data": {"train": [{"path": str(conversations)}], "max_length": 128},
        "training": {
            "learning_rate": 1e-2,
            "max_steps": 4,
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 1,
            "logging_steps": 1,
            "eval_strategy": "no",
            "eval_on_start": False,
            "save_strategy": "no",
            "lr_scheduler_type": "constant",
        },
        "output_dir": str(run),
    }
    if evaluation is not None:
        recipe["data"]["eval"] = [{"path": str(evaluation)}]
        recipe["training"] |= {"eval_strategy": "epoch", "eval_on_start": True}
    for section, values in sections.items():
        if isinstance(values, dict):
            recipe[section] = {**recipe.get(section, {}), **values}
        else:
            recipe[section] = values
    with path.open("w", encoding="utf-8") as file:
        YAML().dump(recipe, file)
    return path


def peftchat(*arguments: str, timeout: float = 300, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the command as a user would."""
    return subprocess.run(
        [sys.executable, "-m", "peftchat", *arguments],
        capture_output=True,
        text=True,
        timeout=timeout,
        env={**os.environ, "HF_HUB_OFFLINE": "1", **environment},
    )


def read_json(path: Path) -> Any:
    """The JSON in a file."""
    return json.loads(path.read_text(encoding="utf-8"))


def read_json_lines(path: Path) -> list[Any]:
    """The JSON of each line of a file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def stock_run(run: Path, base: Path, method: str, quantization: Any = None) -> tuple[PreTrainedModel, Any]:
    """A run's model and tokenizer, loaded by stock transformers and peft alone."""
    tokenizer = AutoTokenizer.from_pretrained(str(run))
    if method == "full":
        return AutoModelForCausalLM.from_pretrained(str(run), dtype=torch.float32).eval(), tokenizer
    from peft import PeftModel

    model = AutoModelForCausalLM.from_pretrained(str(base), dtype=torch.float32, quantization_config=quantization)
    highest = max(read_json(run / "adapter_config.json")["trainable_token_indices"].values(), key=max)
    if max(highest) >= model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(max(highest) + 1)
    wrapped = PeftModel.from_pretrained(model, str(run))
    wrapped.eval()
    if quantization is not None:
        # In evaluation mode bitsandbytes rounds its scales on the CPU; training mode of those layers keeps them.
        for module in wrapped.modules():
            if type(module).__name__ == "Linear4bit":
                module.training = True
    return wrapped, tokenizer


def stock_loss(model: PreTrainedModel, tokenizer: Any, conversations: Path) -> float:
    """Mean loss over answers and their end tokens, conversation by conversation, by stock means only."""
    total, count = 0.0, 0
    for line in conversations.read_text(encoding="utf-8").splitlines():
        encoded = tokenizer.apply_chat_template(
            json.loads(line)["messages"], return_dict=True, return_assistant_tokens_mask=True
        )
        ids = torch.tensor([encoded["input_ids"]])
        mask = torch.tensor(encoded["assistant_masks"], dtype=torch.bool)
        with torch.no_grad():
            logits = model(input_ids=ids).logits.double()
        total += float(F.cross_entropy(logits[0, :-1][mask[1:]], ids[0, 1:][mask[1:]], reduction="sum"))
        count += int(mask[1:].sum())
    return total / count
