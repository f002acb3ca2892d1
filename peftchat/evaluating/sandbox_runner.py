"""Run one program of a model in this process, once it has given up what the program must not have.

Started by `peftchat.evaluating.sandbox` as `python -I sandbox_runner.py FD`, with a JSON object on standard input. It
imports the standard library only, and nothing of peftchat. It writes one JSON object to the file descriptor FD, if the
program comes to its end.

Linux: a seccomp filter (no sockets, no new processes, no signals to others), Landlock (no files outside), a network
namespace of its own, resource limits. Elsewhere: resource limits. The caller tries what holds before it trusts it.
"""

import ctypes
import json
import os
import platform
import resource
import struct
import sys
from typing import Any

_DENIED = {
    "x86_64": (
        0xC000003E,
        56,
        # socket, fork, vfork, kill, tkill, tgkill, rt_sigqueueinfo, rt_tgsigqueueinfo, pidfd_send_signal, ptrace,
        # process_vm_readv, process_vm_writev, io_uring_setup, mount, umount2, reboot, setns, unshare, bpf, kexec_load,
        # init_module, finit_module, keyctl, add_key, request_key, setrlimit, prlimit64
        (41, 57, 58, 62, 200, 234, 129, 297, 424, 101, 310, 311, 425, 165, 166, 169, 308, 272, 321, 246, 175, 313, 250,
         248, 249, 160, 302),
    ),
    "aarch64": (
        0xC00000B7,
        220,
        (198, 129, 130, 131, 138, 240, 424, 117, 270, 271, 425, 40, 39, 142, 268, 97, 280, 104, 105, 273, 219, 217, 218,
         164, 261),
    ),
}  # fmt: skip
"""Machine -> its audit number, the number of `clone`, and the system calls that are denied."""

_CLONE3 = 435
_CLONE_THREAD = 0x10000
_EPERM, _ENOSYS = 1, 38
_ALLOW, _ERRNO = 0x7FFF0000, 0x00050000


def limit_resources(limits: dict[str, int]) -> None:
    """Set limits of processor time, memory, files and, for users other than root, processes."""
    resource.setrlimit(resource.RLIMIT_CPU, (limits["cpu_seconds"], limits["cpu_seconds"] + 1))
    resource.setrlimit(resource.RLIMIT_FSIZE, (limits["file_bytes"], limits["file_bytes"]))
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform == "linux":
        resource.setrlimit(resource.RLIMIT_AS, (limits["memory_bytes"], limits["memory_bytes"]))
        # Counted over all processes of the user; root is exempt, so the filter below counts more.
        resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))


def leave_network(libc: ctypes.CDLL) -> None:
    """Enter an empty network namespace, where the system allows it."""
    user, network = 0x10000000, 0x40000000
    if libc.unshare(network) != 0:
        libc.unshare(user | network)


def restrict_files(libc: ctypes.CDLL, folder: str) -> None:
    """Restrict files by Landlock to Python's own and the folder of the program, where the kernel has it.

    https://docs.kernel.org/userspace-api/landlock.html
    """
    create, add, restrict = 444, 445, 446
    version = libc.syscall(create, None, 0, 1)
    if version < 1:
        return
    everything = (1 << 13) - 1
    if version >= 2:
        everything |= 1 << 13
    if version >= 3:
        everything |= 1 << 14
    if version >= 5:
        everything |= 1 << 15
    attributes = struct.pack("QQQ", everything, 3 if version >= 4 else 0, 3 if version >= 6 else 0)
    size = 24 if version >= 6 else 16 if version >= 4 else 8
    rules = libc.syscall(create, attributes, size, 0)
    if rules < 0:
        return
    execute_read_list = 1 | 4 | 8
    places = dict.fromkeys((sys.prefix, sys.base_prefix, "/usr", "/lib", "/lib64"), execute_read_list)
    places["/dev/null"] = places["/dev/urandom"] = 2 | 4
    places[folder] = everything
    for place, access in places.items():
        try:
            opened = os.open(place, os.O_PATH | os.O_CLOEXEC)
        except OSError:
            continue
        libc.syscall(add, rules, 1, struct.pack("=Qi", access & everything, opened), 0)
        os.close(opened)
    libc.syscall(restrict, rules, 0)
    os.close(rules)


def filter_calls(libc: ctypes.CDLL) -> None:
    """Deny system calls by seccomp, on the machines whose numbers are known.

    https://docs.kernel.org/userspace-api/seccomp_filter.html
    """
    if platform.machine() not in _DENIED:
        return
    machine, clone, denied = _DENIED[platform.machine()]
    load, equal, above, bit, leave = 0x20, 0x15, 0x35, 0x45, 0x06
    lines = [
        (load, 0, 0, 4),
        (equal, 1, 0, machine),
        (leave, 0, 0, _ERRNO | _EPERM),
        (load, 0, 0, 0),
        # The numbers of x32, another way to make the same calls.
        (above, 0, 1, 0x40000000),
        (leave, 0, 0, _ERRNO | _EPERM),
        # The caller then falls back to `clone`, whose flags can be seen.
        (equal, 0, 1, _CLONE3),
        (leave, 0, 0, _ERRNO | _ENOSYS),
        (equal, 0, 4, clone),
        (load, 0, 0, 16),
        (bit, 1, 0, _CLONE_THREAD),
        (leave, 0, 0, _ERRNO | _EPERM),
        (leave, 0, 0, _ALLOW),
    ]
    for number in denied:
        lines += [(equal, 0, 1, number), (leave, 0, 0, _ERRNO | _EPERM)]
    lines.append((leave, 0, 0, _ALLOW))
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in lines))
    program = struct.pack("HxxxxxxQ", len(lines), ctypes.addressof(code))
    libc.prctl(22, 2, ctypes.c_char_p(program), 0, 0)


def give_up(folder: str, limits: dict[str, int]) -> None:
    """Give up what the program must not have."""
    os.chdir(folder)
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        leave_network(libc)
        libc.prctl(38, 1, 0, 0, 0)
        restrict_files(libc, folder)
        limit_resources(limits)
        filter_calls(libc)
    else:
        limit_resources(limits)


def main() -> None:
    """Run the program, and tell how it ended."""
    report = int(sys.argv[1])
    request: dict[str, Any] = json.loads(sys.stdin.buffer.read())
    found: dict[str, Any] = {"nonce": request["nonce"], "passed": True, "error": None}
    give_up(request["folder"], request["limits"])
    source = request.pop("program")
    try:
        exec(compile(source, "program.py", "exec"), {"__name__": "__main__"})  # noqa: S102 - what the sandbox is for
    except BaseException as error:  # A program may raise anything, also to end before its tests.
        text = str(error)[:200] if not isinstance(error, SystemExit) else f"ended by itself: {error.code}"
        found |= {"passed": False, "error": f"{type(error).__name__}: {text}"}
    os.write(report, json.dumps(found).encode())
    os._exit(0)


if __name__ == "__main__":
    main()
