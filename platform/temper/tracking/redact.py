"""Secrets out of everything that is logged: passwords in addresses, values of keys that name a secret, private keys,
and, wherever they stand, the secrets of this process's environment."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from functools import cache
from typing import Any

HIDDEN = "***"
# Ends with the word, so that `pad_token_id` and `image_key` are no secrets, but `hf_token` and `api_key` are.
_SECRET_NAME = (
    r"[\w.\-]*(?:password|passwd|passphrase|pwd|secret|token|credentials?|authorization"
    r"|(?:api|access|secret|private|auth|encryption|signing)[_\-.]?key(?:[_\-.]?id)?)"
)
_SECRET_KEY = re.compile(_SECRET_NAME, re.IGNORECASE)
# One with a `/` ends where a host follows, and is no port with a path that has an `@`.
_PASSWORD_IN_URI = re.compile(
    r"(?P<before>[A-Za-z][A-Za-z0-9+.\-]{0,20}://[^\s/:@'\"\[]*):"
    r"(?P<secret>[^\s/'\"]+|(?!\d+/)[^\s'\"]+?)@(?![^\s/'\"]*@)"
)
# A token instead of a name and a password; only of addresses in which a name alone would make no sense.
_TOKEN_IN_URI = re.compile(r"(?P<before>https?://)(?P<secret>[^\s/:@'\"]+)@")
# With escapes as JSON, Python and YAML have them; JSON in a text of JSON has its quotes escaped.
_QUOTED = (
    r"\"(?:[^\"\\\n]|\\.)*\"|\"[^\"\n]*\"|'(?:[^'\\\n]|\\.|'')*'|'(?:[^'\n]|'')*'"
    r"|(?P<quote>\\+[\"'])[^\n]*?(?P=quote)"
)
# YAML's `key: |` and the lines after it that are indented as the first; in a diff they begin with + or -.
_BLOCK = r"[|>][\d+\-]*[ \t]*\n(?P<indent>[+\-]?[ \t]+)[^\n]*(?:\n(?:(?P=indent)[^\n]*|[+\-]?[ \t]*(?=\n|\Z)))*"
_ASSIGNMENT = re.compile(
    rf"(?P<before>(?<![\w.\-]){_SECRET_NAME}\\*['\"]?\s*[=:]\s*(?:(?:bearer|basic|token)[ \t]+)?)"
    rf"(?P<secret>{_BLOCK}|{_QUOTED}|[^\s,;&}}\]'\"]+)",
    re.IGNORECASE,
)
# A line of a file of variables, whose value goes to its end, with spaces and all.
_VARIABLE = re.compile(
    rf"^(?P<before>[+\- ]?(?:export[ \t]+)?(?-i:(?=[A-Z0-9_]+=)){_SECRET_NAME}=)(?P<secret>[^\s'\"][^\n]*)",
    re.IGNORECASE | re.MULTILINE,
)
_OPTION = re.compile(
    rf"(?P<before>(?<![\w\-])--{_SECRET_NAME}(?:[ \t]+|['\"],\s*))(?P<secret>{_QUOTED}|(?!-|\*{{3}})[^\s'\"]+)",
    re.IGNORECASE,
)
# Of signed addresses; the bare word `signature` is also that of a function.
_SIGNATURE = re.compile(
    r"(?P<before>(?:[?&][\w\-]*signature|(?<![\w.\-])(?:[\w\-]+-signature|sig))=)(?P<secret>[^\s,;&}\]'\"]+)",
    re.IGNORECASE,
)
_PRIVATE_KEY = re.compile(
    r"-----BEGIN [A-Z ]*PRIVATE KEY[A-Z ]*-----(?:.*?-----END(?:[A-Z ]*-----)?|[\sA-Za-z0-9+/=\\\-]*)", re.DOTALL
)


_FOLDERS = ("PWD", "OLDPWD")  # of the shell: no passwords
_SHORTEST = 6
"""Characters of a secret in the environment that is looked for everywhere: a shorter one is part of other words."""


def is_secret(key: str) -> bool:
    """Whether a key (dotted or not) names a secret."""
    return _SECRET_KEY.fullmatch(key) is not None


def redact_text(text: str) -> str:
    """The text with `***` for passwords in `scheme://user:password@host`, for values in `password: …`, `token=…` and
    `--secret …`, for signatures in addresses, for private keys, and for whatever is a secret in the environment."""
    for secret in _secrets_of(tuple(_in_environment())):
        text = text.replace(secret, HIDDEN)
    text = _PRIVATE_KEY.sub(HIDDEN, text)
    text = _PASSWORD_IN_URI.sub(rf"\g<before>:{HIDDEN}@", text)
    text = _TOKEN_IN_URI.sub(rf"\g<before>{HIDDEN}@", text)
    for pattern in (_VARIABLE, _ASSIGNMENT, _OPTION, _SIGNATURE):
        text = pattern.sub(rf"\g<before>{HIDDEN}", text)
    return text


def _in_environment() -> Iterator[tuple[str, str]]:
    """Variables that name a secret, or that may hold an address with one."""
    for name, value in os.environ.items():
        if name not in _FOLDERS and ("://" in value or _is_named_secret(name)):
            yield name, value


@cache
def _is_named_secret(name: str) -> bool:
    return is_secret(name)


@cache
def _secrets_of(variables: tuple[tuple[str, str], ...]) -> tuple[str, ...]:
    """The secrets in these variables, the longest first, as one may be part of another."""
    named = {value.strip() for name, value in variables if _is_named_secret(name)}
    addressed = {match["secret"] for _, value in variables for match in _PASSWORD_IN_URI.finditer(value)}
    found = {secret for secret in named | addressed if len(secret) >= _SHORTEST and not os.path.exists(secret)}
    return tuple(sorted(found, key=lambda secret: (-len(secret), secret)))


def redact_values(value: Any, key: str = "") -> Any:
    """A JSON-able value with the values of secret keys, and passwords in all texts, replaced by `***`."""
    if isinstance(value, dict):
        return {name: redact_values(item, str(name)) for name, item in value.items()}
    if is_secret(key) and value is not None and not isinstance(value, bool):
        return HIDDEN
    if isinstance(value, list | tuple):
        return [redact_values(item) for item in value]
    return redact_text(value) if isinstance(value, str) else value
