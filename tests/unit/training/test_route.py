"""Machines of a run: the address and the interface by which others reach this one, and meetings that fail."""

import os
import socket
from typing import Any

import psutil
import pytest

from peftchat.errors import UserError
from peftchat.training import process_group
from peftchat.training.distributed import DistributedSetup
from peftchat.training.launcher_environment import LaunchedProcess
from peftchat.training.machines import launch_on_machines
from peftchat.training.route import route_to

ADDRESSES = {
    one.address: name
    for name, addresses in psutil.net_if_addrs().items()
    for one in addresses
    if one.family == socket.AF_INET
}


@pytest.mark.parametrize("address", ADDRESSES)
def test_the_machine_that_has_the_address_is_the_first(address: str) -> None:
    route = route_to(address, 29500)
    assert route.is_first and route.address == address and ADDRESSES[route.address] == route.interface


def test_another_machine_is_reached_from_an_address_of_this_one() -> None:
    try:
        route = route_to("192.0.2.7", 29500)  # RFC 5737: nobody has it.
    except UserError as error:
        assert "cannot be reached" in str(error)
    else:
        assert not route.is_first and ADDRESSES[route.address] == route.interface


def resolve_to(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = socket.getaddrinfo

    def resolve(host: str, *given: Any, **named: Any) -> Any:
        return real(address if host == "gpu01" else host, *given, **named)

    monkeypatch.setattr(socket, "getaddrinfo", resolve)


def test_a_name_that_leads_to_this_machine_alone_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """As `127.0.1.1 gpu01` in Debian's /etc/hosts."""
    resolve_to("127.0.1.1", monkeypatch)
    with pytest.raises(UserError, match=r"MASTER_ADDR=gpu01: gpu01 is 127\.0\.1\.1 on this machine") as raised:
        route_to("gpu01", 29500)
    assert "hostname -I" in str(raised.value)
    # Written as an address it is meant: two launchers on one machine.
    assert route_to("127.0.0.1", 29500).is_first and route_to("localhost", 29500).is_first


def test_an_unknown_name_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"MASTER_ADDR=gpu01\.invalid: gpu01\.invalid cannot be reached"):
        route_to("gpu01.invalid", 29500)


@pytest.mark.parametrize(
    ("local", "given", "expected"), [(1, None, "lo"), (1, "eth7", "eth7"), (2, None, None)], ids=str
)
def test_gloo_takes_the_network_of_the_meeting(
    local: int, given: str | None, expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unless the user names another, or all processes are on one machine."""
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", given or "")
    interface = {
        name for name, addresses in psutil.net_if_addrs().items() for one in addresses if one.address == "127.0.0.1"
    }
    process_group._name_interface(LaunchedProcess(1, 2, 0, local, "127.0.0.1", "29500"))
    found = os.environ["GLOO_SOCKET_IFNAME"] or None
    assert found == expected or (expected == "lo" and found in interface)


def test_a_first_machine_that_does_not_answer_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    resolve_to("127.0.0.1", monkeypatch)
    monkeypatch.setattr("peftchat.training.machines.this_route", lambda: type("R", (), {"is_first": False})())
    for name, value in {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "PEFTCHAT_RENDEZVOUS_TIMEOUT": "0.1",
    }.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=f"nobody answers at 127.0.0.1:{port} within 0.1 seconds: Connection refused"):
        launch_on_machines(DistributedSetup("ddp", 1, 2, 0, "torchrun"), ["false"], {})
