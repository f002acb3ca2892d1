"""The recipe's questions, answered at each evaluation."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from peftchat.chat_template.chat_format import ChatFormat
from peftchat.models.decoding import decoding_plainly, tokenizer_argument
from peftchat.models.loading import end_ids
from peftchat.models.padded_prompts import needs_single_prompts, pad_left
from peftchat.runs.run_summary import SampleAnswer
from peftchat.training.recipe_questions import read_questions

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from peftchat.training.context import TrainContext

_MAX_NEW_TOKENS = 120

_BATCH = 16
"""Questions that are answered together: on a CPU in float32 a token of 16 rows takes a seventh of the time of one."""


def answer_questions(model: Any, context: "TrainContext", step: int) -> dict[str, float]:
    """Answer the recipe's questions and keep the answers in `samples.jsonl`; every process must call it.

    Training goes on as if it had not been called: answers are greedy, and the state of the random numbers is restored.

    Args:
        model: as training calls it.
        context: the run.
        step: the optimizer step after which it is called.

    Returns:
        What is logged: the share of answers that the model ended by itself; empty without questions.
    """
    questions = read_questions(context.loaded)
    if not questions:
        return {}
    devices = [torch.accelerator.current_device_index()] if torch.accelerator.is_available() else []
    kind = str(torch.accelerator.current_accelerator().type) if devices else "cuda"  # type: ignore[union-attr]
    with torch.random.fork_rng(devices=devices, device_type=kind):
        answers = sample_answers(model, context.chat, questions, context.recipe.evaluation.max_new_tokens)
    if context.is_main:
        lines = [{"step": step, "prompt": one.prompt, "answer": one.answer, "stopped": one.stopped} for one in answers]
        kept = context.run_folder.samples
        if any(line["step"] == step for line in kept.read()):
            kept.rewrite([*(line for line in kept.read() if line["step"] != step), *lines])
        else:
            kept.append(lines)
    return {"eval_answers_ended": sum(bool(one.stopped) for one in answers) / len(answers)}


def sample_answers(
    model: "PreTrainedModel", chat: ChatFormat, prompts: Sequence[str], max_new_tokens: int = _MAX_NEW_TOKENS
) -> list[SampleAnswer]:
    """Return greedy answers to single user messages; under ZeRO-3 every process must call it."""
    if not prompts:
        return []
    was_training = model.training
    model.eval()
    encoded = [_prompt_ids(chat, prompt) for prompt in prompts]
    answers: dict[int, SampleAnswer] = {}
    # Prompts of like length share a batch, so that little is padded.
    order = sorted(range(len(prompts)), key=lambda place: len(encoded[place]))
    size = 1 if needs_single_prompts(model.generation_config) else _BATCH
    for start in range(0, len(order), size):
        places = order[start : start + size]
        found = _generate(model, chat, [encoded[place] for place in places], max_new_tokens)
        for place, ids in zip(places, found, strict=True):
            answers[place] = _sample_answer(model, chat, prompts[place], ids)
    model.train(was_training)
    return [answers[place] for place in range(len(prompts))]


def _prompt_ids(chat: ChatFormat, prompt: str) -> list[int]:
    messages = [{"role": "user", "content": prompt}]
    ids: list[int] = chat.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)[
        "input_ids"
    ]
    return ids


def _generate(
    model: "PreTrainedModel", chat: ChatFormat, prompts: Sequence[Sequence[int]], max_new_tokens: int
) -> list[list[int]]:
    """Return what the model writes behind each prompt, up to and with the token that ends it."""
    ids, mask = pad_left(prompts, int(chat.tokenizer.pad_token_id), next(model.parameters()).device)
    settings = model.generation_config
    with torch.no_grad(), decoding_plainly(settings):
        output = model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            temperature=None,
            top_p=None,
            top_k=None,
            **tokenizer_argument(settings, chat.tokenizer),
        )[:, ids.shape[1] :].tolist()
    ends = end_ids(model.generation_config.eos_token_id)
    return [_through_end(row, ends) for row in output]


def _through_end(ids: list[int], ends: Sequence[int]) -> list[int]:
    """Return the ids up to and with the first that ends an answer; behind it a batch is padded."""
    end = next((place for place, token in enumerate(ids) if token in ends), None)
    return ids if end is None else ids[: end + 1]


def _sample_answer(model: "PreTrainedModel", chat: ChatFormat, prompt: str, ids: list[int]) -> SampleAnswer:
    stopped = bool(ids) and ids[-1] in end_ids(model.generation_config.eos_token_id)
    text = chat.tokenizer.decode(ids[:-1] if stopped else ids, skip_special_tokens=True)
    return SampleAnswer(prompt, text.strip(), stopped)
