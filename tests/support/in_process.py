"""Running peftchat in this process, for commands that end before they have done much."""

import signal
import subprocess
import sys

import pytest

from peftchat.cli.main import main


def peftchat_in_process(capsys: pytest.CaptureFixture[str], *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run the command line; what it writes and its status are what a process of its own would have."""
    given = ["peftchat", *map(str, arguments)]
    on_terminate = signal.getsignal(signal.SIGTERM)
    capsys.readouterr()
    status = 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", given)
        try:
            main()
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else int(end.code is not None)
        finally:
            signal.signal(signal.SIGTERM, on_terminate)
    said = capsys.readouterr()
    return subprocess.CompletedProcess(given, status, said.out, said.err)
