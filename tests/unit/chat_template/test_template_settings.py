"""Settings of a recipe are part of the template: stock `apply_chat_template` writes the prompts that were trained."""

import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from jinja2 import Environment, nodes

from peftchat.chat_template.chat_format import ChatFormat, make_format
from peftchat.chat_template.loss_mask import TurnPart, loss_mask_table, part_of, role_of
from peftchat.chat_template.template_settings import TemplateSettings
from peftchat.conversation import Conversation, Message, ToolCall
from peftchat.errors import UserError
from tests.support.template_families import FAMILIES, rich_conversations
from tests.unit.chat_template.test_template_families import check, tokenizer_of

Dicts = list[dict[str, Any]]
TALK = Conversation(
    (
        Message("system", "Be brief."),
        Message("user", "Who is 7?"),
        Message("assistant", "Let me look.", (ToolCall("find", '{"id": 7}', "abcde1234"),)),
        Message("tool", "Ada", (), "abcde1234", "find"),
        Message("assistant", "It is Ada."),
        Message("user", "Bye"),
        Message("assistant", "See you."),
    ),
    tools='[{"type": "function", "function": {"name": "find", "description": "Finds.", "parameters": {}}}]',
)


SOURCES = {**FAMILIES, "keeping": FAMILIES["qwen3"].replace(" and loop.index0 > ns.last", "")}


def format_of(family: str, name: str = "model", **settings: Any) -> ChatFormat:
    tokenizer = tokenizer_of("qwen3" if family == "keeping" else family)
    tokenizer.chat_template = SOURCES[family]
    return make_format(name, None, tokenizer, settings=TemplateSettings(**settings))


def rendered(jinja: str, tokenizer: Any, messages: Dicts, **kwargs: Any) -> str:
    return str(tokenizer.apply_chat_template(messages, chat_template=jinja, tokenize=False, **kwargs))


def without_reasoning(messages: Dicts) -> Dicts:
    last = max((i for i, message in enumerate(messages) if message["role"] == "user"), default=-1)
    return [
        {key: value for key, value in message.items() if key != "reasoning_content" or index > last}
        for index, message in enumerate(messages)
    ]


def with_reasoning_inline(messages: Dicts) -> Dicts:
    changed = []
    for message in messages:
        reasoning = message.get("reasoning_content")
        if message["role"] == "assistant" and reasoning:
            message = {key: value for key, value in message.items() if key != "reasoning_content"}
            message["content"] = f"<think>\n{reasoning}\n</think>\n\n{message['content']}"
        changed.append(message)
    return changed


def without_system(messages: Dicts) -> Dicts:
    return [message for message in messages if message["role"] != "system"]


def system_merged(messages: Dicts) -> Dicts:
    if messages[0]["role"] != "system":
        return messages
    first, second, *others = messages
    return [{**second, "content": f"{first['content']}\n\n{second['content']}"}, *others]


@pytest.mark.parametrize(
    ("family", "settings", "change"),
    [
        ("keeping", {"reasoning_history": "drop"}, without_reasoning),
        ("qwen3", {"reasoning_history": "drop"}, without_reasoning),
        ("chatml", {"reasoning_format": "inline"}, with_reasoning_inline),
        (
            "chatml",
            {"reasoning_format": "inline", "reasoning_history": "drop"},
            lambda messages: with_reasoning_inline(without_reasoning(messages)),
        ),
        ("gemma", {"unsupported_roles": "merge_into_user"}, system_merged),
        ("gemma", {"unsupported_roles": "drop"}, without_system),
        ("zephyr", {"unsupported_roles": "drop"}, lambda messages: messages),
    ],
)
def test_the_saved_template_makes_the_prompts_that_were_trained(
    family: str, settings: dict[str, Any], change: Callable[[Dicts], Dicts]
) -> None:
    original = SOURCES[family]
    chat = format_of(family, **settings)
    encoder = chat.encoder()
    done = 0
    for conversation in rich_conversations(40, 3, hostile=False):
        messages, tools = conversation.as_dicts(), conversation.tool_schemas()
        if family in ("gemma", "zephyr") and (tools or any(message.reasoning for message in conversation.messages)):
            continue
        examples = encoder.encode([conversation])
        if not any(message.role == "assistant" and message.train is not False for message in conversation.messages):
            continue
        if family != "gemma":
            check(chat.tokenizer, conversation, examples, ids_too=True)
        for index in (i for i, message in enumerate(messages) if message["role"] == "assistant"):
            prompt = rendered(
                chat.template.jinja, chat.tokenizer, messages[:index], tools=tools, add_generation_prompt=True
            )
            changed = change(messages[:index])
            assert prompt == rendered(original, chat.tokenizer, changed, tools=tools, add_generation_prompt=True)
            if conversation.messages[index].train is not False:
                texts = [chat.tokenizer.decode(example.ids) for example in examples]
                assert any(text.startswith(prompt) for text in texts)
        done += 1
    assert done > 8


def test_own_templates_drop_the_reasoning_of_earlier_rounds() -> None:
    turns = (
        Message("user", "1+1?"),
        Message("assistant", "2.", reasoning="One and one."),
        Message("user", "2+2?"),
        Message("assistant", "4.", reasoning="Two and two."),
    )
    for name in ("chatml", "starchat", "llama3"):
        texts = {}
        for policy in ("template", "keep", "drop"):
            chat = format_of("chatml", name, reasoning_history=policy)
            examples = chat.encoder().encode([Conversation(turns)])
            table = loss_mask_table("answers")
            texts[policy] = [
                (chat.tokenizer.decode(one.ids), chat.tokenizer.decode(one.ids[table[one.token_tags]]))
                for one in examples
            ]
        assert texts["template"] == texts["keep"] and len(texts["keep"]) == 1
        first, second = texts["drop"]
        assert "One and one." in first[1] and "One and one." not in second[0]
        assert second[1].startswith("<think>\nTwo and two.\n</think>\n\n4.") and "2." in second[0]
        assert texts["keep"][0][1] == first[1] + second[1]


def test_reasoning_that_the_template_drops_cannot_be_kept() -> None:
    turns = (
        Message("user", "1+1?"),
        Message("assistant", "2.", reasoning="One and one."),
        Message("user", "2+2?"),
        Message("assistant", "4."),
    )
    with pytest.raises(UserError, match="leaves the reasoning of message 2 out of the prompt of message 4") as refused:
        format_of("qwen3", reasoning_history="keep").encoder().encode([Conversation(turns)])
    assert "chatml" in str(refused.value.hint)
    tokenizer = tokenizer_of("qwen3")
    source = tokenizer.chat_template.replace(
        "loop.index0 > ns.last", "(loop.index0 > ns.last or clear_thinking is false)"
    )
    tokenizer.chat_template = source.replace(
        "ns.last or clear_thinking is", "ns.last or clear_thinking|default(true) is"
    )
    settings = TemplateSettings(reasoning_history="keep")
    with pytest.raises(UserError) as told:
        make_format("model", None, tokenizer, settings=settings).encoder().encode([Conversation(turns)])
    assert "{clear_thinking: false}" in str(told.value.hint)
    tokenizer.chat_template = source.replace(
        "ns.last or clear_thinking is", "ns.last or clear_thinking|default(true) is"
    )
    settings = TemplateSettings({"clear_thinking": False}, reasoning_history="keep")
    chat = make_format("model", None, tokenizer, settings=settings)
    (example,) = chat.encoder().encode([Conversation(turns)])
    prompt = chat.tokenizer.apply_chat_template(
        Conversation(turns).as_dicts()[:3], tokenize=False, add_generation_prompt=True
    )
    assert "One and one." in prompt and chat.tokenizer.decode(example.ids).startswith(prompt)


THOUGHT = Conversation((Message("user", "1+1?"), Message("assistant", "2.", reasoning="One and one.")))
INLINE = "<think>\nOne and one.\n</think>\n\n2."


def test_a_refusal_names_the_setting_that_writes_reasoning() -> None:
    with pytest.raises(UserError, match="does not write the reasoning of message 2") as refused:
        format_of("llama3").encoder().encode([THOUGHT])
    assert "`chat.reasoning_format: inline`" in str(refused.value.hint)
    chat = format_of("llama3", reasoning_format="inline")
    (example,) = chat.encoder().encode([THOUGHT])
    assert chat.tokenizer.decode(example.ids[loss_mask_table("answers")[example.token_tags]]) == f"{INLINE}<|eot_id|>"
    parts = [part_of(tag) for tag in example.token_tags.tolist()]
    reasoning = example.ids[[part == TurnPart.REASONING for part in parts]]
    assert chat.tokenizer.decode(reasoning) == "<think>\nOne and one.\n</think>\n\n"


def test_no_setting_is_named_that_would_not_help() -> None:
    tokenizer = tokenizer_of("chatml")
    tokenizer.chat_template = FAMILIES["chatml"].replace("m.content", "m.content.split('</think>')[-1]")
    with pytest.raises(UserError, match="does not write the reasoning") as refused:
        make_format("model", None, tokenizer).encoder().encode([THOUGHT])
    assert "reasoning_format" not in str(refused.value.hint)
    tokenizer.chat_template = FAMILIES["qwen3"].replace("m.role == 'assistant' and", "enable_thinking and")
    with pytest.raises(UserError, match="does not write the reasoning") as refused:
        make_format("model", None, tokenizer).encoder().encode([THOUGHT])
    assert "`chat.template_kwargs: {enable_thinking: true}`" in str(refused.value.hint)


def test_definitions_of_tools_count_as_text_of_the_system() -> None:
    """As in the fast path of the templates of the registry, and where the template puts its own text in front."""
    counts = {}
    for policy in ("template", "drop"):
        chat = format_of("chatml", "chatml", reasoning_history=policy)
        for conversation in (TALK, Conversation(TALK.messages[1:], tools=TALK.tools)):
            (example,) = chat.encoder().encode([conversation])
            roles = Counter(role_of(tag) for tag in example.token_tags.tolist())
            counts.setdefault(len(conversation.messages), []).append(roles)
    assert all(one == other and one["system"] > 200 for one, other in counts.values())
    for settings in ({}, {"unsupported_roles": "merge_into_user"}):
        chat = format_of("phi" if settings else "chatml", **settings)
        (example,) = chat.encoder().encode([Conversation(TALK.messages[1:], tools=TALK.tools)])
        of_user = example.ids[[role_of(tag) == "user" for tag in example.token_tags.tolist()]]
        assert "Finds." not in chat.tokenizer.decode(of_user) and "Who is 7?" in chat.tokenizer.decode(of_user)


def test_settings_use_what_llama_cpp_reads() -> None:
    """Its `selectattr` and `rejectattr` take an attribute's name, not a place in a pair (`common/jinja/value.cpp`)."""
    everything = [
        {"reasoning_format": "inline", "reasoning_history": "drop", "unsupported_roles": policy}
        for policy in ("merge_into_user", "drop")
    ]
    for settings in everything:
        tree = Environment(extensions=["jinja2.ext.do"]).parse(str(format_of("gemma", **settings).template.jinja))
        for filtered in tree.find_all((nodes.Filter, nodes.Test)):
            assert filtered.name in {"list", "tojson", "trim", "string", "defined", "none"}, filtered


def test_a_template_that_writes_reasoning_is_not_given_it_inline() -> None:
    with pytest.raises(UserError, match="has a place for reasoning") as refused:
        format_of("qwen3", reasoning_format="inline")
    assert refused.value.where == "chat.reasoning_format: inline"
    for history in ("template", "drop"):
        chat = format_of("chatml", "chatml", reasoning_format="inline", reasoning_history=history)
        (example,) = chat.encoder().encode([THOUGHT])
        assert INLINE in chat.tokenizer.decode(example.ids)


def test_the_saved_template_takes_reasoning_under_every_name_and_contents_of_every_kind() -> None:
    chat = format_of("chatml", reasoning_format="inline")
    call = {"type": "function", "function": {"name": "find", "arguments": {}}}
    for name in ("reasoning_content", "reasoning", "thinking"):
        messages = [
            {"role": "user", "content": "1+1?"},
            {"role": "assistant", "content": None, name: "One and one.", "tool_calls": [call]},
            {"role": "assistant", "content": "2.", name: None},
            {"role": "user", "content": "x", name: "not an answer's"},
        ]
        text = rendered(str(chat.tokenizer.chat_template), chat.tokenizer, messages)
        assert "assistant\n<think>\nOne and one.\n</think>\n\n<tool_call>find {}</tool_call><|im_end|>" in text
        assert "assistant\n2.<|im_end|>" in text and "not an answer" not in text
    parts = [{"role": "assistant", "content": [{"type": "text", "text": "2."}], "reasoning": "One and one."}]
    source = str(chat.tokenizer.chat_template).replace("m.content", "m.content | map(attribute='text') | join")
    assert INLINE in rendered(source, chat.tokenizer, parts)


@pytest.mark.parametrize("name", ["starchat", "phi", "zephyr"])
def test_tool_results_become_text_of_the_user(name: str) -> None:
    own = name == "starchat"
    chat = format_of("chatml" if own else name, name if own else "model", unsupported_roles="merge_into_user")
    (example,) = chat.encoder().encode([TALK])
    text = chat.tokenizer.decode(example.ids)
    trained = chat.tokenizer.decode(example.ids[loss_mask_table("answers")[example.token_tags]])
    called = '<tool_call>\n{"name": "find", "arguments": {"id": 7}}\n</tool_call>'
    for piece in ("Be brief.\n\n# Tools", '"name": "find"', called, "<|user|>\nAda<"):
        assert piece in text
    ends = re.sub(r"<\|end(oftext)?\|>", "|", trained)
    assert ends.rstrip("|") == f"Let me look.\n{called}|It is Ada.|See you."
    dicts, tools = TALK.as_dicts(), TALK.tool_schemas()
    for index in (2, 4, 6):
        prompt = chat.tokenizer.apply_chat_template(
            dicts[:index], tools=tools, tokenize=False, add_generation_prompt=True
        )
        assert text.startswith(prompt)


def test_dropped_results_take_their_calls_along() -> None:
    chat = format_of("phi", unsupported_roles="drop")
    (example,) = chat.encoder().encode([TALK])
    text = chat.tokenizer.decode(example.ids)
    assert "Ada<|end|>" not in text.replace("is Ada.", "") and "find" not in text and "Let me look" not in text
    assert "It is Ada." in text and "Be brief." in text
    assert chat.template.missing_roles == {"tool"}


@pytest.mark.parametrize(("family", "role"), [("gemma", "system"), ("phi", "tool")])
def test_an_error_names_the_setting(family: str, role: str) -> None:
    with pytest.raises(UserError) as refused:
        format_of(family).encoder().encode([TALK])
    assert f"cannot write `{role}`" in str(refused.value.hint) or "unsupported_roles" in str(refused.value.hint)


def test_variables_and_the_system_message_are_in_the_saved_template() -> None:
    tokenizer = tokenizer_of("chatml")
    tokenizer.chat_template = "{% if mood == 'loud' %}LOUD {{ list[1].a }}\n{% endif %}{% if off and one %}{% endif %}"
    tokenizer.chat_template += FAMILIES["chatml"]
    variables = {"mood": "loud", "list": [None, {"a": 'x"\n'}], "off": False, "one": 1.5}
    chat = make_format("model", "Be brief.", tokenizer, settings=TemplateSettings(variables))
    turns = (Message("user", "Hi"), Message("assistant", "Hello."))
    (example,) = chat.encoder().encode([Conversation(turns)])
    stock = chat.tokenizer.apply_chat_template(Conversation(turns).as_dicts(), tokenize=False)
    assert chat.tokenizer.decode(example.ids) == stock
    assert stock.startswith('LOUD x"\n\n<|im_start|>system\nBe brief.<|im_end|>')
    plain = chat.tokenizer.apply_chat_template(Conversation(turns).as_dicts(), tokenize=False, mood="low")
    assert plain.startswith("<|im_start|>system")


@pytest.mark.parametrize("start", ["\n", "  {% if true %}x{% endif %}", "", "\n  {% if true %}", "text "])
def test_a_template_writes_the_same_behind_the_settings(start: str) -> None:
    source = (
        start
        + FAMILIES["chatml"]
        + ("{% endif %}" if start.endswith("true %}") else "")
        + "{% if mood == 'low' %}{% endif %}"
    )
    tokenizer = tokenizer_of("chatml")
    messages = [{"role": "user", "content": "Hi"}]
    stock = rendered(source, tokenizer, messages)
    tokenizer.chat_template = source
    chat = make_format("model", None, tokenizer, settings=TemplateSettings({"mood": "loud"}))
    assert chat.template.jinja != source
    assert rendered(str(chat.template.jinja), tokenizer, messages) == stock


@pytest.mark.parametrize(
    ("variables", "message", "hint"),
    [
        ({"mod": "loud"}, "reads no variable `mod`", "Did you mean `mood`?"),
        ({"zzz": 1}, "reads no variable `zzz`", "Remove it"),
        ({"messages": []}, "`messages` is given to the template", "Remove it"),
        ({"tools": []}, "`tools` is given to the template", "Remove it"),
        ({"add_generation_prompt": True}, "`add_generation_prompt` is given to the template", "Remove it"),
        ({"namespace": 1}, "`namespace` is given to the template", "Remove it"),
    ],
)
def test_a_variable_that_would_change_nothing_is_refused(variables: dict[str, Any], message: str, hint: str) -> None:
    tokenizer = tokenizer_of("qwen3")
    tokenizer.chat_template += "{% if mood == 'low' %}{% endif %}"
    with pytest.raises(UserError) as refused:
        make_format("model", None, tokenizer, settings=TemplateSettings(variables))
    assert message in refused.value.message and hint in str(refused.value.hint)
    assert refused.value.where == f"chat.template_kwargs.{next(iter(variables))}"


def test_a_file_with_a_byte_order_mark_is_read_without_it(tmp_path: Path) -> None:
    for name, text in (("plain.jinja", FAMILIES["chatml"]), ("marked.jinja", "\ufeff" + FAMILIES["chatml"])):
        (tmp_path / name).write_text(text, encoding="utf-8")
    plain, marked = (
        make_format(str(tmp_path / name), None, tokenizer_of("chatml")).template.jinja
        for name in ("plain.jinja", "marked.jinja")
    )
    assert marked == plain


def test_an_empty_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "empty.jinja").write_text("\n", encoding="utf-8")
    with pytest.raises(UserError, match="the template is empty") as refused:
        make_format(str(tmp_path / "empty.jinja"), None, tokenizer_of("chatml"))
    assert "empty.jinja" in str(refused.value.where)


def test_a_file_of_another_encoding_has_its_cure(tmp_path: Path) -> None:
    (tmp_path / "wide.jinja").write_text("{{ messages }}", encoding="utf-16")
    with pytest.raises(UserError, match="Save it as UTF-8"):
        make_format(str(tmp_path / "wide.jinja"), None, tokenizer_of("chatml"))
