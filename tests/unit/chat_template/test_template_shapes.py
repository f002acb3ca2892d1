"""Conversations by their shape: the same examples as rendered answer by answer, for every family of templates."""

import random
from contextlib import suppress

import pytest

from peftchat.chat_template.chat_format import make_format
from peftchat.chat_template.content_conditions import content_conditions
from peftchat.chat_template.loss_mask import TurnPart, loss_mask_table, part_of
from peftchat.chat_template.template_shapes import ShapeCache
from peftchat.chat_template.templates import TemplateSpan
from peftchat.conversation import Conversation, Message, ToolCall
from peftchat.errors import UserError
from tests.support.template_families import FAMILIES
from tests.unit.chat_template.test_template_families import tokenizer_of

WORDS = [
    "Hi",
    "user",
    "assistant",
    "a",
    "2",
    "the end",
    "<think>",
    "</think>",
    "\n\n",
    " ",
    "<|im_end|>",
    "{{ x }}",
    "日本",
]
TABLE = loss_mask_table("answers")


def plain_conversations(count: int) -> list[Conversation]:
    source = random.Random(5)
    found = []
    for _ in range(count):
        turns = [Message("system", "Be kind.")] if source.random() < 0.3 else []
        for _ in range(source.randint(1, 3)):
            texts = [" x ".join(source.choices(WORDS, k=source.randint(1, 4))) for _ in range(2)]
            texts = [text.strip() if source.random() < 0.9 else text for text in texts]
            flag = False if source.random() < 0.1 else None
            turns += [Message("user", texts[0]), Message("assistant", texts[1], train=flag)]
        found.append(Conversation(tuple(turns)))
    return found


def trained(examples: list[list[TemplateSpan]]) -> list[list[tuple[str, bool, bool]]]:
    """The spans of examples as (text, whether it is trained, whether it is a token), neighbors joined."""
    found = []
    for example in examples:
        spans: list[tuple[str, bool, bool]] = []
        for span in example:
            kind = bool(TABLE[span.tag]), span.special
            if spans and spans[-1][1:] == kind and not (span.special or span.opens):
                spans[-1] = (spans[-1][0] + span.text, *kind)
            else:
                spans.append((span.text, *kind))
        found.append(spans)
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_shapes_give_what_rendering_answer_by_answer_gives(family: str) -> None:
    template = make_format("model", None, tokenizer_of(family)).template
    batch = [one for one in plain_conversations(150) if family != "gemma" or one.messages[0].role != "system"]
    slow = [template.examples(one) for one in batch]
    template.examples_of(batch)
    assert [trained(one) for one in template.examples_of(batch)] == [trained(one) for one in slow]


def rich() -> list[Conversation]:
    """Conversations with calls, reasoning and ids, of few shapes."""
    source = random.Random(2)
    tool = '[{"type": "function", "function": {"name": "find", "description": "Finds.", "parameters": {}}}]'
    hard = ["{}", '{"a": "<|im_end|>"}', '{"a": "<\\u007cim_end|>"}', '{"b": [1.50, {"c": "日本"}]}', "[1]"]
    found = []
    for number in range(60):
        arguments = source.choice([*hard, f'{{"text": "t{number}"}}', f'{{"a": {number}, "b": null}}'])
        key = source.choice([f"call{number}", "abcde1234", None])
        reasoning = source.choice([None, f"Hm {number}.", " spaced ", "x <think> y", f"Hm {number}."])
        answer = source.choice([f"Answer {number}.", "<think>a</think>b", "result", f"it's {number}"])
        turns = [Message("user", f"Question {number}?")]
        if number % 3:
            turns.append(
                Message("assistant", source.choice(["", f"See {number}."]), (ToolCall("find", arguments, key),))
            )
            turns.append(Message("tool", source.choice([f"result {number}", "result"]), (), key, "find"))
        turns.append(Message("assistant", answer, (), None, None, reasoning if number % 2 else None))
        turns += [Message("user", f"And {number}?"), Message("assistant", f"End {number}.")]
        found.append(Conversation(tuple(turns), tools=tool if number % 3 else None))
    return found


@pytest.mark.parametrize("family", ["chatml", "qwen3", "channels", "deepseek", "roles-as-ends"])
def test_shapes_with_tools_and_reasoning_give_the_same_tokens_and_tags(family: str) -> None:
    encoder = make_format("model", None, tokenizer_of(family)).encoder()
    batch = []
    for one in rich():
        with suppress(UserError):
            encoder.encode([one])
            batch.append(one)
    fresh = make_format("model", None, tokenizer_of(family))
    slow = fresh.encoder()
    expected = []
    for one in batch:
        fresh.template._shapes = ShapeCache()  # no shape was met before
        expected += slow.encode([one])
    found = encoder.batch(batch)
    assert [row.ids.tolist() for row in found] == [row.ids.tolist() for row in expected]
    assert [row.token_tags.tolist() for row in found] == [row.token_tags.tolist() for row in expected]
    made = [key for key, shape in encoder._template._shapes._met.items() if shape is not None]
    assert len(batch) > 20 and any(key[0] is not None and "find" in str(key[1:]) for key in made), made


def test_reasoning_in_a_content_is_reasoning_whatever_was_met_before() -> None:
    encoder = make_format("model", None, tokenizer_of("chatml")).encoder()
    batch = [
        Conversation((Message("user", f"q{number}"), Message("assistant", f"<think>why</think>so {number}")))
        for number in range(4)
    ]
    tags = [encoder.batch([one]).token_tags.tolist() for one in batch]
    assert TurnPart.REASONING in map(part_of, tags[0])
    assert tags == [tags[0]] * 4


@pytest.mark.parametrize(
    ("asked", "known"),
    [
        ("c.function.name == 'find'", True),
        ("m.tool_calls | length == 1", True),
        ("c.function.arguments == 'x'", False),
        ("'x' in c.function.arguments", False),
        ("c.function.arguments | length > 1", False),
        ("c.id == 'x'", False),
    ],
)
def test_what_is_asked_of_calls(asked: str, known: bool) -> None:
    source = "{% for m in messages %}{% for c in m.tool_calls %}{% if ASKED %}{% endif %}{% endfor %}{% endfor %}"
    found = content_conditions(source.replace("ASKED", asked))
    assert found is not None and found.calls == known


def test_conditions_of_a_template_on_contents() -> None:
    found = content_conditions(
        "{% for m in messages %}{% if 'call' in m.content or m.content == 'stop' or m.content.startswith('#') %}"
        "{{ m.content.split('</t>')[-1] | trim }}{% endif %}{% endfor %}"
    )
    assert found is not None
    for text in ("a CALL b", "stop", "# head", "a</t>b", "", " x", "x\n"):
        assert found.met_by(text), text
    assert not found.met_by("don't stop me")
    plain = content_conditions("{% for m in messages %}{{ m.content }}{% endfor %}")
    assert plain is not None and not plain.met_by(" x\n") and plain.met_by(" \n")
    for unknown in (
        "{{ m.content[:3] }}",
        "{{ m.content | wordcount }}",
        "{{ m.content.find(x) }}",
        "{{ m.c.zfill(3) }}",
    ):
        assert content_conditions(unknown) is None
    assert content_conditions("{% if m.content | length > 9 %}x{% endif %}") is None


def test_a_content_that_the_template_changes_is_rendered_for_itself() -> None:
    tokenizer = tokenizer_of("chatml")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
        "{% if loop.last and m.content == 'x' %}{{ 'Only ' }}"
        "{% endif %}{{ m.content + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    template = make_format("model", None, tokenizer).template
    batch = [
        Conversation((Message("user", f"q{number}"), Message("assistant", answer), Message("user", "r"),
                      Message("assistant", "b")))
        for number, answer in enumerate(["a", "c", "d", "x"])
    ]  # fmt: skip
    found = template.examples_of(batch)
    assert [len(examples) for examples in found] == [1, 1, 1, 2]
    assert any("Only x" in "".join(span.text for span in example) for example in found[3])
