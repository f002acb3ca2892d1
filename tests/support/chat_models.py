"""Small chat models: random ones of several architectures, and one whose every next token is known."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed

from peftchat.chat_template.chat_format import make_format
from tests.support.models import small_config
from tests.support.tokenizers import byte_level

QUESTIONS = ["How do I read 12 files?", "naïve 日本 🎉\n\n    x = 1", "don't"]


def in_format(tokenizer: PreTrainedTokenizerFast, template: str = "starchat", system: str | None = None) -> Any:
    """The tokenizer with a chat template and its tokens."""
    return make_format(template, system, tokenizer).tokenizer


def save_model(folder: Path, kind: str = "llama", tokenizer: Any = None, **changes: Any) -> Path:
    """A random model with its tokenizer, in float32."""
    set_seed(7)
    tokenizer = tokenizer or in_format(byte_level())
    end = tokenizer.eos_token_id
    ids = {"vocab_size": len(tokenizer), "bos_token_id": 0, "eos_token_id": end, "pad_token_id": 0, **changes}
    config = small_config(kind, **ids)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def save_scripted(
    folder: Path, answer: str, after: str | None = "<|end|>", context: int = 256, before: str = "\n"
) -> Path:
    """A model that answers every question with `answer`, a text of distinct bytes, and then writes `after`.

    The prompt ends with `before`. Without `after`, the last byte of the answer is `before`, and the answer repeats.

    Its layers add nothing, its embedding is the identity and its head a table from each token to the next.
    """
    tokenizer = in_format(byte_level(merges=0))
    ids = tokenizer.encode(before + answer, add_special_tokens=False)
    ids += [] if after is None else [tokenizer.convert_tokens_to_ids(after)]
    assert all(dict(pairwise(ids))[one] == next for one, next in pairwise(ids)), "every token must have one successor"
    size = len(tokenizer)
    config = LlamaConfig(
        vocab_size=size,
        hidden_size=size + size % 2,
        intermediate_size=4,
        num_hidden_layers=1,
        num_attention_heads=1,
        max_position_embeddings=context,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=0,
        bos_token_id=0,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        layer = model.model.layers[0]
        for weight in (layer.self_attn.o_proj.weight, layer.mlp.down_proj.weight, model.lm_head.weight):
            weight.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(size, config.hidden_size))
        for token, following in pairwise(ids):
            model.lm_head.weight[following, token] = 1.0
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def save_adapter_run(base: Path, run: Path, tokenizer: Any, kind: str = "llama", **options: Any) -> Path:
    """A base without the chat tokens, and a LoRA adapter that brings their rows, as a finished run leaves them."""
    set_seed(4)
    plain = len(byte_level())
    config = small_config(kind, vocab_size=plain, bos_token_id=0, eos_token_id=0, pad_token_id=0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    head = model.get_output_embeddings()
    if head.bias is not None:
        head.bias.data = torch.randn_like(head.bias)
    model.save_pretrained(base)
    byte_level().save_pretrained(base)
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    ids = list(range(plain, len(tokenizer)))
    names = {"embed_tokens": ids} if config.tie_word_embeddings else {"embed_tokens": ids, "lm_head": ids}
    lora = LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", trainable_token_indices=names, **options)
    wrapped = get_peft_model(model, lora)
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    wrapped.peft_config["default"].base_model_name_or_path = str(base)
    wrapped.save_pretrained(run, save_embedding_layers=False)
    tokenizer.save_pretrained(run)
    return run
