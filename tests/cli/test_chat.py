"""The terminal side of `peftchat chat`, run as a user runs it: arguments, pipes, a terminal."""

import fcntl
import json
import os
import pty
import select
import subprocess
import termios
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

from peftchat.cli.chat import command
from tests.support.chat_models import save_scripted
from tests.support.cli import COMMAND, peftchat, true_peftchat


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_scripted(tmp_path_factory.mktemp("chat") / "scripted", "Tag né!")


def test_one_question_gives_its_answer_alone_and_a_full_model_needs_no_library_of_training(model: Path) -> None:
    done = true_peftchat("chat", model, "--prompt", "hello", PYTHONPROFILEIMPORTTIME="1")
    errors = [line for line in done.stderr.splitlines() if not line.startswith("import time:")]
    assert (done.returncode, done.stdout, errors) == (0, "Tag né!\n", [])
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "torch" in imported
    assert not imported & {
        "bitsandbytes", "datasets", "deepspeed", "pandas", "peft", "scipy", "sklearn", "torch._dynamo",
        "torch.distributed.fsdp", "torch.distributed.tensor", "trl",
    }  # fmt: skip


def test_a_question_from_a_pipe_and_json(model: Path) -> None:
    done = peftchat("chat", model, "--prompt", "-", "--json", stdin="is <|end|> text?\n")
    record = json.loads(done.stdout)
    assert record["prompt"] == "is <|end|> text?"
    assert record["answer"] == "Tag né!"
    assert record["stopped"] is True
    assert record["special_token_text"] == 1
    assert record["tokens"] == 8
    assert {"seconds", "prompt_tokens", "dropped_exchanges", "finish"} <= record.keys()
    assert done.stdout.count("\n") == 1


def test_lines_of_a_pipe_are_messages_and_commands(model: Path, tmp_path: Path) -> None:
    saved = tmp_path / "saved.jsonl"
    lines = [
        "/system Be brief.",
        "one",
        '"""',
        "/two",
        '  three"""',
        "four",
        "/undo",
        "/tokens",
        f"/save {saved}",
        f"/save {saved}",
        "/nonsense",
        "/clear",
        "/undo",
        "/quit",
        "never read",
    ]
    done = peftchat("chat", model, stdin="\n".join(lines))
    assert done.returncode == 0
    assert done.stdout == "Tag né!\n" * 3
    messages = [(row["role"], row["content"]) for row in json.loads(saved.read_text(encoding="utf-8"))["messages"]]
    assert messages == [
        ("system", "Be brief."),
        ("user", "one"),
        ("assistant", "Tag né!"),
        ("user", "/two\n  three"),
        ("assistant", "Tag né!"),
    ]
    for note in (
        "Removed: four",
        "of 256 tokens in 2 rounds",
        "already exists",
        "no command /nonsense",
        "nothing to remove",
    ):
        assert note in done.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--prompt", " "], "the prompt is empty"),
        (["--greedy", "--temperature", "1", "--prompt", "x"], "--greedy does not sample"),
        (["--prompt", "x" * 300], "context allows 128"),
    ],
)
def test_mistakes_are_told_in_one_message(model: Path, arguments: list[str], words: str) -> None:
    done = peftchat("chat", model, *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert words in done.stderr
    assert "Traceback" not in done.stderr


def test_a_message_too_long_for_the_model_does_not_end_a_chat(model: Path) -> None:
    done = peftchat("chat", model, stdin="x" * 300 + "\nshort\n")
    assert (done.returncode, done.stdout) == (0, "Tag né!\n")
    assert "context allows 128" in done.stderr


def test_sampling_repeats_with_a_seed(model: Path) -> None:
    arguments = [str(model), "--prompt", "x", "--temperature", "5", "--max-new-tokens", "12"]
    answers = [CliRunner().invoke(command, [*arguments, "--seed", seed]).stdout for seed in ("1", "1", "2")]
    assert answers[0] == answers[1] != answers[2]


class Terminal:
    """A chat in a pseudo-terminal."""

    def __init__(self, *arguments: object) -> None:
        self._main, side = pty.openpty()
        command = [*COMMAND, *map(str, arguments)]
        environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100"}
        self.process = subprocess.Popen(
            command,
            stdin=side,
            stdout=side,
            stderr=side,
            env=environment,
            start_new_session=True,
            # Only a terminal that controls the session turns Ctrl-C into a signal.
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )
        os.close(side)
        self._unread = b""

    def type(self, text: str) -> None:
        os.write(self._main, text.encode())

    def until(self, words: str, seconds: float = 120) -> str:
        """What the terminal shows next, up to and with the words."""
        end = time.monotonic() + seconds
        while words.encode() not in self._unread and time.monotonic() < end:
            if select.select([self._main], [], [], 0.2)[0]:
                try:
                    self._unread += os.read(self._main, 4096)
                except OSError:
                    break
        shown, found, self._unread = self._unread.partition(words.encode())
        assert found, shown.decode(errors="replace")
        return shown.decode(errors="replace") + words

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._main)


def test_a_chat_in_a_terminal(model: Path) -> None:
    terminal = Terminal("chat", model)
    try:
        terminal.until("> ")
        terminal.type("hello\n")
        shown = terminal.until("Tag né!")
        assert "<|" not in shown
        terminal.until("> ")
        terminal.type("/und\t\n")
        terminal.until("Removed: hello")
        terminal.until("> ")
        terminal.type("thrown away")
        terminal.until("thrown away")
        # Python notices the signal once it waits for the next key.
        time.sleep(0.5)
        terminal.type("\x03")
        terminal.until("> ")
        terminal.type("/help\n")
        terminal.until("/save FILE")
        terminal.until("> ")
        terminal.type("\x04")
        assert terminal.process.wait(30) == 0
    finally:
        terminal.close()


@pytest.mark.real
def test_the_real_model_answers_and_stops(demo_model: Path) -> None:
    done = peftchat("chat", demo_model, "--prompt", "What is the capital of France?", "--json", "--greedy")
    record = json.loads(done.stdout)
    assert "Paris" in record["answer"]
    assert record["stopped"] is True
    assert "<|" not in record["answer"]
