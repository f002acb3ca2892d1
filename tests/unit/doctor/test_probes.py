"""Probes: right here, wrong where a library computes something else, and a finding where a process dies or hangs."""

import dataclasses

import pytest
import torch
from bitsandbytes import functional

from peftchat.doctor import probes, running
from peftchat.doctor.running import PROBES, Probe, run_probe

KNOWN = {probe.name: probe for probe in PROBES}


def test_every_probe_exists() -> None:
    assert KNOWN.keys() == probes.PROBES.keys()


def test_a_right_library_passes() -> None:
    assert "attend to themselves alone" in probes.attention()
    assert "round trip" in probes.nf4()


def test_a_wrong_quantization_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(functional, "dequantize_4bit", lambda packed, state: torch.zeros(128, 256))
    with pytest.raises(ArithmeticError, match=r"differ by 100\.0% of their norm"):
        probes.nf4()


def test_attention_across_conversations_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    from peftchat.models import varlen_attention

    def across(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_: object) -> torch.Tensor:
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(0, 1)

    monkeypatch.setattr(varlen_attention, "_attend", across)
    with pytest.raises(AssertionError, match="not close"):
        probes.attention()


def test_two_processes_meet() -> None:
    finding = run_probe(KNOWN["two_processes"])
    assert finding.status == "ok" and "an all-reduce over two processes is right (gloo)" in finding.found


def test_a_process_that_fails_is_a_finding() -> None:
    finding = run_probe(Probe("nothing", "nothing", "A cure."))
    assert (finding.status, finding.found, finding.cure) == ("problem", "KeyError: 'nothing'", "A cure.")


def test_a_process_that_hangs_is_killed() -> None:
    finding = run_probe(KNOWN["two_processes"], seconds=0.01)
    assert (finding.status, finding.found) == ("warning", "no result after 0 s")


def test_a_missing_package_is_a_note() -> None:
    finding = run_probe(dataclasses.replace(KNOWN["zero3"], package="no_such_package"))
    assert (finding.status, finding.found) == ("note", "no_such_package is not installed")


def test_a_signal_is_named() -> None:
    assert running._reason(-11, running.Path("/dev/null")) == "the process was killed by signal 11"
