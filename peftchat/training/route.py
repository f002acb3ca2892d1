"""Route: how the machines of a run reach the first one, and each other.

torch takes the address that a machine's own name resolves to. On many that is a loopback address (`127.0.1.1 NAME` in
/etc/hosts), which no other machine reaches. So the address is that of the route to MASTER_ADDR.
"""

import ipaddress
import socket
from dataclasses import dataclass

from peftchat.addresses import is_loopback
from peftchat.errors import UserError


@dataclass(frozen=True, slots=True)
class Route:
    """How this machine reaches the first one.

    Attributes:
        address: this machine's own address on the way, by which the others reach it.
        interface: the network interface of that address; None if it cannot be told.
        is_first: whether the first machine is this one.
    """

    address: str
    interface: str | None
    is_first: bool


def route_to(host: str, port: int) -> Route:
    """Find the way to the first machine; nothing is sent.

    Raises:
        UserError: the name is unknown, there is no way, or the name leads to this machine alone.
    """
    import psutil

    try:
        family, _, _, _, target = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(target)
            address = str(probe.getsockname()[0])
    except OSError as error:
        raise UserError(
            f"{host} cannot be reached: {error.strerror or error}",
            where=f"MASTER_ADDR={host}",
            hint="Set MASTER_ADDR to an address of the first machine that all machines reach.",
        ) from error
    if ipaddress.ip_address(address.partition("%")[0]).is_loopback and not is_loopback(host):
        raise UserError(
            f"{host} is {target[0]} on this machine, an address that no other machine reaches",
            where=f"MASTER_ADDR={host}",
            hint="Set MASTER_ADDR to the first machine's address in the network (`hostname -I` shows it).",
        )
    owners = (
        name
        for name, addresses in psutil.net_if_addrs().items()
        if any(one.address.partition("%")[0] == address.partition("%")[0] for one in addresses)
    )
    return Route(address, next(owners, None), address == str(target[0]))
