"""Batches of answers; stock `generate`, one prompt at a time, is the oracle."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from peftchat.answering.answer_run import AnswerOptions, answer_questions
from peftchat.answering.batch import generate_batch, seed_of, seeded_sampling
from peftchat.answering.prompting import DialoguePrompting, Prompting, TemplatePrompting, dialogue_text
from peftchat.answering.questions import Question
from peftchat.conversation import Message
from peftchat.serving.chat_model import ChatModel, load_for_chat
from peftchat.serving.sampling import Sampling, apply_sampling
from tests.support.chat_models import QUESTIONS, in_format, save_adapter_run, save_model, save_scripted
from tests.support.tokenizers import byte_level

TEXTS = [*QUESTIONS, "Why?", "Tell me more about it. " * 4, "x"]
NEW = 12


@pytest.fixture(scope="module", params=["llama", "adapter", "gpt_bigcode"])
def chat(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ChatModel:
    folder = tmp_path_factory.mktemp("batch")
    if request.param == "adapter":
        return load_for_chat(str(save_adapter_run(folder / "base", folder / "run", in_format(byte_level()))))
    return load_for_chat(str(save_model(folder, request.param)))


def by_template(chat: ChatModel) -> TemplatePrompting:
    return TemplatePrompting(chat.tokenizer, chat.generation_config)


def ids_of(prompting: Prompting, text: str) -> list[int]:
    return prompting.encode([Message("user", text)], 4000).ids


def stock(chat: ChatModel, ids: list[int], stops: frozenset[int], **options: Any) -> list[int]:
    """What stock transformers generates for one prompt, without the token that ended it."""
    inputs = torch.tensor([ids])
    config = GenerationConfig(do_sample=False, max_new_tokens=NEW, eos_token_id=sorted(stops), pad_token_id=0)
    output = chat.model.generate(
        input_ids=inputs, attention_mask=torch.ones_like(inputs), generation_config=config, **options
    )
    new = output[0, len(ids) :].tolist()
    return new[: next((at for at, token in enumerate(new) if token in stops), len(new))]


def test_a_padded_batch_has_the_tokens_of_stock_generate(chat: ChatModel) -> None:
    prompting = by_template(chat)
    prompts = [ids_of(prompting, text) for text in TEXTS]
    assert len({len(prompt) for prompt in prompts}) > 3
    stops = prompting.end_ids | prompting.turn_ids
    expected = [stock(chat, prompt, stops) for prompt in prompts]
    settings = apply_sampling(chat.generation_config, Sampling(greedy=True))
    for size in (1, len(prompts)):
        found: list[list[int]] = []
        for start in range(0, len(prompts), size):
            part = prompts[start : start + size]
            found += [row.ids for row in generate_batch(chat, prompting, part, settings, NEW, [0] * len(part))]
        assert found == expected


def test_a_sampled_answer_depends_on_its_seed_alone(chat: ChatModel) -> None:
    prompting = by_template(chat)
    settings = apply_sampling(chat.generation_config, Sampling(temperature=1.5, top_k=20, top_p=0.95))
    prompts = [ids_of(prompting, text) for text in TEXTS]
    seeds = [seed_of(1, text, 0) for text in TEXTS]

    def answers(order: list[int], seeds: list[int]) -> dict[int, list[int]]:
        rows = [prompts[at] for at in order], settings, NEW, [seeds[at] for at in order]
        return dict(zip(order, (row.ids for row in generate_batch(chat, prompting, *rows)), strict=True))

    whole = answers([0, 1, 2, 3, 4, 5], seeds)
    assert {**answers([3, 0], seeds), **answers([5], seeds), **answers([2, 4, 1], seeds)} == whole
    assert answers([0, 1, 2, 3, 4, 5], [seed + 1 for seed in seeds]) != whole


def test_samples_follow_the_distribution() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0, -3.0]])
    settings = GenerationConfig(do_sample=True, temperature=0.8, top_k=4, eos_token_id=0, pad_token_id=0)
    rows = 4000
    (processors,) = [seeded_sampling(settings, [seed_of(0, row) for row in range(rows)])]
    scores = logits.repeat(rows, 1)
    drawn = Counter(processors(torch.zeros(rows, 1, dtype=torch.long), scores).argmax(-1).tolist())
    expected = torch.softmax(logits[0, :4] / 0.8, -1).tolist()
    assert drawn[4] == 0
    for token, share in enumerate(expected):
        # Five standard deviations of a binomial.
        assert drawn[token] / rows == pytest.approx(share, abs=5 * (share * (1 - share) / rows) ** 0.5)


def test_a_setting_that_reads_the_padding_is_answered_one_by_one(tmp_path: Path) -> None:
    """Stock generate with a repetition penalty and padding has other tokens; ours are those of one prompt."""
    model = save_model(tmp_path / "model")
    config = json.loads((model / "generation_config.json").read_text())
    (model / "generation_config.json").write_text(json.dumps({**config, "repetition_penalty": 1.7}))
    questions = [Question(number, (text,)) for number, text in enumerate(TEXTS)]
    options = AnswerOptions(Sampling(greedy=True, max_new_tokens=NEW), batch_size=6)
    (found,) = answer_questions(questions, [(str(model), "template")], tmp_path / "out", options)
    chat = load_for_chat(str(model))
    prompting = by_template(chat)
    for answer in found.answers:
        ids = ids_of(prompting, answer.question.turns[0])
        expected = stock(chat, ids, prompting.end_ids | prompting.turn_ids, repetition_penalty=1.7)
        assert answer.turns[0].text == chat.tokenizer.decode(expected, skip_special_tokens=True).strip()


# Dialogue


@pytest.mark.parametrize("base", ["pretrained", "stories"])
def test_a_dialogue_is_that_of_stock_generate_with_stop_strings(base: str, request: pytest.FixtureRequest) -> None:
    chat = load_for_chat(str(request.getfixturevalue(base)), needs_template=False)
    text = "Human: Where is the cat?\n\nAssistant: In the park.\n\n"
    prompting = DialoguePrompting(chat.tokenizer, chat.generation_config, text)
    prompts = [ids_of(prompting, word) for word in ("Anna", "Where is the big red ball?", "Ben ran")]
    for prompt, word in zip(prompts, ("Anna", "Where is the big red ball?", "Ben ran"), strict=True):
        assert prompt == chat.tokenizer(f"{text.rstrip()}\n\nHuman: {word}\n\nAssistant:")["input_ids"]
    settings = apply_sampling(chat.generation_config, Sampling(greedy=True))
    found = generate_batch(chat, prompting, prompts, settings, NEW, [0, 0, 0])
    stops = prompting.end_ids | prompting.turn_ids
    for prompt, answer in zip(prompts, found, strict=True):
        expected = stock(chat, prompt, stops, stop_strings=["\nHuman:", "\nAssistant:"], tokenizer=chat.tokenizer)
        assert answer.ids == expected


@pytest.mark.parametrize(
    ("written", "after", "text", "finish"),
    [(" Tex\nHuman:", None, "Tex", "turn"), (" Tex", "<|end|>", "Tex", "end"), (" Human", "<|user|>", "Human", "turn")],
)
def test_a_dialogue_ends_where_another_turn_begins(
    tmp_path: Path, written: str, after: str | None, text: str, finish: str
) -> None:
    model = save_scripted(tmp_path, written, after, before=":")
    chat = load_for_chat(str(model), needs_template=False)
    prompting = DialoguePrompting(chat.tokenizer, chat.generation_config, "Human: a\n\nAssistant: b\n\n-----\n")
    prompts = [ids_of(prompting, question) for question in ("q", "a longer one")]
    settings = apply_sampling(chat.generation_config, Sampling(greedy=True))
    for answer in generate_batch(chat, prompting, prompts, settings, 40, [0, 0]):
        assert (answer.text, answer.finish) == (text, finish)


@pytest.mark.parametrize(
    ("written", "kept"),
    [
        ("Tag\nHuman: x", "Tag"),
        ("Tag\n\n**Human**: x", "Tag"),
        ("Tag\n  Assistant:", "Tag"),
        ("Tag\n-----\nx", "Tag"),
        ("Human: Tag\nthe Human: x", None),
        ("Tag\nHumane: x\n- a\n--", None),
    ],
)
def test_stop_text_is_a_speaker_or_a_rule_at_the_start_of_a_line(pretrained: Path, written: str, kept: str) -> None:
    chat = load_for_chat(str(pretrained), needs_template=False)
    prompting = DialoguePrompting(chat.tokenizer, chat.generation_config, dialogue_text(None))
    found = prompting.stop_text.search(written)
    assert (None if found is None else written[: found.start()].strip()) == kept


def test_a_scripted_model_stops_at_a_role_token(tmp_path: Path) -> None:
    chat = load_for_chat(str(save_scripted(tmp_path, "Tag", after="<|user|>")))
    prompting = by_template(chat)
    settings = apply_sampling(chat.generation_config, Sampling(greedy=True))
    prompts = [ids_of(prompting, text) for text in ("x", "a longer one")]
    for answer in generate_batch(chat, prompting, prompts, settings, NEW, [0, 0]):
        assert (answer.text, answer.finish, len(answer.ids)) == ("Tag", "turn", 3)
