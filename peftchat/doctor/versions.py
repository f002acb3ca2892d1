"""The installed libraries against the ranges that peftchat declares and the versions that its tests passed with."""

import platform
import re
import sys
from collections.abc import Iterator, Mapping
from importlib import metadata

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion, Version

from peftchat.doctor.findings import Finding
from peftchat.shipped_files import shipped_file

_PACKAGE = "peftchat"
_OLDEST_PYTHON = (3, 11)

_USED_FOR = {
    "deepspeed": "`distributed.strategy: zero2` and `zero3`",
    "evaluate": "`peftchat evaluate`",
    "gguf": "`peftchat export --to gguf`",
    "hygiene": "near duplicates in `data stats`",
    "judge": "`peftchat judge` with an endpoint",
    "languages": "`data.languages` on conversations without a language of their own",
    "sentencepiece": "tokenizers of SentencePiece models",
    "sweep": "`compare --trials`",
    "web": "`peftchat web`",
}
"""Extra -> what needs it. Trackers are examined with the recipe that reports to them."""


def examine_versions() -> Iterator[Finding]:
    """Yield a finding for Python, for each library that peftchat requires, and for each extra."""
    yield _examine_python()
    tested = tested_versions()
    try:
        declared = metadata.requires(_PACKAGE) or []
    except metadata.PackageNotFoundError:
        yield Finding(
            "peftchat", "warning", "it runs from a folder and is not installed", "Run `pip install -e .` in it."
        )
        return
    requirements = [Requirement(text) for text in declared]
    for requirement in requirements:
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            yield examine_requirement(requirement, tested)
    for extra, use in _USED_FOR.items():
        of_extra = [one for one in requirements if one.marker is not None and _belongs(one, extra)]
        yield from _examine_extra(extra, use, of_extra, tested)


def _examine_python() -> Finding:
    found = f"{platform.python_version()}, {platform.system()} on {platform.machine()}"
    if sys.version_info < _OLDEST_PYTHON:
        return Finding("Python", "problem", found, "Install Python 3.11 or newer.")
    return Finding("Python", "ok", found)


def _belongs(requirement: Requirement, extra: str) -> bool:
    assert requirement.marker is not None
    return requirement.marker.evaluate({"extra": extra}) and not requirement.marker.evaluate({"extra": ""})


def _examine_extra(
    extra: str, use: str, requirements: list[Requirement], tested: Mapping[str, str]
) -> Iterator[Finding]:
    findings = [examine_requirement(requirement, tested) for requirement in requirements]
    if any(finding.found == _ABSENT for finding in findings):
        yield Finding(f"extra {extra}", "note", f"not installed; {use} needs it", f"pip install 'peftchat[{extra}]'")
    else:
        yield from findings


_ABSENT = "not installed"


def examine_requirement(requirement: Requirement, tested: Mapping[str, str]) -> Finding:
    """Compare an installed library with a requirement and with the tested version.

    Args:
        requirement: name and range.
        tested: canonical name -> tested version.
    """
    name = requirement.name
    try:
        text = metadata.version(name)
    except metadata.PackageNotFoundError:
        return Finding(name, "problem", _ABSENT, f"pip install '{name}{requirement.specifier}'")
    try:
        version = Version(text)
    except InvalidVersion:
        return Finding(name, "warning", f"version {text!r} is not a version", f"Reinstall {name}.")
    if not requirement.specifier.contains(version, prereleases=True):
        expected = f"{name}{requirement.specifier}"
        return Finding(name, "problem", f"{text}; peftchat needs {requirement.specifier}", f"pip install '{expected}'")
    of_tests = tested.get(canonicalize_name(name))
    if of_tests is None:
        return Finding(name, "ok", text)
    # A local part such as `+cu130` says how it was built.
    if version.public == Version(of_tests).public:
        return Finding(name, "ok", f"{text}, as tested")
    return Finding(name, "note", f"{text}; tests passed with {of_tests}")


def tested_versions() -> dict[str, str]:
    """Return the versions that the tests passed with, by canonical name; empty if the list did not come along."""
    path = shipped_file("constraints.txt")
    if path is None:
        return {}
    pins = re.findall(r"^([A-Za-z0-9._-]+)==(\S+)$", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {canonicalize_name(name): version for name, version in pins}
