"""Templates that are rendered again and again write what stock `apply_chat_template` writes."""

from typing import Any

import pytest
from jinja2 import TemplateError

from peftchat.chat_template.compiled_template import template_writer
from peftchat.chat_template.content_conditions import content_conditions
from peftchat.chat_template.template_renderer import TemplateRenderer
from tests.support.template_families import FAMILIES, rich_conversations
from tests.unit.chat_template.test_template_families import tokenizer_of

SOURCE = (
    "{% for m in messages %}{{ m | tojson(indent=2) }}{{ m | tojson }}{{ m.thinking }}{{ 'content' in m }}"
    "{% for c in m.tool_calls or [] %}{{ c.function.arguments | tojson(sort_keys=true) }}{{ {'a': [m.role]} | tojson }}"
    "{% endfor %}{% endfor %}{{ tools | tojson }}{{ bos_token }}{{ add_generation_prompt }}{{ mood }}{{ documents }}"
)

ATTRIBUTES = (
    "{% set ns = namespace(last=0, keys='k', text='{0}') %}{% for m in messages %}{% set ns.last = loop.index0 %}"
    "{{ ns.last }}{{ ns.keys }}{{ ns.none is defined }}{{ loop.last }}{{ loop.length }}{{ loop.nothing }}"
    "{{ m.role }}{{ m.nothing }}{{ m.content.upper() }}{{ m.content.strip().nothing is defined }}"
    "{{ m.items() | length }}{{ m.get('role') }}{{ '{0}'.format(m.role) }}{{ ns.text.format(m.role) }}"
    "{{ (m.tool_calls or []).append is defined }}"
    "{% for key, value in m.items() %}{{ key }}{% endfor %}{{ (tools or []).index is defined }}{% endfor %}"
)
"""What templates ask of objects: keys and methods of dicts, namespaces, loops and texts, and what is not there."""


@pytest.mark.parametrize("source", [SOURCE, FAMILIES["qwen3"], ATTRIBUTES])
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


ASKED_LAST = ("chatml", "llama3", "gemma", "qwen3", "channels", "deepseek", "zephyr")


@pytest.mark.parametrize("family", FAMILIES)
def test_one_rendering_has_the_prompt_and_what_precedes_it(family: str) -> None:
    tokenizer = tokenizer_of(family)
    renderer = TemplateRenderer(tokenizer, FAMILIES[family], [])
    tried = 0
    for conversation in rich_conversations(12, 4, hostile=False):
        messages, tools = conversation.as_dicts(), conversation.tool_schemas()
        for count in range(1, len(messages) + 1):
            both = renderer.render_both(messages[:count], tools)
            if both is not None:
                tried += 1
                assert both == tuple(
                    tokenizer.apply_chat_template(
                        messages[:count], tools=tools, add_generation_prompt=prompt, tokenize=False
                    )
                    for prompt in (True, False)
                )
    assert (tried > 10) == (family in (*ASKED_LAST, "roles-as-ends"))


@pytest.mark.parametrize(
    "source",
    [
        "{% if add_generation_prompt %}{{ 'a' }}{% else %}{{ 'b' }}{% endif %}",
        "{% if add_generation_prompt %}{{ 'a' }}{% endif %}b",
        "{% if add_generation_prompt and messages %}{{ 'a' }}{% endif %}",
        "{{ add_generation_prompt }}{% if add_generation_prompt %}{{ 'a' }}{% endif %}",
        "{% for m in messages %}{% if add_generation_prompt %}{{ 'a' }}{% endif %}{% endfor %}",
    ],
)
def test_other_uses_of_the_generation_prompt_are_rendered_twice(source: str) -> None:
    renderer = TemplateRenderer(tokenizer_of("chatml"), source, [])
    assert renderer.render_both([{"role": "user", "content": "Hi"}], None) is None


@pytest.mark.parametrize(
    "asked",
    [
        "messages[0].__class__", "messages[0].role.__class__", "messages[0].role._x", "messages[0].clear()",
        "messages.append(1)", "'{0.__class__}'.format(messages)", "messages[0].role.format_map.__self__",
        "namespace(a='{0.__class__}').a.format(messages)", "namespace(f='{0.__class__}'.format).f(messages)",
        "namespace(x=1).__init__", "loop.__class__", "loop._iterable", "cycler.__init__",
        "messages[0].update({'a': 1})",
    ],
)  # fmt: skip
def test_what_the_sandbox_refuses_is_refused(asked: str) -> None:
    """Twice, because what is safe is remembered."""
    tokenizer = tokenizer_of("qwen3")
    write = template_writer(tokenizer)
    source = "{% for m in messages %}{% set x = " + asked + " %}{{ x }}{{ x.y }}{% endfor %}"
    messages = [{"role": "user", "content": "Hi"}]
    for _ in range(2):
        said: list[object] = []
        for render in (
            lambda: write(source, messages, None),
            lambda: tokenizer.apply_chat_template(messages, chat_template=source, tokenize=False),
        ):
            try:
                said.append(render())
            except TemplateError as error:
                said.append((type(error), str(error)))
        assert not isinstance(said[0], str) or "<" not in said[0]
        assert said[0] == said[1]


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
