"""Makes the README's pictures from a real run of the demo; needs Chromium, and takes a minute or two.

    python docs/make_pictures.py STORAGE

`terminal.svg` is what `temper train jobs/digits.yaml` shows in a terminal; `mlflow.png` is that run's page in MLflow.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import json
import re
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import aiohttp
from rich.console import Console
from rich.terminal_theme import MONOKAI
from rich.text import Text

from temper import cli
from temper.launch import train
from temper.tracking.mlflow_store import build_client, storage_uri
from temper.tracking.progress import LiveDisplay

FOLDER = Path(__file__).parent
JOB = "jobs/digits.yaml"
COLUMNS = 100
SIZE = {"width": 1280, "height": 1056}
CHROMIUM = (
    "chromium --headless --no-sandbox --disable-gpu --disable-quic --disable-sync --no-first-run --no-proxy-server "
    "--disable-background-networking --disable-component-update --hide-scrollbars --remote-debugging-port=0"
)
SEARCH = "input[placeholder*=charts]"
# Without MLflow's panel for chats, and with its pages for training, not for language models.
SETTINGS = {
    "mlflow.assistant.panelOpen_v1": "false",
    "mlflow.assistant.fab.autoOpenedOnFirstLoad_v1": "true",
    "mlflow.workflowType_v1": '"machine_learning"',
}


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


async def make_mlflow(storage: Path) -> None:
    """Photographs the charts of the newest run's losses and evaluations."""
    run_id = json.loads(_newest(storage.glob("digits-*/run.json")).read_text())["run_id"]
    experiment = build_client(storage_uri(storage)).get_run(run_id).info.experiment_id
    serve = [sys.executable, "-m", "temper", "ui", "--storage", str(storage), "--no-browser", "--port", "5017"]
    with tempfile.TemporaryDirectory() as profile:
        browse = [*CHROMIUM.split(), f"--user-data-dir={profile}", "about:blank"]
        with _running(serve, r"MLflow: (\S+?)/#") as server, _running(browse, r"listening on ws://([^/]+)") as browser:
            async with aiohttp.ClientSession() as session:
                await _photograph(session, browser, f"{server}/#/experiments/{experiment}/runs/{run_id}/model-metrics")


def _newest(paths: Iterable[Path]) -> Path:
    return max(paths, key=lambda path: path.stat().st_mtime)


async def _photograph(session: aiohttp.ClientSession, browser: str, address: str) -> None:
    async with session.get(f"http://{browser}/json") as answer:
        page = next(target for target in await answer.json() if target["type"] == "page")
    async with session.ws_connect(page["webSocketDebuggerUrl"], max_msg_size=0) as socket:

        async def call(method: str, **params: Any) -> dict[str, Any]:
            await socket.send_json({"id": 1, "method": method, "params": params})
            while "id" not in (reply := await socket.receive_json()):
                pass  # an event
            return dict(reply["result"])

        await call("Page.enable")
        await call("Emulation.setDeviceMetricsOverride", **SIZE, deviceScaleFactor=1, mobile=False)
        script = "".join(f"localStorage.setItem({key!r}, {value!r});" for key, value in SETTINGS.items())
        await call("Page.addScriptToEvaluateOnNewDocument", source=script)
        await call("Page.navigate", url=address)
        await asyncio.sleep(8)
        await call("Runtime.evaluate", expression=f"document.querySelector('{SEARCH}').focus()")
        await call("Input.insertText", text="(eval|train)/")
        # Without a mouse, charts show the buttons that else appear under it.
        hide = "document.head.insertAdjacentHTML('beforeend', '<style>.modebar {display: none}</style>')"
        await call("Runtime.evaluate", expression=f"document.activeElement.blur(); {hide}")
        await asyncio.sleep(5)
        picture = await call("Page.captureScreenshot", format="png")
    (FOLDER / "mlflow.png").write_bytes(base64.b64decode(picture["data"]))


@contextlib.contextmanager
def _running(command: list[str], ready: str) -> Iterator[str]:
    """Runs a command for the block; gives what the first line of its standard error that matches `ready` says."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        yield next(match[1] for line in process.stderr if (match := re.search(ready, line)))
    finally:
        process.terminate()
        process.wait()


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    make_terminal(folder)
    asyncio.run(make_mlflow(folder))
