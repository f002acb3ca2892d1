"""The engine's process, with a small http server in its place: what counts as an answer, and that all of it ends."""

import os
import sys
import time
from pathlib import Path

import pytest

from peftchat.engines.commands import EngineCommand, EngineName, Place
from peftchat.engines.process import running
from peftchat.errors import UserError, VerificationError
from tests.support.launch import free_port

SERVER = """
import http.server, json, os, subprocess, sys
port, status, pids, key = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
worker = subprocess.Popen(["sleep", "100"])
open(pids, "w").write(f"{os.getpid()} {worker.pid}")
class Handler(http.server.BaseHTTPRequestHandler):
    def reply(self, value, status=200):
        body = json.dumps(value).encode()
        self.send_response(status if self.headers.get("Authorization", "") == key else 401)
        self.send_header("Content-Length", str(len(body))); self.end_headers(); self.wfile.write(body)
    def do_GET(self):
        # As transformers' server where there is no cache of the hub.
        if sys.argv[5] == "transformers" and self.path != "/health":
            return self.reply({}, 500)
        self.reply({"data": [{"id": "one"}, {"id": "two"}]})
    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.reply({"choices": [{"message": {"content": asked["model"] + " here"}}]}, status)
    def log_message(self, *arguments): pass
http.server.HTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


def server(
    place: Place, pids: Path, status: int = 200, models: tuple[str, ...] = ("one", "two"), engine: EngineName = "vllm"
) -> EngineCommand:
    key = "" if place.key is None else f"Bearer {place.key}"
    arguments = (sys.executable, "-c", SERVER, str(place.port), str(status), str(pids), key, engine)
    return EngineCommand(engine, arguments, models)


def is_alive(pid: str) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="reads /proc")  # noqa: PTH112
def test_every_model_answers_and_all_processes_end(tmp_path: Path) -> None:
    place = Place("127.0.0.1", free_port(), "a-secret")
    with running(server(place, tmp_path / "pids"), place) as engine:
        assert engine.wait_until_it_answers(30) == {"one": "one here", "two": "two here"}
        pids = (tmp_path / "pids").read_text().split()
        assert all(map(is_alive, pids))
    end = time.monotonic() + 10
    while any(map(is_alive, pids)) and time.monotonic() < end:
        time.sleep(0.05)
    assert not any(map(is_alive, pids))


def test_the_engine_of_transformers_need_not_list_its_model(tmp_path: Path) -> None:
    place = Place("127.0.0.1", free_port())
    with running(server(place, tmp_path / "pids", models=("folder",), engine="transformers"), place) as engine:
        assert engine.wait_until_it_answers(30) == {"folder": "folder here"}


def test_a_model_that_fails_or_is_not_there_is_told(tmp_path: Path) -> None:
    place = Place("127.0.0.1", free_port())
    with (
        pytest.raises(VerificationError, match="one does not answer: HTTP 500"),
        running(server(place, tmp_path / "pids", 500), place) as engine,
    ):
        engine.wait_until_it_answers(30)
    with (
        pytest.raises(VerificationError, match="does not serve three: it lists one, two"),
        running(server(place, tmp_path / "pids", models=("one", "three")), place) as engine,
    ):
        engine.wait_until_it_answers(3)


def test_an_engine_that_ends_or_is_not_there_is_told(tmp_path: Path) -> None:
    place = Place("127.0.0.1", free_port())
    ends = EngineCommand("vllm", (sys.executable, "-c", "raise SystemExit(7)"), ("one",))
    with pytest.raises(VerificationError, match="ended with status 7"), running(ends, place) as engine:
        engine.wait_until_it_answers(30)
    absent = EngineCommand("vllm", (str(tmp_path / "absent"),), ("one",))
    with pytest.raises(UserError, match="cannot be started"), running(absent, place):
        pass
