"""Known secrets are taken out of what a sandbox says before it is stored, and what nobody sees before it is read."""

from __future__ import annotations

import base64
import json
import re
import unicodedata
from collections.abc import Iterable
from typing import Any, cast
from urllib.parse import quote

MARK = "[redacted]"
SHORTEST = 8
"""Shorter values are not looked for: they would turn ordinary words into marks."""

KEPT = "\n\t"


def clean(text: str) -> str:
    """Without control, bidi, zero-width, tag and other invisible characters; ANSI sequences lose their escape."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(
        c for c in text if c in KEPT or unicodedata.category(c) not in ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")
    )


class Redactor:
    """Replaces every known secret, plain or in the encodings that tools use, with `[redacted]`."""

    def __init__(self, secrets: Iterable[str]) -> None:
        forms: set[str] = set()
        for secret in secrets:
            if len(secret) < SHORTEST:
                continue
            raw = secret.encode()
            forms |= {secret, secret[::-1], quote(secret, safe=""), raw.hex(), raw.hex().upper()}
            forms.add(json.dumps(secret)[1:-1])
            # Base64 of a longer text that holds the secret: its inner characters depend on where it starts.
            for shift in range(3):
                encoded = base64.b64encode(b"\0" * shift + raw).decode().rstrip("=")
                inner = encoded[(shift * 8 + 5) // 6 : -1 if (len(raw) + shift) % 3 else None]
                forms |= {inner, inner.replace("+", "-").replace("/", "_")}
        longest_first = sorted((form for form in forms if len(form) >= SHORTEST), key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, longest_first))) if longest_first else None

    def text(self, text: str) -> str:
        """The text without any known secret."""
        return self._pattern.sub(MARK, text) if self._pattern else text

    def data(self, data: bytes) -> bytes:
        """The same for bytes that hold text."""
        return self.text(data.decode("utf-8", "surrogateescape")).encode("utf-8", "surrogateescape")

    def value(self, value: Any) -> Any:
        """The same for JSON, keys included."""
        if isinstance(value, str):
            return self.text(value)
        if isinstance(value, dict):
            mapping = cast("dict[str, Any]", value)
            return {self.text(key): self.value(item) for key, item in mapping.items()}
        if isinstance(value, list):
            return [self.value(item) for item in cast("list[Any]", value)]
        return value
