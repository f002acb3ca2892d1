"""Findings of an examination on set-ups that are broken on purpose."""

import os
import shutil
import time
from collections import namedtuple
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from peftchat.doctor import versions
from peftchat.doctor.findings import Finding, worst
from peftchat.doctor.machine import (
    examine_clock,
    examine_compiler,
    examine_cores,
    examine_disks,
    examine_file_handles,
    examine_hub,
    examine_shared_memory,
)
from peftchat.doctor.versions import examine_requirement, examine_versions

Usage = namedtuple("Usage", "total used free")
MB = 10**6


def test_the_worst_finding_decides() -> None:
    assert worst([]) == "ok"
    findings = [Finding("a", "note", ""), Finding("b", "problem", ""), Finding("c", "warning", "")]
    assert [worst(findings[:count]) for count in (1, 2, 3)] == ["note", "problem", "problem"]


@pytest.mark.parametrize(
    ("requirement", "tested", "status", "found"),
    [
        ("click>=8", {}, "ok", ""),
        ("click>=99", {}, "problem", "peftchat needs >=99"),
        ("click<1", {}, "problem", "peftchat needs <1"),
        ("click", {"click": "0.1"}, "note", "tests passed with 0.1"),
        ("no-such-library>=1", {}, "problem", "not installed"),
    ],
)
def test_a_library_is_compared_with_its_range_and_the_tested_version(
    requirement: str, tested: dict[str, str], status: str, found: str
) -> None:
    finding = examine_requirement(Requirement(requirement), tested)
    assert finding.status == status and found in finding.found
    if status == "problem":
        assert finding.cure == f"pip install '{requirement}'"


def test_the_tests_own_environment_has_the_tested_versions() -> None:
    assert versions.tested_versions()["torch"].startswith("2.")
    findings = {finding.subject: finding for finding in examine_versions()}
    assert {"Python", "torch", "transformers", "peft", "trl", "bitsandbytes"} <= findings.keys()
    assert worst(findings.values()) in ("ok", "note")


def test_small_and_full_disks_are_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    for free, status in ((500 * MB, "problem"), (9000 * MB, "warning"), (90_000 * MB, "ok")):
        monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: Usage(10**12, 0, free))
        assert {finding.status for finding in examine_disks()} == {status}
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    (finding, *_) = examine_disks()
    assert finding.status == "problem" and "cannot be written" in finding.found


def test_dockers_default_of_shared_memory_is_too_little(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(64 * MB, 0, 64 * MB))
    finding = examine_shared_memory(tmp_path)
    assert finding.status == "warning" and "64 MB" in finding.found and "--shm-size" in str(finding.cure)
    assert examine_shared_memory(tmp_path / "none").status == "warning"


def test_a_missing_compiler_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert examine_compiler().found == "none on the PATH"
    monkeypatch.setenv("CXX", "icpx")
    assert examine_compiler().found == "CXX names `icpx`, which is not on the PATH"
    compiler = tmp_path / "icpx"
    compiler.touch(mode=0o755)
    assert examine_compiler() == Finding("C++ compiler", "ok", str(compiler))


def test_a_clock_in_the_past_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    assert examine_clock().status == "ok"
    monkeypatch.setattr(time, "time", lambda: 0.0)
    assert examine_clock().status == "problem"


def test_few_file_handles_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    import resource

    for limits, cure in (((256, 8192), "ulimit -n 4096"), ((256, 1024), "hard limit of 1,024")):
        monkeypatch.setattr(resource, "getrlimit", lambda which, limits=limits: limits)
        finding = examine_file_handles()
        assert finding.status == "warning" and cure in str(finding.cure)
    monkeypatch.setattr(resource, "getrlimit", lambda which: (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert examine_file_handles().status == "ok"


def test_more_threads_than_cores_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "4096")
    assert examine_cores().status == "warning"
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert examine_cores().status == "ok"


def test_a_token_is_never_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_canary")
    finding = examine_hub()
    assert "a token is set" in finding.found and "canary" not in str(finding)
