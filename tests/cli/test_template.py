"""`peftchat template`: the check of a template, as a user runs it."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from peftchat.cli.template import command
from peftchat.errors import UserError, VerificationError

EACH = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
END = "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
CHATML = EACH + "{{ m.content + '<|im_end|>\n' }}" + END
THINKING = EACH + "{% if loop.last and m.role == 'assistant' %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
THINKING += "{{ m.content + '<|im_end|>\n' }}" + END


def run(tmp_path: Path, template: str, *arguments: object) -> tuple[str, BaseException | None]:
    file = tmp_path / "own.jinja"
    file.write_text(template)
    result = CliRunner().invoke(command, [str(file), *map(str, arguments)])
    return result.output, result.exception


def states(output: str) -> dict[str, str]:
    rows = [line.split("  ", 1) for line in output.splitlines() if "  " in line]
    return {kind: state.strip() for kind, state in rows}


def test_each_kind_is_told_with_its_examples_or_its_refusal(tmp_path: Path) -> None:
    output, failure = run(tmp_path, THINKING)
    assert failure is None and "An answer ends with <|im_end|>." in output
    found = states(output)
    assert found["one answer"] == found["odd white space"] == found["text like tokens"] == "right"
    assert found["two answers"] == "right, in 2 examples: the template rewrites earlier turns"
    assert found["tool call"].startswith("refused: the chat template does not write the tool")
    assert found["reasoning"].startswith("refused: the chat template does not write the reasoning of message 2")


def test_a_template_that_refuses_plain_conversations_fails(tmp_path: Path) -> None:
    _, failure = run(tmp_path, "{{ raise_exception('no') if messages | length > 2 }}" + CHATML)
    assert isinstance(failure, VerificationError) and "refuses 1 plain conversations" in str(failure)
    _, failure = run(tmp_path, "{% for m in messages %}{{ m.content + '\n' }}{% endfor %}")
    assert isinstance(failure, VerificationError) and "chat.end_token" in str(failure)
    output, failure = run(tmp_path, "{% for m in messages %}{{ m.content + '\n' }}{% endfor %}", "--end-token", "</s>")
    assert failure is None and "ends with </s>" in output


def test_a_file_of_conversations_is_counted(tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    thought = [turns[0], {**turns[1], "reasoning_content": "why"}]
    data.write_text("".join(json.dumps({"messages": one}) + "\n" for one in (turns, turns + turns, thought)))
    output, failure = run(tmp_path, THINKING, "--data", data)
    assert "2 of 3 conversations are right; they become 3 examples." in output
    assert f"1 refused, first {data}:3: the chat template does not write the reasoning" in output
    assert isinstance(failure, VerificationError)
    output, _ = run(tmp_path, THINKING, "--data", data, "--json")
    lines = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    assert lines[0]["end_tokens"] == ["<|im_end|>"] and [line["examples"] for line in lines[1:]] == [1, 2, 0]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--set", "nothing"], "is not NAME=VALUE"),
        (["--end-token", "zzz"], "not a special token"),
        (["--data", "missing.jsonl"], "missing.jsonl"),
    ],
)
def test_mistakes_are_the_users(tmp_path: Path, arguments: list[str], words: str) -> None:
    _, failure = run(tmp_path, CHATML, *arguments)
    assert isinstance(failure, UserError) and words in str(failure)
    absent = CliRunner().invoke(command, [str(tmp_path / "absent.jinja")]).exception
    assert isinstance(absent, UserError) and "cannot be read" in str(absent)


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{% for m in messages %}\n{% if %}", "line 2: the chat template is no valid Jinja"),
        ("{% include 'other.jinja' %}", "includes another file"),
    ],
)
def test_a_template_that_cannot_be_rendered_is_one_mistake(tmp_path: Path, template: str, words: str) -> None:
    _, failure = run(tmp_path, template)
    assert isinstance(failure, UserError) and words in str(failure)
