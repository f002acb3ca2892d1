"""Who may open the page: the address that it is bound to, the password, and what the browser may load."""

import hmac
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from typing import Any

from peftchat.addresses import free_port, is_loopback, url_of
from peftchat.errors import UserError

PASSWORD_VARIABLE = "PEFTCHAT_WEB_PASSWORD"

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
        return url_of(self.host, self.port)

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
    return Access(host, free_port(host, *((_FIRST_PORT, _PORTS) if port is None else (port, 1))), password)


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
