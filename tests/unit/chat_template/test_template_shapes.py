"""Plain conversations by their shape: the same examples as rendered answer by answer, for every family of templates."""

import random

import pytest

from peftchat.chat_template.chat_format import make_format
from peftchat.chat_template.loss_mask import loss_mask_table
from peftchat.chat_template.template_shapes import content_conditions
from peftchat.chat_template.templates import TemplateSpan
from peftchat.conversation import Conversation, Message
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
