"""Makes the README's picture of a terminal, `terminal.svg`: what the demo shows in one. Takes a minute.

    python docs/make_pictures.py STORAGE

The pictures of pages are taken by the tests that look at them: `make pictures` makes all of them.
"""

from __future__ import annotations

import contextlib
import io
import re
import sys
import textwrap
from pathlib import Path
from unittest import mock

from rich.console import Console
from rich.terminal_theme import MONOKAI
from rich.text import Text

from temper import cli
from temper.launch import train
from temper.tracking.progress import LiveDisplay

FOLDER = Path(__file__).parent
JOB = "jobs/digits.yaml"
COLUMNS = 100


def make_terminal(storage: Path) -> None:
    """Trains the demo with temper's own display on a console that records what it is given."""
    console = Console(record=True, width=COLUMNS, file=io.StringIO(), color_system="truecolor", highlight=False)
    command = ["train", JOB, f"storage={storage}"]
    console.print(Text("$ ", "bold") + Text(" ".join(["temper", *command])))
    end = io.StringIO()
    with (
        mock.patch.object(train, "build_display", lambda mode, plan: LiveDisplay(plan, console)),
        contextlib.redirect_stderr(end),
    ):
        code = cli.main([*command, "--fresh"])
    for line in end.getvalue().splitlines():
        # What is wider than the terminal goes on in the next line.
        console.print("\n".join(textwrap.wrap(line, COLUMNS, drop_whitespace=False)), markup=False)
    if code:
        raise SystemExit(f"the run ended with code {code}: {end.getvalue()}")
    svg = console.export_svg(title="temper", theme=MONOKAI)
    # The picture must not load a font from elsewhere.
    (FOLDER / "terminal.svg").write_text(re.sub(r"@font-face \{.*?\}\s*", "", svg, flags=re.DOTALL))


if __name__ == "__main__":
    make_terminal(Path(sys.argv[1]))
