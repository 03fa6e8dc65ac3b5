"""A page of HTML that needs nothing beside itself, and the pieces that it is made of.

The page carries plotly.js, compressed, and forbids the browser to load anything from anywhere or to run any script but
its own two. Whatever is not :class:`Html` is escaped. A number says which metric of which MLflow run it is.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import importlib.util
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from html import escape
from pathlib import Path
from typing import Any, Literal

from temper.tracking.report.figure import PALETTE, ReportFigure, Section, figure_svg

_HERE = Path(__file__).parent
_HEIGHT = 340  # pixels of an interactive figure that does not say its own
_LONG = 30  # rows of a table that is shown whole
_ICON = (
    "<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 16 16'>"
    "<path d='M2 3v11h12' fill='none' stroke='%230b5cad' stroke-width='2'/>"
    "<path d='M4 5c2 6 5 6 9 6' fill='none' stroke='%23d55e00' stroke-width='2'/></svg>"
)


class Html(str):
    """Markup that is in order, and is put into a page as it is."""


@dataclass(frozen=True)
class Number:
    """A number in a page: as `text` says it, sorted by `value`, and, where it is in MLflow, the `metric` of run
    `run_id`, at `step` or at its latest. `source` tells what is no metric: the run's parameter or tag of that name, the
    sum of a metric over the runs below it, or the number of trials below it with that status."""

    value: float
    text: str
    run_id: str = ""
    metric: str = ""
    step: int | None = None
    source: Literal["metric", "param", "tag", "sum", "count"] = "metric"


Content = str | Html | Number


@dataclass(frozen=True)
class Tile:
    """One of the few numbers at the top of a page."""

    label: str
    value: Content
    note: Content = ""


def markup(content: Content) -> Html:
    """Any content as markup."""
    if isinstance(content, Number):
        return _number(content)
    return content if isinstance(content, Html) else Html(escape(content))


def traced(value: float | None, spec: str, run_id: str, metric: str, step: int | None = None) -> Number:
    """A metric of a run, e.g. `traced(0.9812, ".4f", run_id, "test/accuracy")`; `%` at the end of `spec` shows a share
    in percent. What was not measured (None) is an empty text."""
    if value is None:
        return Number(-math.inf, "")
    return Number(value, say(value, spec), run_id, metric, step)


def say(value: float, spec: str) -> str:
    """A number as a text with a real minus; `%` at the end of `spec` makes a share a percentage."""
    text = f"{100 * value:{spec[:-1]}} %" if spec.endswith("%") else f"{value:{spec}}"
    return text.replace("-", "−") if value < 0 else text


def duration(seconds: float) -> str:
    """`0.42 s`, `12.3 s`, `4 min 05 s`, `3 h 07 min`."""
    if seconds < 60:
        return f"{seconds:.2f} s" if seconds < 1 else f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60:,} h {minutes % 60:02d} min"


def table(header: Sequence[str], rows: Iterable[Sequence[Content]], caption: str = "") -> Html:
    """A table that can be sorted by a click on a heading; its first column holds names. Columns of numbers stand to the
    right. One of more than 30 rows lies in a window of its own, and its rows can be filtered."""
    body = [[*row] for row in rows]
    numeric = [any(isinstance(row[index], Number) for row in body) for index in range(len(header))]
    titles = "".join(
        f'<th scope="col"{" class=number" if is_number else ""}>{_heading(title)}</th>'
        for title, is_number in zip(header, numeric, strict=True)
    )
    lines = ["<tr>" + "".join(map(_cell, row)) + "</tr>" for row in body]
    heading = f"<caption><span>{escape(caption)}</span></caption>" if caption else ""
    place = "wide long" if len(body) > _LONG else "wide"
    parts = [
        f'<div class="{place}" tabindex="0"><table class="sortable">{heading}',
        f"<thead><tr>{titles}</tr></thead>",
        "<tbody>",
        *lines,
        "</tbody></table></div>",
    ]
    return Html("\n".join(parts))


def key_table(rows: Iterable[tuple[str, Content]]) -> Html:
    """Names and what they are."""
    lines = [f"<div><dt>{escape(key)}</dt><dd>{markup(value)}</dd></div>" for key, value in rows]
    return Html('<dl class="keys">\n' + "\n".join(lines) + "\n</dl>")


def code(text: str) -> Html:
    """Lines to copy."""
    return Html(f'<pre class="copy" tabindex="0"><code>{escape(text)}</code></pre>')


def note(content: Content) -> Html:
    return Html(f'<p class="quiet">{markup(content)}</p>')


def bullets(texts: Sequence[str]) -> Html:
    """Sentences, one below the other; nothing where there are none."""
    items = "".join(f"<li>{escape(text)}</li>" for text in texts)
    return Html(f'<ul class="quiet">{items}</ul>' if texts else "")


def fold(title: str, content: Content) -> Html:
    """Content that is shown on demand; on paper only where the reader has opened it."""
    return Html(f"<details><summary>{escape(title)}</summary>\n{markup(content)}</details>")


def short_id(run_id: str) -> Html:
    """The beginning of an MLflow id or fingerprint, which shows and gives all of it."""
    return Html(f'<code class="id" title="{escape(run_id)}">{escape(run_id[:10])}</code>')


def build_page(
    title: str, subtitle: Content, sections: Sequence[Section], *, kind: str = "run", tiles: Sequence[Tile] = ()
) -> str:
    """The page. `kind` is what it reports on; sections without any content are left out."""
    shown = [section for section in sections if section.html or section.figures or section.details]
    anchors = _anchors([section.title for section in shown])
    interactive = [figure for section in shown for figure in section.figures if figure.plotly is not None]
    scripts = [_read("theme.js"), _read("page.js"), *([_plotly()] if interactive else [])]
    contents = [
        f'<li><a href="#{anchor}">{escape(section.title)}</a></li>'
        for anchor, section in zip(anchors, shown, strict=True)
    ]
    parts = [
        "<!DOCTYPE html>",
        '<html lang="en">',
        "<head>",
        '<meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{_policy(scripts)}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        '<meta name="generator" content="temper">',
        f"<title>{escape(title)} · {escape(kind)} · temper</title>",
        f'<link rel="icon" href="data:image/svg+xml,{_ICON}">',
        f"<style>\n{_palette()}{_read('page.css')}</style>",
        f"<script>{scripts[0]}</script>",
        "</head>",
        "<body>",
        f'<a class="skip" href="#{anchors[0] if anchors else "top"}">Skip to the content</a>',
        f'<header id="top"><p class="kicker">temper {escape(kind)} report</p>',
        '<button id="theme" type="button" hidden>Theme</button>',
        f"<h1>{escape(title)}</h1>",
        f'<p class="subtitle">{markup(subtitle)}</p>',
        _tiles(tiles),
        "</header>",
        f'<nav aria-label="Contents"><ol>{"".join(contents)}</ol></nav>',
        "<main>",
        *(_section(section, anchor) for section, anchor in zip(shown, anchors, strict=True)),
        "</main>",
        f'<script type="application/json" id="palette">{_json(PALETTE)}</script>',
        *([_packed_plotly()] if interactive else []),
        f"<script>{scripts[1]}</script>",
        "</body>",
        "</html>",
    ]
    return "\n".join(part for part in parts if part) + "\n"


# ------------------------------------------------------------------------------------------------------------- pieces


def _number(number: Number) -> Html:
    if not number.metric:
        return Html(escape(number.text))
    step = "" if number.step is None else f' data-step="{number.step}"'
    at = "" if number.step is None else f" at step {number.step:,}"
    what = _SOURCES[number.source].format(f"{number.metric}{at}")
    title = f"{what} MLflow run {number.run_id or '(none)'}: {number.value!r}"
    return Html(
        f'<span class="traced" data-run="{escape(number.run_id)}" data-{number.source}="{escape(number.metric)}"{step} '
        f'data-value="{number.value!r}" title="{escape(title)}">{escape(number.text)}</span>'
    )


def _heading(title: str) -> str:
    """A name of a metric may be broken between its words."""
    return re.sub(r"([/_])", r"\1<wbr>", escape(title))


_SOURCES = {
    "metric": "{} of",
    "param": "parameter {} of",
    "tag": "tag {} of",
    "sum": "sum of {} over the runs below",
    "count": "trials with status {} below",
}


def _cell(content: Content) -> str:
    if isinstance(content, Number):
        return f'<td class="number" data-sort="{content.value!r}">{markup(content)}</td>'
    return f"<td>{markup(content)}</td>"


def _tiles(tiles: Sequence[Tile]) -> str:
    found = [
        f"<div><dt>{escape(tile.label)}</dt><dd>{markup(tile.value)}</dd>"
        + (f'<dd class="quiet">{markup(tile.note)}</dd>' if tile.note else "")
        + "</div>"
        for tile in tiles
    ]
    return f'<dl class="tiles">{"".join(found)}</dl>' if found else ""


def _section(section: Section, anchor: str) -> str:
    figures = "\n".join(_figure(figure) for figure in section.figures)
    content = "\n".join(filter(None, (section.html, figures, section.details)))
    return (
        f'<section aria-labelledby="{anchor}">\n<h2 id="{anchor}">{escape(section.title)}</h2>\n{content}\n</section>'
    )


def _figure(figure: ReportFigure) -> str:
    name, label = escape(figure.name), escape(f"{figure.title}. {figure.caption}")
    if figure.plotly is None:
        content = f'<div class="still" role="img" aria-label="{label}">{figure_svg(figure)}</div>'
    else:
        height = figure.plotly["layout"].get("height", _HEIGHT)
        content = (
            f'<div class="plot" role="img" aria-label="{label}" style="height:{height}px" data-name="{name}">'
            f"<noscript>This figure needs JavaScript; it is in {name}.png, too.</noscript></div>"
            f'<script type="application/json">{_json(figure.plotly)}</script>'
        )
    return (
        f'<figure id="figure-{name}">\n<h3>{escape(figure.title)}</h3>\n{content}\n'
        f"<figcaption>{escape(figure.caption)}</figcaption>\n</figure>"
    )


def _anchors(titles: Sequence[str]) -> list[str]:
    found: list[str] = []
    for title in titles:
        base = re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-") or "section"
        taken = sum(anchor == base or anchor.startswith(f"{base}--") for anchor in found)
        found.append(f"{base}--{taken + 1}" if taken else base)
    return found


def _json(values: Any) -> str:
    """JSON that can stand in a script element; a number that is not finite is a gap."""
    text = json.dumps(_finite(values), separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c")


def _finite(values: Any) -> Any:
    if isinstance(values, float):
        return values if math.isfinite(values) else None
    if isinstance(values, Mapping):
        return {key: _finite(value) for key, value in values.items()}
    return [_finite(value) for value in values] if isinstance(values, list | tuple) else values


# ----------------------------------------------------------------------------------------------- what every page has


def _policy(scripts: Iterable[str]) -> str:
    hashes = (base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts)
    allowed = " ".join(f"'sha256-{digest}'" for digest in hashes)
    return (
        f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data: blob:; "
        "base-uri 'none'; form-action 'none'"
    )


def _palette() -> str:
    """The colours as variables: light, and dark where the system or the reader wants it, but never on paper."""
    light = "".join(f"{name}:{colour.light};" for name, colour in PALETTE.items())
    dark = "".join(f"{name}:{colour.dark};" for name, colour in PALETTE.items())
    return (
        f":root{{color-scheme:light;{light}}}\n"
        f"@media screen and (prefers-color-scheme:dark){{:root:not([data-theme=light]){{color-scheme:dark;{dark}}}}}\n"
        f"@media screen{{:root[data-theme=dark]{{color-scheme:dark;{dark}}}}}\n"
    )


@cache
def _read(name: str) -> str:
    return (_HERE / name).read_text(encoding="utf-8")


@cache
def _plotly() -> str:
    """plotly.js, which the package plotly brings. The package itself is not imported: that takes half a second."""
    spec = importlib.util.find_spec("plotly")
    assert spec is not None and spec.origin is not None
    return (Path(spec.origin).parent / "package_data" / "plotly.min.js").read_text(encoding="utf-8")


@cache
def _packed_plotly() -> str:
    packed = base64.b64encode(gzip.compress(_plotly().encode(), mtime=0)).decode()
    return f'<script type="application/octet-stream" id="plotly">{packed}</script>'
