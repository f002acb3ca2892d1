"""A text that a chat template wrote is read as the conversation that it was written from, whatever the family."""

import json
import random
from collections.abc import Callable
from pathlib import Path

import jinja2
import pytest

from peftchat.conversations import ProblemLog, read_conversations

Turns = list[dict[str, str]]


def chatml(turns: Turns) -> str:
    template = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    return jinja2.Template(template).render(messages=turns)


def llama_2(turns: Turns) -> str:
    system, *others = turns if turns[0]["role"] == "system" else [{"content": ""}, *turns]
    text = ""
    for asked, answer in zip(others[::2], others[1::2], strict=True):
        before = f"<<SYS>>\n{system['content']}\n<</SYS>>\n\n" if system["content"] and not text else ""
        text += f"<s>[INST] {before}{asked['content']} [/INST] {answer['content']} </s>"
    return text


def llama_3(turns: Turns) -> str:
    body = "".join(f"<|start_header_id|>{t['role']}<|end_header_id|>\n\n{t['content']}<|eot_id|>" for t in turns)
    return f"<|begin_of_text|>{body}"


def zephyr(turns: Turns) -> str:
    return "".join(f"<|{turn['role']}|>\n{turn['content']}</s>\n" for turn in turns)


def phi(turns: Turns) -> str:
    return "".join(f"<|{turn['role']}|>\n{turn['content']}<|end|>\n" for turn in turns) + "<|endoftext|>"


def gemma(turns: Turns) -> str:
    names = {"assistant": "model", "user": "user", "system": "system"}
    body = "".join(f"<start_of_turn>{names[t['role']]}\n{t['content']}<end_of_turn>\n" for t in turns)
    return f"<bos>{body}"


def random_turns(rng: random.Random) -> Turns:
    words = ["Hi", "a\n\nb", "2 < 3", "[x]", "### Title", "</p>", "é", "  x  y", "user", "<think>\nno\n</think>\n\nyes"]
    turns = [{"role": "system", "content": rng.choice(words).strip()}] if rng.random() < 0.5 else []
    for _ in range(rng.randint(1, 3)):
        for role in ("user", "assistant"):
            turns.append({"role": role, "content": " ".join(rng.choices(words, k=rng.randint(1, 3))).strip()})
    return turns


@pytest.mark.parametrize("family", [llama_2, llama_3, zephyr, phi, gemma, chatml])
def test_the_marks_are_taken_out_again(family: Callable[[Turns], str], tmp_path: Path) -> None:
    rng = random.Random(1)
    written = [random_turns(rng) for _ in range(20)]
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": family(turns), "id": 7}) + "\n" for turns in written))
    read = [[{"role": m.role, "content": m.content} for m in one.messages] for one in read_conversations(path)]
    assert read == written


def test_alpacas_prompt_and_an_open_answer(tmp_path: Path) -> None:
    path = tmp_path / "texts.jsonl"
    text = "Below is a task.\n\n### Instruction:\nTranslate.\n\n### Input:\nGuten Tag\n\n### Response:\nGood day</s>"
    path.write_text(json.dumps({"text": text}) + "\n" + json.dumps({"text": text + "\n### Instruction:\nMore\n"}))
    expected = [("system", "Below is a task."), ("user", "Translate.\n\nGuten Tag"), ("assistant", "Good day")]
    for one in read_conversations(path):
        assert [(message.role, message.content) for message in one.messages] == expected


@pytest.mark.parametrize(
    ("text", "detail"),
    [
        ("<|im_start|>user\nHi<|im_end|>\nlost<|im_start|>assistant\nHello<|im_end|>", "before turn 2"),
        ("<s>[INST] Hi [/INST] Hello </s> and this", "behind the last turn"),
        ("<|im_start|>narrator\nHi<|im_end|>", "unknown role 'narrator'"),
        ("### Instruction:\nx\n### Response:\ny\n### Input:\nz", "behind no '### Instruction:'"),
    ],
)
def test_words_that_belong_to_no_turn_are_refused(text: str, detail: str, tmp_path: Path) -> None:
    path = tmp_path / "texts.jsonl"
    path.write_text(json.dumps({"text": text}))
    log = ProblemLog()
    assert not list(read_conversations(path, format="templated_text", problems=log))
    assert detail in str(log.first)
