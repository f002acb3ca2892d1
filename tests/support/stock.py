"""Runs as transformers and peft alone read them."""

import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, PreTrainedModel

from tests.support.data import read_json


def nf4() -> BitsAndBytesConfig:
    """Return the quantization of a QLoRA run in float32."""
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
        bnb_4bit_quant_storage=torch.float32,
    )


def exact_4bit(model: Any) -> Any:
    """Let 4-bit layers compute in evaluation as in training; return the model.

    In evaluation mode bitsandbytes rounds its scales on the CPU; training mode of those layers keeps them.
    """
    for module in model.modules():
        if type(module).__name__ == "Linear4bit":
            module.training = True
    return model


def stock_run(run: Path, base: Path, method: str, quantization: Any = None) -> tuple[PreTrainedModel, Any]:
    """Return a run's model and tokenizer, loaded by stock transformers and peft."""
    tokenizer = AutoTokenizer.from_pretrained(str(run))
    if method == "full":
        return AutoModelForCausalLM.from_pretrained(str(run), dtype=torch.float32).eval(), tokenizer
    from peft import PeftModel

    model = AutoModelForCausalLM.from_pretrained(str(base), dtype=torch.float32, quantization_config=quantization)
    highest = max(read_json(run / "adapter_config.json")["trainable_token_indices"].values(), key=max)
    if max(highest) >= model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(max(highest) + 1)
    return exact_4bit(PeftModel.from_pretrained(model, str(run)).eval()), tokenizer


def stock_loss(model: Any, tokenizer: Any, conversations: Path) -> float:
    """Return the mean loss over answers and their end tokens, conversation by conversation, in nats per token."""
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
