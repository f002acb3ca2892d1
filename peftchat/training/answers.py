"""Answers of a model in its chat format, for a look at what training changed."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from peftchat.chat_template.registry import ChatFormat
from peftchat.models.ends import end_ids

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_NEW_TOKENS = 120


@dataclass(frozen=True, slots=True)
class Answer:
    """One question and what the model said.

    Attributes:
        prompt: the user's message.
        answer: the text up to the end token.
        stopped: whether the model ended its turn itself.
    """

    prompt: str
    answer: str
    stopped: bool


def answers(model: "PreTrainedModel", chat: ChatFormat, questions: Sequence[str]) -> list[Answer]:
    """Greedy answers to single questions. Under ZeRO-3 every process must call it."""
    was_training = model.training
    model.eval()
    given = [_answer(model, chat, question) for question in questions]
    model.train(was_training)
    return given


def _answer(model: "PreTrainedModel", chat: ChatFormat, question: str) -> Answer:
    tokenizer = chat.tokenizer
    messages = [{"role": "user", "content": question}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    ids = prompt["input_ids"].to(next(model.parameters()).device)
    with torch.no_grad():
        output = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=_NEW_TOKENS,
            do_sample=False,
            temperature=None,
            top_p=None,
            top_k=None,
        )[0, ids.shape[1] :].tolist()
    stopped = bool(output) and output[-1] in end_ids(model.generation_config.eos_token_id)
    text = tokenizer.decode(output[:-1] if stopped else output, skip_special_tokens=True)
    return Answer(question, text.strip(), stopped)
