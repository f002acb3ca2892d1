"""Keys, tokens and passwords in source text: what must never become training data."""

import math
import re
from collections import Counter

_PATTERNS = tuple(
    re.compile(pattern)
    for pattern in (
        r"-----BEGIN [A-Z ]*PRIVATE KEY-----",
        r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b",
        r"\bgh[pousr]_[A-Za-z0-9]{20,}\b",
        r"\bgithub_pat_\w{20,}\b",
        r"\bglpat-[\w-]{20,}",
        r"\bsk-[A-Za-z0-9_-]{16,}",
        r"\bhf_[A-Za-z0-9]{20,}\b",
        r"\bxox[abprs]-[\w-]{10,}",
        r"\bAIza[\w-]{30,}",
        r"\beyJ[\w-]{10,}\.[\w-]{10,}\.[\w-]{5,}",
        r"\b[a-z][a-z0-9+.-]*://[^/\s:@'\"{}<>]+:[^/\s:@'\"{}<>]{3,}@",
        r"(?i)\w*(?:passw(?:or)?d|passphrase|secret|api_?key|access_?key|auth_?token|private_?key|token)\w*"
        r"['\"]?\s*(?::\s*[\w.\[\]| ]+)?(?:=|:)\s*[rbfu]?['\"](?=[^'\"\s{}<>]*[0-9!@#$%^&*])[^'\"\s{}<>]{6,}['\"]",
    )
)
_LONG_LITERAL = re.compile(r"['\"]([A-Za-z0-9+/=_-]{32,})['\"]")
_BITS_OF_A_KEY = 4.0
"""Bits of entropy a character: random base64 of 32 characters has about 4.5, English identifiers about 3.5."""


def has_secret(text: str) -> bool:
    """Whether the text holds something that looks like a key, a token or a password."""
    if any(pattern.search(text) for pattern in _PATTERNS):
        return True
    return any(_looks_random(match[1]) for match in _LONG_LITERAL.finditer(text))


def _looks_random(text: str) -> bool:
    if not (re.search(r"\d", text) and re.search(r"[A-Za-z]", text)):
        return False
    if re.fullmatch(r"[0-9a-fA-F]+", text):
        return True
    return _entropy(text) > _BITS_OF_A_KEY and bool(re.search(r"[A-Z]", text) and re.search(r"[a-z]", text))


def _entropy(text: str) -> float:
    """Shannon entropy in bits a character."""
    return -sum(n / len(text) * math.log2(n / len(text)) for n in Counter(text).values())
