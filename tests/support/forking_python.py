"""A stand-in for the interpreter: started as `python -m MODULE …`, it has the fork server run that.

Commands that start processes of their own, such as `peftchat compare`, start them as `sys.executable`. With this in its
place they start in a fiftieth of the time. They are processes all the same: with their own streams and memory, a true
status, and ended by the signals that end the program that was started.
"""

import sys
from functools import cache
from pathlib import Path
from textwrap import dedent

from tests.support.cli import server_address

_PROGRAM = """\
    #!{python} -IS
    import json, os, signal, socket, sys
    request = {{"arguments": sys.argv[1:], "environment": dict(os.environ), "folder": os.getcwd()}}
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.connect({address!r})
    # A signal waits until there is a process to hand it on to.
    handed_on = (signal.SIGTERM, signal.SIGINT)
    signal.pthread_sigmask(signal.SIG_BLOCK, handed_on)
    socket.send_fds(connection, [(json.dumps(request) + "\\n").encode()], [0, 1, 2])
    answers = connection.makefile()
    child = int(answers.readline())
    for number in handed_on:
        signal.signal(number, lambda number, frame: os.kill(child, number))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, handed_on)
    status = int(answers.readline())
    if status < 0:
        signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    sys.exit(status)
    """


@cache
def forking_python() -> Path:
    """Return the program, to take the place of `sys.executable`."""
    address = server_address()
    file = Path(address).with_name("python")
    file.write_text(dedent(_PROGRAM).format(python=sys.executable, address=address), encoding="utf-8")
    file.chmod(0o755)
    return file
