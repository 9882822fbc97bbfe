"""The page at ``/``: one file, which needs nothing from elsewhere, and what a browser may do with it."""

from __future__ import annotations

import base64
import hashlib
import re
from pathlib import Path

__all__ = ["Page"]

_FILE = Path(__file__).with_name("page.html")


class Page:
    """The page and its headers.

    Its script and its style are part of it, and the only ones that a browser may run or apply: the policy names them by
    their hashes. It may ask this service, and nothing else.
    """

    def __init__(self, file: Path = _FILE) -> None:
        self.content = file.read_bytes()
        policy = {
            "default-src": "'none'",
            "script-src": _hashes(self.content, b"script"),
            "style-src": _hashes(self.content, b"style"),
            "connect-src": "'self'",
            "img-src": "data:",
            "base-uri": "'none'",
            "form-action": "'none'",
            "frame-ancestors": "'none'",
        }
        self.headers = {
            "content-security-policy": "; ".join(f"{name} {value}" for name, value in policy.items()),
            "x-content-type-options": "nosniff",
            "referrer-policy": "no-referrer",
            "cache-control": "no-cache",
        }


def _hashes(content: bytes, element: bytes) -> str:
    """Return the sources of a policy for what stands in a page's elements of one kind."""
    found = re.findall(rb"<%s>(.*?)</%s>" % (element, element), content, re.DOTALL)
    return " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(part).digest()).decode()}'" for part in found)
