"""Sizes, ages and counts as people write and read them."""

from __future__ import annotations

import re

from temper.errors import JobError, Problem

_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?)([KMGT])")
_AGE = re.compile(r"([0-9]+(?:\.[0-9]+)?)([smhdw])")
_BYTES = {unit: 2 ** (10 * (power + 1)) for power, unit in enumerate("KMGT")}
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}


def parse_size(key: str, text: str) -> int:
    """Bytes of e.g. `1.5G`, in powers of 1024. Raises JobError, which calls the text by `key`, where it is no size."""
    match = _SIZE.fullmatch(text)
    if match is None:
        raise JobError([Problem(key, text, "is no size", "write a number with K, M, G or T, e.g. 1.5G")])
    return round(float(match[1]) * _BYTES[match[2]])


def parse_age(key: str, text: str) -> float:
    """Seconds of e.g. `7d`. Raises JobError, which calls the text by `key`, where it is no age."""
    match = _AGE.fullmatch(text)
    if match is None:
        rule, remedy = "is no age", "write a number with s, m, h, d or w (seconds to weeks), e.g. 7d or 12h"
        raise JobError([Problem(key, text, rule, remedy)])
    return float(match[1]) * _SECONDS[match[2]]


def show_age(age_s: float) -> str:
    """In whole units of the largest that fits, as :func:`parse_age` reads it, e.g. `7d`."""
    unit = next((unit for unit in "dhm" if age_s >= _SECONDS[unit]), "s")
    return f"{int(max(age_s, 0) // _SECONDS[unit])}{unit}"


def count(number: int, name: str) -> str:
    return f"{number} {name}" if number == 1 else f"{number} {name}s"
