"""Secrets out of everything that is logged: passwords in addresses, values of keys that name a secret."""

from __future__ import annotations

import re
from typing import Any

HIDDEN = "***"
# Ends with the word, so that `pad_token_id` and `image_key` are no secrets, but `hf_token` and `api_key` are.
_SECRET_NAME = (
    r"[\w.\-]*(?:password|passwd|passphrase|pwd|secret|token|credentials?|authorization"
    r"|(?:api|access|secret|private|auth|encryption|signing)[_\-.]?key(?:[_\-.]?id)?)"
)
_SECRET_KEY = re.compile(_SECRET_NAME, re.IGNORECASE)
_PASSWORD_IN_URI = re.compile(r"(?P<before>[A-Za-z][A-Za-z0-9+.\-]*://[^\s/:@'\"]*):(?P<secret>[^\s/'\"]+)@")
_ASSIGNMENT = re.compile(
    rf"(?P<before>(?<![\w.\-]){_SECRET_NAME}['\"]?\s*[=:]\s*)(?P<secret>\"[^\"\n]*\"|'[^'\n]*'|[^\s,;&}}\]'\"]+)",
    re.IGNORECASE,
)


def is_secret(key: str) -> bool:
    """Whether a key (dotted or not) names a secret."""
    return _SECRET_KEY.fullmatch(key) is not None


def redact_text(text: str) -> str:
    """The text with `***` for passwords in `scheme://user:password@host` and for values in `password: …`, `token=…`."""
    text = _PASSWORD_IN_URI.sub(rf"\g<before>:{HIDDEN}@", text)
    return _ASSIGNMENT.sub(rf"\g<before>{HIDDEN}", text)


def redact_values(value: Any, key: str = "") -> Any:
    """A JSON-able value with the values of secret keys, and passwords in all texts, replaced by `***`."""
    if isinstance(value, dict):
        return {name: redact_values(item, str(name)) for name, item in value.items()}
    if is_secret(key) and value is not None and not isinstance(value, bool):
        return HIDDEN
    if isinstance(value, list | tuple):
        return [redact_values(item) for item in value]
    return redact_text(value) if isinstance(value, str) else value
