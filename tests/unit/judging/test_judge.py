"""Judging against a real HTTP server on loopback: both orders, nothing paid twice, and judges with known habits."""

import json
import re
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from peftchat.cli.main import cli
from peftchat.errors import UserError, VerificationError
from peftchat.judging.judged_pairs import read_exam
from peftchat.judging.verdicts import length_controlled

pytest.importorskip("openai", reason="needs the extra `judge`")

QUESTIONS = 16


class Server:
    """An endpoint whose replies a function makes of the two answers; it may fail first."""

    def __init__(self, reply: Callable[[str, str], str]) -> None:
        self.reply = reply
        self.requests = 0
        self.failures: list[tuple[int, dict[str, str], bytes]] = []
        self.keys: set[str | None] = set()
        self.models = ["only"]
        self.list_status = 200
        self.finish = "stop"
        lock = threading.Lock()
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                if server.list_status != 200:
                    self.send(server.list_status, {}, b'{"error": {"message": "no"}}')
                    return
                models = [{"id": name, "object": "model", "created": 0, "owned_by": ""} for name in server.models]
                self.send(200, {}, json.dumps({"object": "list", "data": models}).encode())

            def do_POST(self) -> None:
                asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    server.requests += 1
                    server.keys.add(self.headers["Authorization"])
                    failure = server.failures.pop(0) if server.failures else None
                if failure is not None:
                    self.send(*failure)
                    return
                text = asked["messages"][-1]["content"]
                found = re.findall(r"\[Answer of assistant \d\]\n(.*?)\n\[End of the answer", text, re.DOTALL)
                message = {"role": "assistant", "content": server.reply(*found)}
                done = {
                    "id": "x", "object": "chat.completion", "created": 0, "model": asked["model"],
                    "choices": [{"index": 0, "message": message, "finish_reason": server.finish}],
                    "usage": {"prompt_tokens": 100, "completion_tokens": 5, "total_tokens": 105},
                }  # fmt: skip
                self.send(200, {}, json.dumps(done).encode())

            def send(self, status: int, headers: dict[str, str], body: bytes) -> None:
                self.send_response(status)
                for name, value in {"Content-Type": "application/json", **headers}.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._http.server_port}/v1"
        threading.Thread(target=self._http.serve_forever, daemon=True).start()

    def end(self) -> None:
        self._http.shutdown()
        self._http.server_close()


@pytest.fixture
def serve() -> Iterator[Callable[[Callable[[str, str], str]], Server]]:
    running: list[Server] = []

    def start(reply: Callable[[str, str], str]) -> Server:
        running.append(Server(reply))
        return running[-1]

    yield start
    for server in running:
        server.end()


@pytest.fixture
def answers(tmp_path: Path) -> tuple[Path, Path]:
    """Answers of A, which are long, and of B, which are better by a mark that honest judges see."""
    files = (tmp_path / "long.jsonl", tmp_path / "good.jsonl")
    for file, text in zip(files, ("many words " * 6, "right"), strict=True):
        lines = [
            {"question_id": number, "category": "sums", "turns": [f"What is {number}?"],
             "choices": [{"index": 0, "turns": [text + "!" * (number % 7)]}]}
            for number in range(QUESTIONS)
        ]  # fmt: skip
        file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return files


def judged(answers: tuple[Path, Path], server: Server, *options: object, model: str = "") -> dict[str, Any]:
    output = answers[0].parent / "judged"
    arguments = ["judge", *answers, "--judge", server.url + model, "-o", output, "--json", *options]
    done = CliRunner().invoke(cli, list(map(str, arguments)), standalone_mode=False)
    if done.exception is not None:
        raise done.exception
    return json.loads(done.stdout)


def replace(file: Path, before: str, after: str) -> None:
    file.write_text(file.read_text().replace(before, after))


def by_quality(first: str, second: str) -> str:
    return f"{9 if first.startswith('right') else 2} {9 if second.startswith('right') else 2}\nOne is right."


def test_an_honest_judge_names_the_better_one_in_both_orders(
    answers: tuple[Path, Path], serve: Callable[..., Server]
) -> None:
    server = serve(by_quality)
    (verdict,) = judged(answers, server, "--prices", "10", "100")["judges"]
    assert (verdict["wins_a"], verdict["wins_b"], verdict["ties"]) == (0, QUESTIONS, 0)
    # Even if all questions end alike, the next one may not: Wilson's interval.
    assert verdict["win_rate"] == {"value": 0, "low": 0, "high": pytest.approx(3.8415 / (QUESTIONS + 3.8415), abs=1e-4)}
    assert (verdict["disagreements"], verdict["first_preferred"]) == (0, 0.5)
    assert verdict["scores_a"] == {"2": 2 * QUESTIONS} and verdict["scores_b"] == {"9": 2 * QUESTIONS}
    assert server.requests == 2 * QUESTIONS
    # All is kept: the same command asks nothing, and other prices change the cost alone.
    again = judged(answers, server, "--prices", "20", "200")
    assert server.requests == 2 * QUESTIONS and again["judges"] == [verdict]
    assert again["cost"] == pytest.approx(2 * QUESTIONS * (100 * 20 + 5 * 200) / 1e6)
    page = (answers[0].parent / "judged/report.html").read_text()
    assert "What is 15?" in page and page.count("<article") == QUESTIONS and "<script" not in page


def test_a_judge_that_prefers_what_it_sees_first_gives_half(
    answers: tuple[Path, Path], serve: Callable[..., Server]
) -> None:
    (verdict,) = judged(answers, serve(lambda first, second: "8 3"))["judges"]
    assert verdict["win_rate"]["value"] == 0.5 and verdict["ties"] == QUESTIONS
    assert verdict["win_rate"]["low"] < 0.4 and verdict["win_rate"]["high"] > 0.6
    assert verdict["disagreements"] == QUESTIONS and verdict["first_preferred"] == 1.0


def test_a_judge_of_length_shows_at_equal_length(tmp_path: Path, serve: Callable[..., Server]) -> None:
    """A is longer in four of five pairs, and longer answers win: at equal length neither wins."""
    files = (tmp_path / "a.jsonl", tmp_path / "b.jsonl")
    for file, is_long in zip(files, (lambda at: at % 5 != 0, lambda at: at % 5 == 0), strict=True):
        lines = [
            {"question_id": at, "turns": ["?"], "choices": [{"turns": ["x" * (90 + at % 9 if is_long(at) else 30)]}]}
            for at in range(60)
        ]
        file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    server = serve(lambda first, second: "8 3" if len(first) > len(second) else "3 8")
    (verdict,) = judged(files, server)["judges"]
    assert verdict["win_rate"]["value"] == pytest.approx(0.8)
    assert abs(verdict["length_controlled"]["value"] - 0.5) < 0.15


def test_the_rate_at_equal_length_is_the_plain_one_where_length_plays_no_part() -> None:
    random = np.random.default_rng(0)
    points = (random.random(4000) < 0.7).astype(float)
    assert length_controlled(points, random.normal(0, 50, 4000)) == pytest.approx(points.mean(), abs=0.02)
    assert length_controlled(points, np.zeros(4000)) == pytest.approx(points.mean(), abs=0.01)


def test_limits_garbage_and_a_death_lose_nothing_and_pay_nothing_twice(
    answers: tuple[Path, Path], serve: Callable[..., Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    server = serve(lambda first, second: "I like both." if "!!!!" in first else by_quality(first, second))
    server.failures = [(429, {"Retry-After": "0"}, b'{"error": {"message": "slow down"}}'), (500, {}, b"oops")]
    # Then it dies for longer than one command tries.
    good = [None] * 20
    monkeypatch.setattr("peftchat.judging.judge_client._RETRIES", 1)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-canary")
    original, count = server.reply, 0

    def dying(first: str, second: str) -> str:
        nonlocal count
        count += 1
        if count == len(good):
            server.failures = [(400, {}, b'{"error": {"message": "gone"}}')] * 6
        return original(first, second)

    server.reply = dying
    with pytest.raises(VerificationError, match=r"got no reply.*All replies are kept"):
        judged(answers, server, "--concurrency", 1)
    output = answers[0].parent / "judged"
    kept = len((output / "replies.jsonl").read_text().splitlines())
    assert kept == len(good) and not (output / "results.json").exists()
    server.failures, server.reply, before = [], original, server.requests
    (verdict,) = judged(answers, server)["judges"]
    assert server.requests - before == 2 * QUESTIONS - kept
    # Four and more marks stand in three of seven answers; a pair with one of its replies unread does not count.
    unread = sum("!" * 4 in "!" * (number % 7) for number in range(QUESTIONS))
    assert verdict["unread_replies"] == 2 * unread and verdict["read"] == QUESTIONS - unread
    assert server.keys == {"Bearer sk-canary"}
    assert all(b"canary" not in path.read_bytes() for path in output.iterdir())


def test_two_judges_and_their_exam(answers: tuple[Path, Path], serve: Callable[..., Server], tmp_path: Path) -> None:
    exam = tmp_path / "exam.jsonl"
    exam.write_text('{"prompt": "1 + 1?", "good": "right, 2", "bad": "3"}\n' * 4)
    other = serve(lambda first, second: "8 3")
    found = judged(answers, serve(by_quality), "--judge", other.url, "--exam", exam)
    assert [one["accuracy"]["value"] for one in found["exams"]] == [1.0, 0.0]
    assert found["kappa"] == 0.0, "one says B always, the other tie"


def test_a_judge_of_which_nothing_can_be_read_fails(
    answers: tuple[Path, Path], serve: Callable[..., Server], tmp_path: Path
) -> None:
    exam, output = tmp_path / "exam.jsonl", tmp_path / "judged"
    exam.write_text('{"prompt": "1 + 1?", "good": "right, 2", "bad": "3"}\n')
    server = serve(lambda first, second: "Well.")
    server.finish = "length"
    words = ["judge", *answers, "--judge", server.url, "--exam", exam, "-o", output]
    done = CliRunner().invoke(cli, list(map(str, words)), standalone_mode=False)
    assert isinstance(done.exception, VerificationError)
    assert "no pair has two replies that can be read" in str(done.exception)
    # What is known is shown all the same: the exam, and how many replies nobody could read.
    # One wrong pair leaves room for a judge that is right in 79 % of them.
    assert "0 % (0 % to 79 %)" in done.output and f"{2 * QUESTIONS} replies could not be read" in done.output
    assert f"{2 * QUESTIONS} of them were cut by --max-tokens" in done.output
    assert (output / "report.html").is_file()


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ('{"prompt": "?", "good": "a", "bad": "b", "id": 2}\n{"prompt": "!", "good": "a", "bad": "b"}', ":2: the id 2"),
        ('{"prompt": "?", "good": "a", "bad": "a"}', ":1: both answers of the pair are the same"),
    ],
)
def test_an_exam_whose_pairs_cannot_be_told_apart_is_refused(tmp_path: Path, lines: str, message: str) -> None:
    exam = tmp_path / "exam.jsonl"
    exam.write_text(lines)
    with pytest.raises(UserError, match=message):
        read_exam(exam)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--temperature", "nan"], "temperature is nan"),
        (["--judge", "ws://here/v1"], "begins with http:// or https://"),
    ],
)
def test_what_no_endpoint_can_take_is_refused(
    answers: tuple[Path, Path], serve: Callable[..., Server], options: list[str], message: str
) -> None:
    server = serve(by_quality)
    with pytest.raises(UserError, match=message):
        judged(answers, server, *options)
    assert server.requests == 0 and not (answers[0].parent / "judged").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a, b, s: replace(b, '"question_id": 3,', '"question_id": 99,'), "have one answer only: 3, 99"),
        (lambda a, b, s: replace(b, "What is 3?", "Why is 3?"), "question 3 is another one than in"),
        (lambda a, b, s: b.write_text("{}\n"), r"good.jsonl:1: the line has no `question_id`"),
        (lambda a, b, s: (b.unlink(), b.hardlink_to(a)), "both files of answers are the same one"),
        (lambda a, b, s: s.models.append("second"), r"the endpoint has 2 models: only, second. Name one"),
        (lambda a, b, s: s.end(), "the endpoint does not answer: Connection error"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_message_and_leaves_nothing(
    answers: tuple[Path, Path], serve: Callable[..., Server], change: Callable[..., object], message: str
) -> None:
    server = serve(by_quality)
    change(*answers, server)
    with pytest.raises(UserError, match=message) as found:
        judged(answers, server)
    assert "\n" not in str(found.value)
    assert server.requests == 0 and not (answers[0].parent / "judged").exists()
    server.end = lambda: None  # type: ignore[method-assign]


@pytest.mark.parametrize(
    ("change", "message"),
    [(lambda s: s.end(), "the endpoint does not answer"), (lambda s: setattr(s, "list_status", 401), "wants a key")],
)
def test_a_named_model_is_reached_before_anything_is_written(
    answers: tuple[Path, Path], serve: Callable[..., Server], change: Callable[[Server], object], message: str
) -> None:
    server = serve(by_quality)
    change(server)
    with pytest.raises(UserError, match=message):
        judged(answers, server, model="#named")
    assert server.requests == 0 and not (answers[0].parent / "judged").exists()
    server.end = lambda: None  # type: ignore[method-assign]


def test_a_named_model_of_an_endpoint_that_lists_none_is_asked(
    answers: tuple[Path, Path], serve: Callable[..., Server]
) -> None:
    server = serve(by_quality)
    server.list_status = 404
    assert judged(answers, server, model="#named")["judges"][0]["wins_b"] == QUESTIONS


def test_answers_with_line_ends_of_unicode_are_whole(answers: tuple[Path, Path], serve: Callable[..., Server]) -> None:
    for file in answers:
        records = [json.loads(line) for line in file.read_text().splitlines()]
        for record in records:
            record["choices"][0]["turns"][0] += "\u2028 \u0085 end"
        text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        file.write_text(text, encoding="utf-8")
    found = judged(answers, serve(by_quality))
    assert found["judges"][0]["read"] == QUESTIONS
