"""The HTML page: one file, no request to anywhere. Template, style and script are the files in assets/."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

import numpy as np

from ta_opd.report.style import Picture, sentence

ASSETS = Path(__file__).with_name("assets")
SECTIONS = (
    ("verdict", "Result"), ("training", "Over training"), ("tokens", "Kept tokens"), ("heatmap", "Token by token"),
    ("contexts", "Frozen contexts"), ("time", "Time"), ("reading", "How to read this"),
)  # fmt: skip


def render(*, pictures: Mapping[str, Picture], heat: dict | None, **content) -> str:
    """The page's text. pictures by name; heat: what `heatmap.build` made; content: the template's other variables."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(loader=FileSystemLoader(ASSETS), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.globals["figure"] = lambda name: _figure(pictures.get(name))
    template = environment.get_template("page.html.j2")
    return template.render(
        css=(ASSETS / "report.css").read_text(),
        js=(ASSETS / "report.js").read_text().replace("/*PALETTES*/{}", json.dumps(palettes())),
        heat_json=script_json(heat) if heat else "",
        has_heatmap=bool(heat and heat["blocks"]),
        sections=SECTIONS,
        **content,
    )


def _figure(picture: Picture | None):
    from markupsafe import Markup

    if picture is None:
        return ""
    return Markup(
        f'<figure id="figure-{picture.name}"><h3>{escape(picture.title)}</h3>{picture.svg}'
        f"<figcaption>{escape(sentence(picture.caption))}</figcaption></figure>"
    )


def script_json(value: object) -> str:
    """JSON that may stand inside a script element: no character ends the element or starts a comment."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def palettes(stops: int = 33) -> dict[str, list[list[int]]]:
    """Colour stops (0 to 255) of the scales of the heat map; `signed` runs from orange over white to purple."""
    from matplotlib import colormaps

    names = {"cividis": "cividis", "viridis": "viridis", "signed": "PuOr_r"}
    return {key: (colormaps[name](np.linspace(0, 1, stops))[:, :3] * 255).round().astype(int).tolist() for key, name in names.items()}


def swatch_rows(table, colors: Sequence[str], best: int | None) -> list[dict]:
    """Rows of the summary for the template; `value [low, high]` is split into value and interval."""
    rows = []
    for i, (row, color) in enumerate(zip(table.itertuples(index=False), colors, strict=True)):
        cells = [(value, f"[{rest}" if rest else "") for value, _, rest in (str(cell).partition(" [") for cell in row)]
        rows.append({"cells": cells, "color": color, "best": i == best})
    return rows
