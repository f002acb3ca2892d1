"""A stand-in of the hub on loopback: the few addresses that a push needs, with what arrives kept in memory."""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Hub:
    """What the stand-in holds.

    Attributes:
        address: where it listens.
        repos: repository -> whether it is private.
        files: repository -> file -> its bytes.
        large: digest -> bytes of the files that were sent apart from the commit.
        sent: how often a large file was sent.
        fails: how many commits to refuse with a server error.
    """

    address: str = ""
    repos: dict[str, bool] = field(default_factory=dict)
    files: dict[str, dict[str, bytes]] = field(default_factory=dict)
    large: dict[str, bytes] = field(default_factory=dict)
    sent: int = 0
    fails: int = 0


@contextmanager
def hub_on_loopback() -> Iterator[Hub]:
    """Run the stand-in for the block."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, format: str, *args: Any) -> None:
            pass

        def body(self) -> bytes:
            if self.headers.get("Transfer-Encoding") == "chunked":
                parts = []
                while size := int(self.rfile.readline(), 16):
                    parts.append(self.rfile.read(size))
                    self.rfile.readline()
                self.rfile.readline()
                return b"".join(parts)
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))

        def answer(self, value: Any, status: int = 200) -> None:
            data = json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def do_GET(self) -> None:
            name = self.path.removeprefix("/api/models/").partition("/revision")[0]
            if name in hub.repos:
                self.answer({"id": name, "private": hub.repos[name], "sha": "0" * 40, "siblings": [], "tags": []})
            else:
                self.answer({"error": "not found"}, 404)

        def do_PUT(self) -> None:
            data = self.body()
            hub.large[hashlib.sha256(data).hexdigest()] = data
            hub.sent += 1
            self.answer({})

        def do_POST(self) -> None:
            data = self.body()
            if self.path == "/api/repos/create":
                asked = json.loads(data)
                name = f"{asked.get('organization') or 'me'}/{asked['name']}"
                if name in hub.repos:
                    return self.answer({"error": "exists", "url": f"{hub.address}/{name}"}, 409)
                private = asked.get("private", asked.get("visibility") == "private")
                hub.repos[name] = private
                hub.files[name] = {}
                return self.answer({"url": f"{hub.address}/{name}"})
            if self.path == "/api/validate-yaml":
                return self.answer({"errors": [], "warnings": []})
            if "/preupload/" in self.path:
                files = json.loads(data)["files"]
                modes = ["lfs" if file["path"].endswith(".safetensors") else "regular" for file in files]
                return self.answer({"files": [{"path": file["path"], "uploadMode": mode, "shouldIgnore": False}
                                              for file, mode in zip(files, modes, strict=True)]})  # fmt: skip
            if self.path.endswith("/info/lfs/objects/batch"):
                objects = []
                for one in json.loads(data)["objects"]:
                    actions = {"upload": {"href": f"{hub.address}/large/{one['oid']}"}}
                    objects.append({**one, **({} if one["oid"] in hub.large else {"actions": actions})})
                return self.answer({"transfer": "basic", "objects": objects})
            name = self.path.removeprefix("/api/models/").partition("/commit/")[0]
            if hub.fails:
                hub.fails -= 1
                return self.answer({"error": "the hub is busy"}, 400)
            for line in data.splitlines():
                entry = json.loads(line)
                value = entry["value"]
                if entry["key"] == "file":
                    hub.files[name][value["path"]] = base64.b64decode(value["content"])
                if entry["key"] == "lfsFile":
                    hub.files[name][value["path"]] = hub.large[value["oid"]]
            return self.answer({"commitUrl": f"{hub.address}/{name}/commit/1", "commitOid": "1" * 40})

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
