"""A child ends when the process that started it has gone."""

import os
import subprocess
import sys

from peftchat.child_process import _is_running, child_environment

CHILD = "from peftchat.child_process import end_with_parent; end_with_parent(); print('goes on')"


def test_a_process_that_has_ended_does_not_run_though_nobody_waited_for_it() -> None:
    process = subprocess.Popen([sys.executable, "-c", "pass"])
    # Wait for its end without reaping it.
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert not _is_running(process.pid)
    process.wait()
    assert not _is_running(process.pid)
    assert _is_running(os.getpid())


def test_a_child_whose_parent_has_gone_before_ends() -> None:
    gone = subprocess.Popen([sys.executable, "-c", "pass"])
    os.waitid(os.P_PID, gone.pid, os.WEXITED | os.WNOWAIT)
    environment = {**child_environment(), "PEFTCHAT_PARENT_PID": str(gone.pid)}
    done = subprocess.run([sys.executable, "-c", CHILD], env=environment, capture_output=True, text=True, check=False)
    gone.wait()
    assert (done.returncode, done.stdout) == (137, "")
    done = subprocess.run(
        [sys.executable, "-c", CHILD], env=child_environment(), capture_output=True, text=True, check=True
    )
    assert done.stdout == "goes on\n"
