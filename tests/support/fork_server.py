"""A process that has imported what the commands import, and forks once per command.

The imports cost six seconds of CPU time per process; a fork costs a few milliseconds. A fork runs the command to the
end of its own interpreter, with its own arguments, environment, working folder and standard streams.

Run as `python -m tests.support.fork_server SOCKET`. `tests.support.cli` is its client. Nothing here may start a thread
or compute with torch: a fork copies neither threads nor the state of OpenMP.
"""

import atexit
import gc
import json
import os
import runpy
import signal
import socket
import sys
import threading
import traceback
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn


@dataclass(frozen=True)
class Request:
    """One program to run.

    Attributes:
        arguments: as for `python`: `-m MODULE …`, `-c CODE …` or `FILE …`.
        environment: all variables of the process.
        folder: its working folder.
        new_session: whether it leads a session of its own.
        file_size_limit: the most bytes that a file of its may have.
    """

    arguments: list[str]
    environment: dict[str, str]
    folder: str
    new_session: bool = False
    file_size_limit: int | None = None


def serve(address: str) -> Request:
    """Answer requests until the client goes; returns in every fork, with what the fork has to run."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        # The client takes the file for a server that listens.
        listener.bind(f"{address}.new")
        listener.listen()
        Path(f"{address}.new").rename(address)
        gc.freeze()
        client = os.getppid()
        listener.settimeout(5)
        while True:
            try:
                connection, _ = listener.accept()
            except TimeoutError:
                if os.getppid() != client:
                    sys.exit()
                continue
            _reap()
            data, streams, _, _ = socket.recv_fds(connection, 1 << 20, 3)
            while not data.endswith(b"\n"):
                data += connection.recv(1 << 20)
            if os.fork() == 0:
                listener.close()
                return _watch(connection, streams, Request(**json.loads(data)))
            connection.close()
            for stream in streams:
                os.close(stream)


def _reap() -> None:
    """Take leave of the watchers that have ended, so that their CPU time counts as the server's."""
    with suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG) != (0, 0):
            pass


def _watch(connection: socket.socket, streams: list[int], request: Request) -> Request:
    """Fork the program, tell the client its process id and how it ended; returns in the program."""
    child = os.fork()
    if child == 0:
        connection.close()
        for target, stream in enumerate(streams):
            os.dup2(stream, target)
            os.close(stream)
        return request
    for stream in streams:
        os.close(stream)
    # The client may have gone; the program goes on, as any other would.
    with suppress(BrokenPipeError):
        connection.sendall(f"{child}\n".encode())
    _, status = os.waitpid(child, 0)
    with suppress(BrokenPipeError):
        connection.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())
    os._exit(0)


def become(request: Request) -> None:
    """Make this process what a fresh interpreter with these arguments would be, and run the program."""
    os.environ.clear()
    os.environ.update(request.environment)
    os.chdir(request.folder)
    if request.new_session:
        os.setsid()
    if request.file_size_limit is not None:
        import resource

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (request.file_size_limit, request.file_size_limit))
    for name, number, mode in (("stdin", 0, "r"), ("stdout", 1, "w"), ("stderr", 2, "w")):
        stream = os.fdopen(number, mode, encoding="utf-8", errors="backslashreplace" if number == 2 else "strict")
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)
    kind, *rest = request.arguments
    if kind == "-m":
        sys.argv = rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif kind == "-c":
        sys.argv = ["-c", *rest[1:]]
        main: dict[str, Any] = vars(sys.modules["__main__"])
        exec(compile(rest[0], "<string>", "exec"), {"__name__": "__main__", "__builtins__": main["__builtins__"]})
    else:
        sys.argv = request.arguments
        sys.path.insert(0, str(Path(kind).resolve().parent))
        runpy.run_path(kind, run_name="__main__")


def import_all() -> None:
    """Import what most commands import before they do anything."""
    from peftchat.library_setup import prepare_libraries

    prepare_libraries()
    for name in (
        "accelerate", "datasets", "peft", "tokenizers", "transformers", "trl",
        "bitsandbytes",
        # What a model on the `meta` device needs, and no import.
        "torch.fx.experimental.symbolic_shapes",
        "transformers.models.llama.modeling_llama",
        "peftchat.cli.main", "peftchat.cli.train", "peftchat.cli.merge", "peftchat.cli.chat", "peftchat.cli.plan",
        "peftchat.planning.plan_report",
        "peftchat.planning.plan",
        "peftchat.training.train",
        "peftchat.merging",
        "peftchat.serving.chat_model",
        "peftchat.reports.run_terminal",
        *os.environ.get("PEFTCHAT_TEST_IMPORTS", "").split(),
    ):  # fmt: skip
        __import__(name)


def run(request: Request) -> NoReturn:
    """Run the program and end as an interpreter does, but for tearing down the modules that the server imported."""
    status = 0
    try:
        become(request)
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        status = 1
    # What `Py_FinalizeEx` does first: wait for threads, call what `atexit` and `weakref.finalize` were given.
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(BrokenPipeError, ValueError):
            stream.flush()
    os._exit(status)


if __name__ == "__main__":
    import_all()
    run(serve(sys.argv[1]))
