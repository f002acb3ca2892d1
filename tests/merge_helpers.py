"""Small random models of several architectures, adapters trained by noise, and stock PEFT as the oracle."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, set_seed

VOCABULARY = 96
IDS = torch.arange(0, 60).reshape(3, 20)


def small_config(kind: str, **changes: Any) -> Any:
    """A transformers config of a few ten thousand parameters."""
    import transformers as tf

    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": VOCABULARY}
    llama = {**sizes, "intermediate_size": 96, "num_key_value_heads": 2, "tie_word_embeddings": False}
    gpt2 = {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": VOCABULARY, "n_positions": 128}
    table = {
        "llama": (tf.LlamaConfig, llama),
        "llama-bias": (tf.LlamaConfig, {**llama, "attention_bias": True, "mlp_bias": True}),
        "llama-tied": (tf.LlamaConfig, {**llama, "tie_word_embeddings": True}),
        "qwen2": (tf.Qwen2Config, {**llama, "tie_word_embeddings": True}),
        "gemma2": (tf.Gemma2Config, {**llama, "tie_word_embeddings": True, "head_dim": 16}),
        "mistral": (tf.MistralConfig, llama),
        "phi": (tf.PhiConfig, {**sizes, "intermediate_size": 96, "tie_word_embeddings": False}),
        "phi3": (tf.Phi3Config, {**llama, "pad_token_id": 0}),
        "falcon": (tf.FalconConfig, {**sizes, "alibi": False, "new_decoder_architecture": False}),
        "opt": (tf.OPTConfig, {**sizes, "ffn_dim": 96, "word_embed_proj_dim": 64, "max_position_embeddings": 128}),
        "gpt2": (tf.GPT2Config, gpt2),
        "gptbigcode": (tf.GPTBigCodeConfig, gpt2),
        "gpt-neox": (tf.GPTNeoXConfig, {**sizes, "intermediate_size": 96}),
        "mixtral": (tf.MixtralConfig, {**llama, "num_local_experts": 4}),
        "qwen3-moe": (
            tf.Qwen3MoeConfig,
            {**llama, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 16},
        ),
    }
    maker, settings = table[kind]
    return maker(**{**settings, "bos_token_id": 1, "eos_token_id": 2, **changes})


@dataclass(frozen=True)
class Trained:
    """A base folder, a run folder, and what stock PEFT makes of them: unmerged logits and merged weights."""

    base: Path
    run: Path
    logits: torch.Tensor
    merged: dict[str, torch.Tensor]
    merged_logits: torch.Tensor


def make_base(
    folder: Path, kind: str, dtype: torch.dtype = torch.float32, *, shard: str = "40KB", **changes: Any
) -> Path:
    """Save a random model with every bias and norm away from its trivial start."""
    set_seed(11)
    model = AutoModelForCausalLM.from_config(small_config(kind, **changes), dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    model.to(dtype).save_pretrained(folder, max_shard_size=shard)
    return folder


def load(folder: Path, rows: int = 0, **options: Any) -> Any:
    """The stock model in float32, grown where the adapter needs it."""
    set_seed(5)
    model = AutoModelForCausalLM.from_pretrained(folder, **{"dtype": torch.float32, **options}).eval()
    if rows > model.get_input_embeddings().weight.shape[0]:
        head = model.get_output_embeddings()
        old = None if head.bias is None else head.bias.detach().clone()
        model.resize_token_embeddings(rows, mean_resizing=False)
        if old is not None:
            model.get_output_embeddings().bias.data = torch.cat([old, old.mean().expand(rows - len(old))])
    return model


def train_by_noise(base: Path, run: Path, config: Any, rows: int = 0, noise: float = 0.05, **options: Any) -> Trained:
    """Wrap the base, move every trained parameter, save as a run does, and let stock PEFT compute and merge."""
    config.task_type = "CAUSAL_LM"
    model = get_peft_model(load(base, rows, **options), config)
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * noise)
    model.save_pretrained(run, save_embedding_layers=False)
    return oracle(base, run, rows, **options)


def oracle(base: Path, run: Path, rows: int = 0, **options: Any) -> Trained:
    """Load base and adapter afresh in stock PEFT."""
    model = PeftModel.from_pretrained(load(base, rows, **options), run).eval()
    with torch.no_grad():
        logits = model(IDS).logits
        merged = model.merge_and_unload()
        return Trained(base, run, logits, merged.state_dict(), merged(IDS).logits)


def merged_logits(folder: Path) -> torch.Tensor:
    """Logits of a merged folder, by stock transformers alone."""
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    with torch.no_grad():
        return model.eval()(IDS).logits


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor in a folder's shards."""
    found: dict[str, torch.Tensor] = {}
    for shard in sorted(folder.glob("*.safetensors")):
        found.update(load_file(shard))
    return found


def apart(one: torch.Tensor, other: torch.Tensor) -> float:
    """Largest difference as a share of the range."""
    return float((one - other).abs().max() / (other.max() - other.min()))
