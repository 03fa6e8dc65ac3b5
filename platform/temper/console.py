"""What Ray's libraries print on the console, which is the run's."""

from __future__ import annotations

import logging


def quieten(logger: str, level: int) -> None:
    """Lets only records of `level` and above onto the console of one of Ray's loggers; its log files keep all."""
    for handler in logging.getLogger(logger).handlers:
        if handler.get_name() == "console":
            handler.setLevel(level)
