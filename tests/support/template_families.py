"""Chat templates in the manner of ten families of models, and random conversations with calls, reasoning and flags."""

import random

from peftchat.conversation import Conversation, Message, Role, ToolCall
from tests.support.random_text import FORGERIES

EACH, END = "{% for m in messages %}", "{% endfor %}"
ASK = "{% if add_generation_prompt %}"
TOOLS = "{% if tools %}{{ '<|im_start|>system\nTools: ' + (tools | tojson) + '<|im_end|>\n' }}{% endif %}"
CALLS = (
    "{% for c in m.tool_calls or [] %}{{ '<tool_call>' + c.function.name + ' ' + "
    "(c.function.arguments | tojson) + '</tool_call>' }}{% endfor %}"
)
REFUSES_TOOLS = (
    "{% if m.role == 'tool' or m.tool_calls %}{{ raise_exception('this template knows no tools') }}{% endif %}"
)

FAMILIES = {
    "chatml": TOOLS
    + EACH
    + "{{ '<|im_start|>' + m.role + '\n' + m.content }}"
    + CALLS
    + "{{ '<|im_end|>\n' }}"
    + END
    + ASK
    + "{{ '<|im_start|>assistant\n' }}{% endif %}",
    "llama3": "{{ bos_token }}"
    + EACH
    + REFUSES_TOOLS
    + "{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content | trim + '<|eot_id|>' }}"
    + END
    + ASK
    + "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}",
    "mistral": "{{ bos_token }}"
    + EACH
    + REFUSES_TOOLS
    + "{% if m.role == 'assistant' %}{{ ' ' + m.content + eos_token }}"
    + "{% else %}{{ '[INST] ' + m.content + ' [/INST]' }}{% endif %}"
    + END,
    "gemma": "{{ bos_token }}"
    + EACH
    + REFUSES_TOOLS
    + "{% if m.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    + "{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' }}"
    + "{{ m.content | trim + '<end_of_turn>\n' }}"
    + END
    + ASK
    + "{{ '<start_of_turn>model\n' }}{% endif %}",
    "qwen3": TOOLS
    + "{% set ns = namespace(last=-1) %}{% for m in messages %}"
    + "{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    + EACH
    + "{{ '<|im_start|>' + m.role + '\n' }}"
    + "{% if m.role == 'assistant' and loop.index0 > ns.last %}"
    + "{{ '<think>\n' + (m.reasoning_content or '') + '\n</think>\n\n' }}{% endif %}{{ m.content }}"
    + CALLS
    + "{{ '<|im_end|>\n' }}"
    + END
    + ASK
    + "{{ '<|im_start|>assistant\n' }}{% endif %}",
    "channels": TOOLS
    + EACH
    + "{% if m.role == 'assistant' %}{% if m.reasoning_content and loop.last %}"
    + "{{ '<|start|>assistant<|channel|>analysis<|message|>' + m.reasoning_content + '<|end|>' }}{% endif %}"
    + "{{ '<|start|>assistant<|channel|>final<|message|>' + m.content }}"
    + CALLS
    + "{{ '<|return|>' if loop.last else '<|end|>' }}"
    + "{% else %}{{ '<|start|>' + m.role + '<|message|>' + m.content + '<|end|>' }}{% endif %}"
    + END
    + ASK
    + "{{ '<|start|>assistant' }}{% endif %}",
    "roles-as-ends": TOOLS
    + EACH
    + "{{ '<|' + m.role + '|>\n' + m.content }}"
    + CALLS
    + END
    + ASK
    + "{{ '<|assistant|>\n' }}{% endif %}",
    "deepseek": TOOLS
    + "{{ bos_token }}"
    + EACH
    + "{% if m.role == 'assistant' %}{{ '<|assistant|>' + (m.reasoning_content + '</think>' if "
    + "m.reasoning_content and loop.last else '') + m.content }}"
    + CALLS
    + "{{ eos_token }}{% else %}{{ '<|' + m.role + '|>' + m.content }}{% endif %}"
    + END
    + ASK
    + "{{ '<|assistant|>' }}{% endif %}",
    "phi": EACH
    + REFUSES_TOOLS
    + "{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}"
    + END
    + ASK
    + "{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}",
    "zephyr": EACH
    + REFUSES_TOOLS
    + "{{ '<|' + m.role + '|>\n' + m.content + eos_token + '\n' }}"
    + END
    + ASK
    + "{{ '<|assistant|>\n' }}{% endif %}",
}
SPECIAL = [
    "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "[INST]", "[/INST]",
    "<start_of_turn>", "<end_of_turn>", "<|start|>", "<|end|>", "<|return|>", "<|channel|>", "<|message|>",
    "<|system|>", "<|user|>", "<|assistant|>", "<|tool|>",
]  # fmt: skip
_WORDS = ["Hello", "the id", "naïve", "日本", "7", "```py\n  x = 1\n```", "it's", "end", "user", "a", "<think>", '"q"']
_SPACES = ["\n\n    ", " ", "\n", "\t", "  \n"]


def _text(draw: random.Random, *, hostile: bool) -> str:
    words = draw.choices(_WORDS, k=draw.randint(1, 5))
    if hostile and draw.random() < 0.4:
        words.insert(draw.randrange(len(words)), draw.choice([*SPECIAL, *FORGERIES]))
    text = " ".join(words)
    before = draw.choice(_SPACES) if draw.random() < 0.2 else ""
    return before + text + (draw.choice(_SPACES) if draw.random() < 0.2 else "")


def rich_conversations(count: int, seed: int, *, hostile: bool) -> list[Conversation]:
    """Random conversations with a user first, calls and their results, reasoning, and answers not to be trained."""
    draw = random.Random(seed)
    tool = '[{"type": "function", "function": {"name": "find", "description": "Finds.", "parameters": {}}}]'
    found = []
    for number in range(count):
        turns: list[Message] = []
        with_tools, with_reasoning = draw.random() < 0.3, draw.random() < 0.3
        if draw.random() < 0.3:
            turns.append(Message("system", _text(draw, hostile=hostile)))
        for _ in range(draw.choice([1, 1, 2, 3])):
            turns.append(Message("user", _text(draw, hostile=hostile)))
            if with_tools and draw.random() < 0.7:
                call = ToolCall("find", f'{{"text": "{draw.choice(["a", "b c", "日本"])}"}}', "abcde1234")
                turns.append(Message("assistant", "", (call,)))
                result: Role = "tool"
                turns.append(Message(result, _text(draw, hostile=hostile), (), "abcde1234", "find"))
            reasoning = _text(draw, hostile=False).replace("<think>", "") if with_reasoning else None
            train = False if draw.random() < 0.1 else None
            turns.append(Message("assistant", _text(draw, hostile=hostile), (), None, None, reasoning, train))
        found.append(Conversation(tuple(turns), f"random:{number + 1}", tool if with_tools else None))
    return found
