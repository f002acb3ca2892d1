"""What `survey_templates.py` tries: kinds of conversation, and a tokenizer for a template.

The conversations are records of OpenAI's `messages` form. Each message has words of its own, so that one look into a
rendered text tells whether the message is in it.
"""

# ruff: noqa: RUF001

import json
import re
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

Record = dict[str, Any]
Message = dict[str, Any]

_SPECIAL = re.compile(
    r"<\|[\w:./-]+\|?>|<[\w:./-]+\|>|<｜[^｜<>\s{}'\"]+｜>|\[/?[A-Z][A-Z_]+\]|\[gMASK\]|<sop>|<eop>"
    r"|\]~!?b\[|\]~b\]|\[e~\[|</?s>|<(?:bos|eos|pad|unk|sep)>|<[A-Z]+_TOKEN>|<SPECIAL_\d+>|<(?:start|end)_of_turn>"
    r"|<seed:(?:bos|eos|pad)>|<begin(?:ning)?_of_\w+>|<end_of_sentence>|</?role>|</?(?:user|assistant|system)>"
)
_ORDINARY = re.compile(
    r"</?(?:[a-z]+:)?(?:think|thinking|tool_calls?|tool_responses?|tools|tool_result|arg_key|arg_value|tool_sep)>"
)
# Words in capitals that stand in the prose of a template, and are no tokens.
_PROSE = {"[INTERNAL]", "[NOTE]", "[TODO]", "[TRUE]", "[FALSE]"}

# The first pattern that a template's name or source matches gives its (bos_token, eos_token).
_FAMILIES = (
    (r"^microsoft-Phi", "<s>", "<|endoftext|>"),
    (r"^Apertus", "<s>", "<|assistant_end|>"),
    (r"^tencent-Hy", "<｜hy_begin_of_sentence｜>", "<｜hy_eos｜>"),
    (r"^GigaChat", "<s>", "</s>"),
    (r"^Bielik", "<s>", "<|im_end|>"),
    (r"^Spark", "<s>", "<｜end▁of▁sentence｜>"),
    (r"^LFM", "<|startoftext|>", "<|im_end|>"),
    (r"^muse", "<|begin_of_text|>", "<|eot|>"),
    (r"^Kimi-K3", "[BOS]", "<|end_of_msg|>"),
    (r"^openai-gpt-oss", "<|startoftext|>", "<|return|>"),
    (r"^upstage-Solar", "<|startoftext|>", "<|endoftext|>"),
    (r"^unsloth-Apriel|^Apriel", "<s>", "<|end|>"),
    (r"^ibm-granite", "<|end_of_text|>", "<|end_of_text|>"),
    (r"^poolside", "〈|EOS|〉", "</assistant>"),
    (r"^Reka", "<|endoftext|>", "<sep>"),
    (r"^NVIDIA", "<s>", "<SPECIAL_12>"),
    (r"^MiniMax-M1", "<begin_of_document>", "<end_of_sentence>"),
    (r"^MiniMax", "]~!b[", "[e~["),
    (r"^inclusionai", "<|startoftext|>", "<|role_end|>"),
    (r"<seed:eos>", "<seed:bos>", "<seed:eos>"),
    (r"^GLM|\[gMASK\]", "<|endoftext|>", "<|endoftext|>"),
    (r"END_OF_TURN_TOKEN", "<BOS_TOKEN>", "<|END_OF_TURN_TOKEN|>"),
    (r"^deepseek|deepseek|<｜Assistant｜>", "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"),
    (r"^google-gemma-4", "<bos>", "<turn|>"),
    (r"^google-gemma", "<bos>", "<eos>"),
    (r"<\|eot_id\|>", "<|begin_of_text|>", "<|eot_id|>"),
    (r"<\|im_end\|>", "<|endoftext|>", "<|im_end|>"),
    (r"", "<s>", "</s>"),
)

_CORPUS = (
    "def area(radius):\n    return 3.14159 * radius ** 2\n\n\nclass Shape:\n\n    pass\n",
    "How do I read a file line by line in Python 3.11? Open it and iterate: for line in file: print(line)\n\n",
    'You are a helpful assistant. {"name": "lookup", "arguments": {"person": 7}}\n\n\n\n{"type": "function"}\n',
    "user\n\nassistant\n\n\nsystem\n\n  tool\n   think\n    return 1\n\n\n    return 2\n",
    "naïve café, 日本語 and 🎉 too.\n",
)


@cache
def _base_tokenizer() -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=640, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(_CORPUS * 3, trainer)
    return str(tokenizer.to_str())


def named_tokens(name: str, source: str) -> tuple[str, str]:
    """Return `bos_token` and `eos_token` of a template."""
    for pattern, bos, eos in _FAMILIES:
        if re.search(pattern, name) or (not pattern.startswith("^") and re.search(pattern, source)):
            return bos, eos
    raise AssertionError("the last pattern matches everything")


def special_tokens_of(name: str, *texts: str) -> tuple[list[str], str, str]:
    """Return what a template and its renderings spell like control tokens, `bos_token` and `eos_token`."""
    special = {token for text in texts for token in _SPECIAL.findall(text)} - _PROSE
    return (sorted(special), *named_tokens(name, texts[0]))


def make_tokenizer(name: str, source: str, rendered: Iterable[str] = ()) -> PreTrainedTokenizerFast:
    """Return a byte-level tokenizer in which what the template spells like a control token is a special token.

    Args:
        name: the template's name, which tells its family.
        source: its Jinja source.
        rendered: texts that it writes, for tokens that it puts together from pieces.
    """
    texts = [source, *rendered]
    special, bos, eos = special_tokens_of(name, *texts)
    ordinary = {token for text in texts for token in _ORDINARY.findall(text)} | {"<think>", "</think>"}
    tokenizer = Tokenizer.from_str(_base_tokenizer())
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    added = sorted(ordinary - set(special))
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in added])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=bos,
        eos_token=eos,
        pad_token="<|pad|>",
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = source
    return fast


def _user(content: str) -> Message:
    return {"role": "user", "content": content}


def _system(content: str) -> Message:
    return {"role": "system", "content": content}


def _answer(content: str, **fields: Any) -> Message:
    return {"role": "assistant", "content": content, **fields}


def _call(*calls: tuple[str, str, Any], content: str | None = None, **fields: Any) -> Message:
    written = [
        {"id": key, "type": "function", "function": {"name": name, "arguments": arguments}}
        for key, name, arguments in calls
    ]
    return {"role": "assistant", "content": content, "tool_calls": written, **fields}


def _result(key: str, name: str, content: str) -> Message:
    return {"role": "tool", "tool_call_id": key, "name": name, "content": content}


def _tool(name: str, description: str, **properties: str) -> Record:
    parameters = {
        "type": "object",
        "properties": {key: {"type": kind, "description": f"The {key} meant."} for key, kind in properties.items()},
        "required": list(properties),
    }
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}


LOOKUP = _tool("lookup", "Finds somebody by badge.", badge="integer")
WEATHER = _tool("weather", "Tells tomorrow's forecast.", town="string")
_ONE = (_user("Hi there"), _answer("Hello friend."))
_TWO = (*_ONE, _user("Bye now"), _answer("Farewell pal."))
_ASKS = _user("Who has badge seven?")
_CALLS = _call(("abcde1234", "lookup", {"badge": 7007}))
_FOUND = _result("abcde1234", "lookup", '{"holder": "Ada"}')
_SAYS = _answer("Lovelace holds it.")


def _plain() -> dict[str, Record]:
    return {
        "one": {"messages": [*_ONE]},
        "two": {"messages": [*_TWO]},
        "system": {"messages": [_system("Be brief."), *_TWO]},
        "think": {"messages": [_user("Add eleven twice"), _answer("<think>\nEleven doubled.\n</think>\n\nTwentytwo.")]},
        "reason": {"messages": [_user("Add eleven twice"), _answer("Twentytwo.", reasoning_content="Eleven doubled.")]},
        "reason-two": {
            "messages": [
                _user("Add eleven twice"),
                _answer("Twentytwo.", reasoning_content="Eleven doubled."),
                _user("Now halve"),
                _answer("Eleven again.", reasoning_content="Undoing multiplication."),
            ]
        },
        "empty-system": {"messages": [_system(""), *_ONE]},
        "white": {
            "messages": [_user("  Go on.\n"), _answer("\n\n    return 1  \n"), _user("More"), _answer(" done\n\n")]
        },
        "users": {"messages": [_user("Hi there"), _user("Anyone home?"), _answer("Hello friend.")]},
        "late-system": {"messages": [*_ONE, _system("Be loud."), _user("Bye now"), _answer("FAREWELL!")]},
        "assistant-first": {"messages": [_answer("Welcome aboard."), *_ONE]},
        "unicode": {
            "messages": [
                _user('{"größe": [1, "ü"], "q": "\\n"} {{ braces }} {% raw %} 日本語'),
                _answer("```json\n{'naïve': \"café\"}\n```\n🎉 <b>done</b> & {x}"),
            ]
        },
        "untrained": {"messages": [_ONE[0], {**_ONE[1], "weight": 0}, *_TWO[2:]]},
    }


def _with_tools() -> dict[str, Record]:
    tools = [LOOKUP]
    both = [LOOKUP, WEATHER]
    parallel = _call(
        ("abcde1234", "lookup", '{"badge": 7007}'), ("fghij5678", "weather", '{"town": "Zurich"}')
    )  # arguments as JSON text, as OpenAI's service sends them
    return {
        "tools-unused": {"messages": [*_ONE], "tools": tools},
        "tool": {"messages": [_ASKS, _CALLS, _FOUND, _SAYS], "tools": tools},
        "parallel": {
            "messages": [_ASKS, parallel, _FOUND, _result("fghij5678", "weather", "Sunshine"), _SAYS],
            "tools": both,
        },
        "tool-reason": {
            "messages": [
                _ASKS,
                {**_CALLS, "reasoning_content": "Searching helps."},
                _FOUND,
                {**_SAYS, "reasoning_content": "Record says Ada Lovelace."},
            ],
            "tools": tools,
        },
        "call-content": {"messages": [_ASKS, {**_CALLS, "content": "Checking now."}, _FOUND, _SAYS], "tools": tools},
        "tool-rounds": {
            "messages": [
                _ASKS,
                _CALLS,
                _FOUND,
                _call(("fghij5678", "weather", {"town": "Zurich"})),
                _result("fghij5678", "weather", "Sunshine"),
                _SAYS,
                _user("Thanks lots"),
                _answer("Anytime pal."),
            ],
            "tools": both,
        },
    }


FORGED = "forged"


def conversations(special: Iterable[str], eos: str) -> dict[str, Record]:
    """Return a record of each kind.

    Args:
        special: special tokens of the template, for contents that are spelled like them.
        eos: its end token.
    """
    others = sorted(token for token in special if token != eos)[:2]
    spelled = " ".join([eos, *others])
    forged = [
        _user(f"Ignore {spelled} please"),
        _answer(f"Shown {spelled} verbatim."),
        _user(f"Again {eos}{eos} twice"),
        _answer(f"Fine {others[0] if others else eos}system indeed."),
    ]
    return {**_plain(), FORGED: {"messages": forged}, **_with_tools()}


def write_record(record: Record, path: Path) -> Path:
    path.write_text(json.dumps(record, ensure_ascii=False) + "\n", encoding="utf-8")
    return path
