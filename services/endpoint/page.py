"""The page at `/`: versions, shares of the traffic, latency and errors, and a box to try them in.

One file without a build step. It holds no figures itself: its script asks the endpoint for them, with the key that a
person gives it and that stays in the page's memory. Its policy lets nothing run or load but what is in the file, and
lets it talk to its own origin only.
"""

import base64
import hashlib
import re
from functools import cache
from pathlib import Path

from starlette.responses import HTMLResponse


def page(status: int = 200) -> HTMLResponse:
    """The page; with status 401 where a key is wanted first, which it then asks for."""
    text, policy = _read()
    headers = {
        "content-security-policy": policy,
        "x-content-type-options": "nosniff",
        "referrer-policy": "no-referrer",
        "cache-control": "no-cache",
    }
    if status == 401:
        headers["www-authenticate"] = "Bearer"
    return HTMLResponse(text, status, headers)


@cache
def _read() -> tuple[str, str]:
    """The page's text, and a policy that names the hashes of its script and style."""
    text = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    hashes = {tag: [_sha256(inner) for inner in re.findall(f"<{tag}>(.*?)</{tag}>", text, re.DOTALL)] for tag in _TAGS}
    parts = [f"{tag}-src {' '.join(found)}" for tag, found in hashes.items()]
    rest = ("connect-src 'self'", "img-src data:", "base-uri 'none'", "form-action 'none'", "frame-ancestors 'none'")
    return text, "; ".join(("default-src 'none'", *parts, *rest))


_TAGS = ("script", "style")


def _sha256(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
