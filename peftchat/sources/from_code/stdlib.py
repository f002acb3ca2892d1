"""The standard library modules with docstrings that make good answers; `--stdlib` reads these."""

import importlib.util

STDLIB = (
    "abc", "argparse", "base64", "bisect", "calendar", "cmd", "collections", "colorsys", "concurrent.futures",
    "configparser", "contextlib", "copy", "csv", "dataclasses", "difflib", "enum", "filecmp", "fileinput", "fnmatch",
    "fractions", "functools", "getpass", "gettext", "glob", "graphlib", "gzip", "heapq", "html", "inspect",
    "ipaddress", "json", "keyword", "linecache", "locale", "logging", "mimetypes", "numbers", "operator", "pathlib",
    "pkgutil", "pprint", "queue", "random", "reprlib", "sched", "secrets", "shelve", "shlex", "shutil", "statistics",
    "string", "subprocess", "tarfile", "tempfile", "textwrap", "threading", "timeit", "tokenize", "traceback", "types",
    "urllib.parse", "uuid", "warnings", "weakref", "zipfile",
)  # fmt: skip
"""Those a given Python no longer has are passed over."""


def available_stdlib() -> list[str]:
    """Those of the modules that this Python has."""
    tops = {name: name.split(".")[0] for name in STDLIB}
    return [name for name, top in tops.items() if importlib.util.find_spec(top) is not None]
