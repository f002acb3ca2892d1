"""Keys of services in texts: nothing that is shown, written or sent may hold one."""

import re

_ACCESS_KEY = re.compile(
    r"\bhf_[A-Za-z0-9]{30,}\b|\bsk-[A-Za-z0-9_-]{20,}\b|\bAKIA[0-9A-Z]{16}\b|\bgh[pousr]_[A-Za-z0-9]{36,}\b"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY-----"
)


def find_access_key(text: str) -> str | None:
    """Return the beginning of what looks like a key in a text; None if nothing does."""
    found = _ACCESS_KEY.search(text)
    return None if found is None else f"{found[0][:6]}…"
