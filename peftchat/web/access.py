"""Who may open the page: the address that it is bound to, the password, and what the browser may load."""

import hmac
import ipaddress
import socket
from collections.abc import Awaitable, Callable, MutableMapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from peftchat.errors import UserError

PASSWORD_VARIABLE = "PEFTCHAT_WEB_PASSWORD"
DEFAULT_HOST = "127.0.0.1"

_FIRST_PORT, _PORTS = 7860, 100
_SHORTEST_PASSWORD = 8

_CONTENT_POLICY = "; ".join(
    [
        # An answer may hold the address of a picture; the browser must not ask another machine for it.
        "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:",
        "base-uri 'self'",
        "form-action 'self'",
        "frame-ancestors 'self'",
        "object-src 'none'",
    ]
)


@dataclass(frozen=True, slots=True)
class Access:
    """The address of the page and who may open it.

    Attributes:
        host: the address to bind to.
        port: the port; it was free when this was made.
        password: what a user has to type; None lets everyone in who reaches the address.
    """

    host: str
    port: int
    password: str | None = None

    @property
    def url(self) -> str:
        """What to open in a browser of this machine."""
        name = self.host.strip("[]")
        with suppress(ValueError):
            address = ipaddress.ip_address(name)
            if address.is_unspecified:
                name = "127.0.0.1" if address.version == 4 else "::1"
        return f"http://{f'[{name}]' if ':' in name else name}:{self.port}"

    def accepts(self, user: str, password: str) -> bool:
        """Return whether a user who gives this password may enter; the name is theirs to choose."""
        return self.password is not None and hmac.compare_digest(password.encode(), self.password.encode())

    @property
    def allowed_hosts(self) -> list[str]:
        """The names under which a browser may ask for the page.

        A page of another site can have its own name lead to this machine (DNS rebinding); its requests carry that name.
        """
        return ["127.0.0.1", "localhost", "[::1]", self.host] if is_loopback(self.host) else ["*"]


def check_access(host: str, port: int | None, password: str | None) -> Access:
    """Check who could open the page, and find a port.

    Args:
        host: the address to bind to.
        port: the port; None for the first that is free from 7860 on.
        password: from the option or the environment.

    Raises:
        UserError: the address is reached from other machines and there is no password, the password is too short, or
            the port is taken.
    """
    if password is not None and len(password) < _SHORTEST_PASSWORD:
        raise UserError(
            f"the password has {len(password)} characters, expected at least {_SHORTEST_PASSWORD}",
            where=f"--password, {PASSWORD_VARIABLE}",
            hint="Choose a longer one.",
        )
    if password is None and not is_loopback(host):
        raise UserError(
            "other machines can reach this address, and there is no password",
            where=f"--host {host}",
            hint=f"Set {PASSWORD_VARIABLE}, or leave --host out and come through `ssh -L 7860:127.0.0.1:7860`.",
        )
    return Access(host, _free_port(host, port), password)


def is_loopback(host: str) -> bool:
    """Return whether only this machine reaches an address; a name other than `localhost` counts as reached."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def _free_port(host: str, port: int | None) -> int:
    first, count = (_FIRST_PORT, _PORTS) if port is None else (port, 1)
    for candidate in range(first, first + count):
        try:
            address = socket.getaddrinfo(host.strip("[]"), candidate, type=socket.SOCK_STREAM)[0]
        except OSError as error:
            raise UserError(f"there is no such address: {error}", where=f"--host {host}") from error
        with socket.socket(address[0], address[1]) as probe:
            # As servers do: a port that a server has just left may be taken again.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(address[4])
            except PermissionError as error:
                hint = "Ports below 1024 belong to the administrator: choose a higher one."
                raise UserError("the port is not allowed", where=f"--port {candidate}", hint=hint) from error
            except OSError as error:
                if count > 1 and error.errno not in _NO_SUCH_ADDRESS:
                    continue
                what = f"the port cannot be taken: {error.strerror}"
                hint = "End the program that has it, choose another port, or leave the option out."
                raise UserError(what, where=f"--host {host} --port {candidate}", hint=hint) from error
        return candidate
    raise UserError(f"the ports {first} to {first + count - 1} are taken", where=f"--host {host}", hint="Give --port.")


# EADDRNOTAVAIL of Linux, macOS and Windows: the address is another machine's.
_NO_SUCH_ADDRESS = (99, 49, 10049)

_Scope = MutableMapping[str, Any]
_Send = Callable[[_Scope], Awaitable[None]]
_App = Callable[[_Scope, Callable[[], Awaitable[_Scope]], _Send], Awaitable[None]]


class ContentPolicy:
    """ASGI middleware: a header by which the browser loads nothing from another machine, whatever an answer holds."""

    def __init__(self, app: _App) -> None:
        self._app = app

    async def __call__(self, scope: _Scope, receive: Callable[[], Awaitable[_Scope]], send: _Send) -> None:
        """Pass a request on, and add the headers to the response."""

        async def with_headers(message: _Scope) -> None:
            if message["type"] == "http.response.start":
                added = [
                    (b"content-security-policy", _CONTENT_POLICY.encode()),
                    (b"referrer-policy", b"no-referrer"),
                    (b"x-content-type-options", b"nosniff"),
                ]
                message["headers"] = [*message.get("headers", []), *added]
            await send(message)

        await self._app(scope, receive, with_headers if scope["type"] == "http" else send)
