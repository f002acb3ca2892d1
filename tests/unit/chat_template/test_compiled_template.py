"""Templates that are rendered again and again write what stock `apply_chat_template` writes."""

from typing import Any

import pytest

from peftchat.chat_template.compiled_template import template_writer
from peftchat.chat_template.template_shapes import content_conditions
from tests.support.template_families import FAMILIES, rich_conversations
from tests.unit.chat_template.test_template_families import tokenizer_of

SOURCE = (
    "{% for m in messages %}{{ m | tojson(indent=2) }}{{ m | tojson }}{{ m.thinking }}{{ 'content' in m }}"
    "{% for c in m.tool_calls or [] %}{{ c.function.arguments | tojson(sort_keys=true) }}{{ {'a': [m.role]} | tojson }}"
    "{% endfor %}{% endfor %}{{ tools | tojson }}{{ bos_token }}{{ add_generation_prompt }}{{ mood }}{{ documents }}"
)


@pytest.mark.parametrize("source", [SOURCE, FAMILIES["qwen3"]])
def test_it_is_stocks_rendering(source: str) -> None:
    tokenizer = tokenizer_of("qwen3")
    write = template_writer(tokenizer)
    for conversation in rich_conversations(40, 9, hostile=True):
        messages: list[dict[str, Any]] = conversation.as_dicts()
        messages[-1]["name"] = None
        tools = conversation.tool_schemas()
        for count in range(1, len(messages) + 1):
            for prompt in (True, False):
                settings = {"add_generation_prompt": prompt, "mood": ["loud", 1, None]}
                found = write(source, messages[:count], tools, **settings)
                stock = tokenizer.apply_chat_template(
                    messages[:count], tools=tools, chat_template=source, tokenize=False, **settings
                )
                assert found == stock


@pytest.mark.parametrize(
    ("source", "known"),
    [
        ("{% for m in messages %}{% set c = m.tool_calls[0] %}{% if c.name in others %}{% endif %}{% endfor %}", True),
        ("{% for t in tools %}{% for k in t.a %}{% if k not in t.required %}{% endif %}{% endfor %}{% endfor %}", True),
        ("{% for m in messages %}{% set c = m.content %}{% if c in others %}{% endif %}{% endfor %}", False),
        ("{% for t in tools or messages %}{% if t.content in others %}{% endif %}{% endfor %}", False),
        ("{% set t = tools %}{% set t = messages[0].content %}{% if t in others %}{% endif %}", False),
        ("{% set tools = messages %}{% for t in tools %}{% if t.content in others %}{% endif %}{% endfor %}", False),
        ("{% macro f(c) %}{% if c in others %}{% endif %}{% endmacro %}{{ f(messages[0].content) }}", False),
        ("{% set t %}{{ messages[0].content }}{% endset %}{% if t in others %}{% endif %}", False),
    ],
)
def test_only_what_is_asked_of_tools_is_no_matter_of_contents(source: str, known: bool) -> None:
    assert (content_conditions(source) is not None) == known
