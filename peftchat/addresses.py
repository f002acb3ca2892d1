"""Addresses: those that a server listens on, and those that stand where a path or a hub id is expected."""

import errno
import ipaddress
import re
import socket
from contextlib import suppress

from peftchat.errors import UserError


def is_loopback(host: str) -> bool:
    """Return whether only this machine reaches an address; a name other than `localhost` counts as reached."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def url_of(host: str, port: int) -> str:
    """Return the address of a server as this machine reaches it."""
    name = host.strip("[]")
    with suppress(ValueError):
        address = ipaddress.ip_address(name)
        if address.is_unspecified:
            name = "127.0.0.1" if address.version == 4 else "::1"
    return f"http://{f'[{name}]' if ':' in name else name}:{port}"


def free_port(host: str, first: int, count: int = 1) -> int:
    """Return the first port that is free.

    Args:
        host: the address to listen on.
        first: the port to try first.
        count: how many to try.

    Raises:
        UserError: this machine has no such address, or the ports are taken.
    """
    for port in range(first, first + count):
        try:
            family, kind, _, _, address = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM)[0]
        except OSError as error:
            raise UserError(f"there is no such address: {error.strerror}", where=f"--host {host}") from error
        with socket.socket(family, kind) as probe:
            # As servers do: a port that a server has just left may be taken again.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(address)
            except OSError as error:
                if error.errno == errno.EADDRINUSE and count > 1:
                    continue
                hint = "End the program that has it, or choose another port."
                if error.errno == errno.EACCES:
                    hint = "Ports below 1024 belong to the administrator: choose a higher one."
                elif error.errno != errno.EADDRINUSE:
                    hint = "Give an address of this machine."
                what = f"the port cannot be taken: {error.strerror}"
                raise UserError(what, where=f"--host {host} --port {port}", hint=hint) from error
        return port
    what = f"the ports {first} to {first + count - 1} are taken"
    raise UserError(what, where=f"--host {host}", hint="Choose another with --port.")


_ADDRESS = re.compile(r"([a-z][a-z0-9+.-]+):/+", re.IGNORECASE)
_PAGE = re.compile(
    r"(?:https?://(?:www\.)?(?:huggingface\.co|hf\.co)|hf:/)/(?:datasets/)?([\w.-]+/[\w.-]+)", re.IGNORECASE
)


def scheme_of(text: str) -> str | None:
    """Return what stands before the colon of an address such as `s3://bucket`; None if the text is none.

    A path that went through `pathlib` has one slash left. One letter is a drive of Windows.
    """
    address = _ADDRESS.match(text)
    return None if address is None else address[1].lower()


def advice_on_page(text: str) -> str | None:
    """Return what to write in place of an address; None if the text is none."""
    scheme = scheme_of(text)
    if scheme is None:
        return None
    if scheme == "file":
        return "Write the path alone, without `file:`."
    page = _PAGE.match(text)
    return "Download it first, and give its path." if page is None else f"Write the hub id: {page[1]}."
