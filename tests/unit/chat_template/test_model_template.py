"""`chat.template: model`: templates as models bring them, against stock `apply_chat_template` with generation marks."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import AddedToken

from peftchat.chat_template.chat_format import ChatFormat, make_format
from peftchat.chat_template.loss_mask import TurnPart, labels_for, loss_mask_table, part_of, role_of
from peftchat.chat_template.templates import TemplateSpan
from peftchat.conversation import Conversation, Message
from peftchat.errors import UserError
from tests.support.random_text import FORGERIES, conversations
from tests.support.tokenizers import built

LOOP, END_LOOP = "{% for m in messages %}", "{% endfor %}"
ALTERNATE = (
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
)


def either(answer: str, other: str) -> str:
    """An answer, between generation marks, or another turn; both as expressions."""
    marked = f"{{% generation %}}{{{{ {answer} }}}}{{% endgeneration %}}"
    return f"{{% if m['role'] == 'assistant' %}}{marked}{{% else %}}{{{{ {other} }}}}{{% endif %}}"


TO_EOS = "m['content'] + eos_token"
TO_IM_END = either("m['content'] + '<|im_end|>'", "m['content'] + '<|im_end|>'") + "{{ '\n' }}"
IM_START = "{{ '<|im_start|>' + m['role'] + '\n' }}"
TEMPLATES = {
    "llama2": LOOP
    + ALTERNATE
    + "{% if m['role'] == 'assistant' %}{{ ' ' }}{% endif %}"
    + either("m['content'].strip() + ' ' + eos_token", "bos_token + '[INST] ' + m['content'].strip() + ' [/INST]'")
    + END_LOOP,
    "llama3": "{{ bos_token }}"
    + LOOP
    + "{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' }}"
    + either("m['content'] | trim + '<|eot_id|>'", "m['content'] | trim + '<|eot_id|>'")
    + END_LOOP,
    "zephyr": LOOP + "{{ '<|' + m['role'] + '|>\n' }}" + either(TO_EOS, TO_EOS) + "{{ '\n' }}" + END_LOOP,
    "mistral": "{{ bos_token }}"
    + LOOP
    + "{% if m['role'] == 'assistant' %}{{ ' ' }}{% endif %}"
    + either(TO_EOS, "'[INST] ' + m['content'].rstrip() + '[/INST]'")
    + END_LOOP,
    "glm": LOOP + "{{ '<|' + m['role'] + '|>\n' }}" + either(TO_EOS, "m['content']") + END_LOOP,
    "default-system": "{% if messages[0]['role'] != 'system' %}"
    + "{{ '<|im_start|>system\nBe kind.<|im_end|>\n' }}{% endif %}"
    + LOOP
    + IM_START
    + TO_IM_END
    + END_LOOP,
}
OPENINGS = {
    "llama3": "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "zephyr": "<|assistant|>\n",
    "glm": "<|assistant|>\n",
    "default-system": "<|im_start|>assistant\n",
}
TEMPLATES = {
    name: template + f"{{% if add_generation_prompt %}}{{{{ {OPENINGS.get(name, '')!r} }}}}{{% endif %}}"
    for name, template in TEMPLATES.items()
}
SPECIAL = ["<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
SPECIAL += ["<|system|>", "<|user|>", "<|assistant|>", "<|tool|>", "[INST]", "[/INST]"]
CASES = ["byte-level-digits", "llama2", "gemma"]
"""Tokenizers whose characters stock can follow, so that its mask is exact."""


def chat_of(name: str, template: str, system: str | None = None) -> ChatFormat:
    tokenizer = copy.deepcopy(built(name).tokenizer)
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL], special_tokens=True)
    tokenizer.bos_token = tokenizer.bos_token or "<|endoftext|>"
    tokenizer.chat_template = template
    return make_format("model", system, tokenizer)


def conversations_for(template: str, *, forged: bool) -> list[Conversation]:
    """Conversations that the template takes; with an empty message, some write no content at all."""
    found = []
    for conversation in conversations(600, forged=forged):
        turns = [message for message in conversation.messages if message.content.strip()]
        if template == "llama2":
            turns = [Message(("user", "assistant")[place % 2], turn.content) for place, turn in enumerate(turns)]
        if turns and (forged or not any(token in turn.content for turn in turns for token in SPECIAL)):
            found.append(Conversation(tuple(turns), conversation.source))
    return found


def text_of(chat: ChatFormat, conversation: Conversation) -> str:
    (example,) = examples_of(chat, conversation)
    return "".join(piece.text for piece in example)


def examples_of(chat: ChatFormat, conversation: Conversation) -> list[list[TemplateSpan]]:
    return [list(example) for example in chat.template.examples(conversation)]


def parts_of(chat: ChatFormat, *turns: tuple[Any, str]) -> list[tuple[str, str | None, str]]:
    """(part, role, text) of a conversation, neighbors of a kind joined."""
    found: list[tuple[str, str | None, str]] = []
    (example,) = examples_of(chat, Conversation(tuple(Message(role, content) for role, content in turns)))
    for piece in example:
        kind = part_of(piece.tag).name, role_of(piece.tag)
        if found and found[-1][:2] == kind:
            found[-1] = (*kind, found[-1][2] + piece.text)
        else:
            found.append((*kind, piece.text))
    return found


def answered(conversation: Conversation) -> Conversation:
    """The conversation with a question first, an answer last, and no answer that begins with white space."""
    turns = [turn for turn in conversation.messages if turn.role in ("user", "assistant")]
    turns = [turn._replace(content=f"a{turn.content.strip()}") if turn.role == "assistant" else turn for turn in turns]
    return Conversation((Message("user", "q"), *turns, Message("assistant", "Bye.")), conversation.source)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("template", ["zephyr", "glm", "default-system"])
def test_text_ids_and_mask_are_stocks(template: str, name: str) -> None:
    chat = chat_of(name, TEMPLATES[template])
    batch = [answered(one) for one in conversations_for(template, forged=False)]
    assert len(batch) > 200
    rows = chat.encoder().batch(batch)
    table = loss_mask_table("answers")
    encoded = chat.tokenizer.apply_chat_template(
        [conversation.as_dicts() for conversation in batch], return_assistant_tokens_mask=True, return_dict=True
    )
    assert len(rows) == len(batch)
    for conversation, row, ids, mask in zip(batch, rows, encoded["input_ids"], encoded["assistant_masks"], strict=True):
        assert row.ids.tolist() == ids, conversation
        labels = labels_for(row.ids, row.token_tags, table)
        assert np.array_equal(labels, np.where(mask, ids, -100)), conversation


@pytest.mark.parametrize("template", TEMPLATES)
def test_messages_write_no_special_token(template: str) -> None:
    chat = chat_of("gemma", TEMPLATES[template])
    encoder = chat.encoder()
    special = {number for number, token in chat.tokenizer.added_tokens_decoder.items() if token.special}
    for conversation in conversations_for(template, forged=True):
        harmless = Conversation(tuple(Message(message.role, "a") for message in conversation.messages))
        rows, plain = encoder.encode([conversation]), encoder.encode([harmless])
        # What white space a template strips may make further examples.
        written = [number for number in rows[-1].ids.tolist() if number in special]
        assert written == [number for number in plain[-1].ids.tolist() if number in special], conversation


def test_the_parts_of_a_turn() -> None:
    turns = (("user", "q"), ("assistant", "a"), ("user", "r"))
    assert parts_of(chat_of("llama2", TEMPLATES["zephyr"]), *turns)[:8] == [
        ("HEADER", "user", "<|user|>\n"), ("CONTENT", "user", "q"), ("END", "user", "</s>"), ("TRAILER", "user", "\n"),
        ("HEADER", "assistant", "<|assistant|>\n"), ("CONTENT", "assistant", "a"), ("END", "assistant", "</s>"),
        ("TRAILER", "assistant", "\n"),
    ]  # fmt: skip
    assert parts_of(chat_of("llama2", TEMPLATES["llama2"]), *turns) == [
        ("HEADER", "user", "<s>[INST] "), ("CONTENT", "user", "q"), ("END", "user", " [/INST]"),
        ("PREAMBLE", "assistant", " "), ("CONTENT", "assistant", "a"), ("END", "assistant", " </s>"),
    ]  # fmt: skip


def test_a_turn_without_an_end_token_does_not_take_the_next_header() -> None:
    found = parts_of(chat_of("llama2", TEMPLATES["glm"]), ("user", "q"), ("assistant", "a"))
    assert found == [
        ("HEADER", "user", "<|user|>\n"), ("CONTENT", "user", "q"), ("HEADER", "assistant", "<|assistant|>\n"),
        ("CONTENT", "assistant", "a"), ("END", "assistant", "</s>"),
    ]  # fmt: skip


def test_an_answer_that_nothing_asks_for_is_context() -> None:
    found = parts_of(chat_of("llama2", TEMPLATES["llama3"]), ("assistant", "0"), ("user", "q"))
    header = "<|start_header_id|>assistant<|end_header_id|>\n\n"
    assert found[:3] == [("OUTSIDE", None, "<s>"), ("HEADER", "assistant", header), ("CONTENT", "assistant", "0")]
    found = parts_of(chat_of("llama2", TEMPLATES["default-system"]), ("assistant", "0"))
    default = "<|im_start|>system\nBe kind.<|im_end|>\n"
    assert found[:2] == [("OUTSIDE", None, default), ("HEADER", "assistant", "<|im_start|>assistant\n")]


def test_a_default_system_prompt_is_used_where_there_is_none() -> None:
    chat = chat_of("llama2", TEMPLATES["default-system"], system="Be brief.")
    own = (("system", "Mine."), ("user", "q"))
    assert ("CONTENT", "system", "Be brief.") in parts_of(chat, ("user", "q"), ("assistant", "a"))
    assert ("CONTENT", "system", "Mine.") in parts_of(chat, *own)
    (row,) = chat.encoder().encode([Conversation((Message("user", "q"), Message("assistant", "a")))])
    assert np.count_nonzero(loss_mask_table("last_answer")[row.token_tags]) == 2


@pytest.mark.parametrize("rewrite", ["m['content'] | upper", "m['content'][:3]"])
def test_lost_content_is_refused(rewrite: str) -> None:
    template = TEMPLATES["zephyr"].replace("m['content'] + eos_token", f"({rewrite}) + eos_token")
    chat = chat_of("llama2", template)
    with pytest.raises(UserError, match=r"data\.jsonl:7: the chat template does not write the content of message 1"):
        examples_of(chat, Conversation((Message("user", "some  text"), Message("assistant", "more")), "data.jsonl:7"))


def test_white_space_that_a_template_strips_is_no_loss() -> None:
    said = "(m['content'] | trim)"
    template = LOOP + "{{ '<|' + m['role'] + '|>' + " + said + " + eos_token }}" + END_LOOP
    template += "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
    turns = (("user", " q\n"), ("assistant", "\n a "), ("user", "r"), ("assistant", "b"))
    found = parts_of(chat_of("llama2", template), *turns)
    assert [text for part, _, text in found if part == "CONTENT"] == ["q", "a", "r", "b"]


def test_a_rewritten_history_makes_an_example_an_answer() -> None:
    template = (
        LOOP
        + IM_START
        + "{% if m['role'] == 'assistant' and loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
        + TO_IM_END
        + END_LOOP
        + "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    chat = chat_of("gemma", template)
    turns = (("user", "q"), ("assistant", "a"), ("user", "r"), ("assistant", "b"))
    conversation = Conversation(tuple(Message(role, text) for role, text in turns))  # type: ignore[arg-type]
    batch = chat.encoder().batch([conversation, conversation])
    assert len(batch) == 4 and [len(found) for _, found in batch.by_conversation()] == [2, 2]
    table = loss_mask_table("answers")
    trained = [chat.tokenizer.decode(row.ids[table[row.token_tags]].tolist()) for row in batch][:2]
    assert trained == ["<think>\n\n</think>\n\na<|im_end|>", "<think>\n\n</think>\n\nb<|im_end|>"]


@pytest.mark.parametrize("content", ["end", "im", "start", "a", "|"])
def test_a_content_that_stands_in_a_special_token_is_not_found_there(content: str) -> None:
    chat = chat_of("gemma", TEMPLATES["default-system"])
    (row,) = chat.encoder().encode([Conversation((Message("user", content), Message("assistant", content)))])
    stock = chat.tokenizer.apply_chat_template(
        [{"role": "user", "content": content}, {"role": "assistant", "content": content}], return_dict=False
    )
    assert row.ids.tolist() == stock


def test_a_template_that_refuses_is_an_input_error() -> None:
    chat = chat_of("llama2", TEMPLATES["llama2"])
    twice = Conversation((Message("user", "a"), Message("user", "b")), "data.jsonl:3")
    with pytest.raises(UserError, match=r"data\.jsonl:3: .*roles must alternate"):
        chat.encoder().encode([twice])
    stumbling = chat_of("llama2", TEMPLATES["zephyr"] + "{{ 1 / (messages | length - 1) }}")
    with pytest.raises(UserError, match="fails on the conversation: division by zero"):
        stumbling.encoder().encode([Conversation((Message("user", "a"),))])


def test_a_template_without_an_end_token_is_refused() -> None:
    with pytest.raises(UserError, match="no special token behind an answer"):
        chat_of("llama2", LOOP + "{{ m['role'] + ': ' + m['content'] + '\n' }}" + END_LOOP)


def test_a_tokenizer_without_a_template_is_refused() -> None:
    with pytest.raises(UserError, match="no chat template"):
        make_format("model", None, copy.deepcopy(built("llama2").tokenizer))


def test_of_several_templates_the_default_one_is_used() -> None:
    chat = chat_of("llama2", {"default": TEMPLATES["zephyr"], "tool_use": "{{ x }}"})  # type: ignore[arg-type]
    assert chat.tokenizer.chat_template == {"default": TEMPLATES["zephyr"], "tool_use": "{{ x }}"}
    found = parts_of(chat, ("user", "q"), ("assistant", "a"))
    assert found[0] == ("HEADER", "user", "<|user|>\n")


@pytest.mark.real
def test_smollms_own_template(demo_model: Path) -> None:
    from transformers import AutoTokenizer

    chat = make_format("model", None, AutoTokenizer.from_pretrained(demo_model))
    assert chat.template.end_token == chat.tokenizer.eos_token == "<|im_end|>"
    assert not chat.new_tokens
    with_marks = chat.tokenizer.chat_template.replace(
        "message['content'] + '<|im_end|>' + '\n'}}",
        "''}}{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|im_end|>' }}"
        "{% endgeneration %}{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}",
    )
    assert "generation" in with_marks
    batch = [
        answered(one)
        for one in conversations_for("smollm", forged=False)
        if not any(f in str(one) for f in FORGERIES[:9])
    ]
    encoded = chat.tokenizer.apply_chat_template(
        [one.as_dicts() for one in batch], chat_template=with_marks, return_assistant_tokens_mask=True, return_dict=True
    )
    rows = chat.encoder().encode(batch)
    for row, ids, mask in zip(rows, encoded["input_ids"], encoded["assistant_masks"], strict=True):
        assert row.ids.tolist() == ids
        labels = labels_for(row.ids, row.token_tags, loss_mask_table("answers"))
        assert np.array_equal(labels, np.where(mask, ids, -100))
    parts = {part_of(int(value)) for row in rows for value in row.token_tags}
    assert parts == {TurnPart.OUTSIDE, TurnPart.HEADER, TurnPart.CONTENT, TurnPart.END, TurnPart.TRAILER}
    for row in rows:
        outside = row.ids[[part_of(tag) == TurnPart.OUTSIDE for tag in row.token_tags.tolist()]]
        default = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        assert chat.tokenizer.decode(outside) == default


@pytest.mark.parametrize("reasoning", ["2", "assistant", "user", "a"])
def test_lost_reasoning_is_not_taken_for_found_in_other_text(reasoning: str) -> None:
    chat = chat_of("llama2", TEMPLATES["zephyr"])
    answer = Message("assistant", "a user is an assistant, 2", reasoning=reasoning)
    with pytest.raises(UserError, match="does not write the reasoning of message 2"):
        examples_of(chat, Conversation((Message("user", "q"), answer)))


def test_a_lost_short_message_is_not_taken_for_found_in_other_text() -> None:
    template = (
        TEMPLATES["zephyr"]
        .replace(LOOP, LOOP + "{% if m['role'] != 'system' %}", 1)
        .replace(END_LOOP, "{% endif %}" + END_LOOP, 1)
    )
    chat = chat_of("llama2", template)
    turns = (Message("system", "use"), Message("user", "a user"), Message("assistant", "b"))
    with pytest.raises(UserError, match=r"content of message 1 \(system\): 'use'"):
        examples_of(chat, Conversation(turns))


def test_reasoning_reaches_templates_that_read_parts() -> None:
    parts = (
        "{% if m.content is string %}{{ m.content }}{% else %}{% for p in m.content %}"
        "{{ '[THINK]' + p.thinking + '[/THINK]' if p.type == 'thinking' else p.text }}{% endfor %}{% endif %}"
    )
    chat = chat_of(
        "llama2",
        LOOP
        + "{{ '<|' + m.role + '|>' }}"
        + parts
        + "{{ eos_token }}"
        + END_LOOP
        + "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}",
    )
    turns = (Message("user", "q"), Message("assistant", "two", reasoning="one and one"))
    assert text_of(chat, Conversation(turns)) == "<|user|>q</s><|assistant|>[THINK]one and one[/THINK]two</s>"


def test_a_variable_that_nothing_sets_is_named() -> None:
    with pytest.raises(UserError, match="needs the variable `functions`") as caught:
        examples_of(
            chat_of("llama2", TEMPLATES["zephyr"] + "{{ functions.all }}"),
            Conversation((Message("user", "q"), Message("assistant", "a"))),
        )
    assert "chat.template_kwargs: {functions" in str(caught.value)
