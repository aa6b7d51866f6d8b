"""The one look of jaxmed's HTML pages: `write(path, template, **values)` fills a template of this folder into one file.

A page needs nothing beside itself: styles and scripts stand in it, pictures are PNG data URIs, and its content policy forbids
the browser to fetch anything. It follows the reader's light or dark setting (with a switch) and prints in light colours.
Every template extends base.jinja; all text is escaped. Pictures come as uint8 arrays [rows, columns].
"""

import base64
import io
import os
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from PIL import Image

FOLDER = Path(__file__).parent


def png(picture: np.ndarray) -> str:
    """A data URI of a picture uint8, grey [rows, columns] or RGB [rows, columns, 3]."""
    data = io.BytesIO()
    Image.fromarray(picture).save(data, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(data.getvalue()).decode("ascii")


def _score(value: float) -> str:
    return f"{value:.3f}"


def signed(value: float) -> str:
    """With a true minus sign, so that columns line up."""
    text = f"{value:+.3f}".replace("-", "−")
    return "0.000" if text[1:] == "0.000" else text


def share(value: float) -> str:
    """Two digits that matter: 0.4%, 12%; never 100% or 0% where that is not exactly so."""
    if 0 < value < 0.001:
        return "under 0.1%"
    if 0.995 <= value < 1:
        return "over 99%"
    return f"{100 * value:.1f}%" if 0 < value < 0.1 else f"{100 * value:.0f}%"


def _count(value: int) -> str:
    return f"{value:,}"


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(FOLDER),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"score": _score, "signed": signed, "percent": share, "count": _count}
    return environment


def render(template: str, **values: Any) -> str:
    """The page as text. Every template needs `title`; base.jinja says what else it takes."""
    style = (FOLDER / "page.css").read_text(encoding="utf-8")
    return _environment().get_template(template).render(style=style, **values)


def write(path: str | Path, template: str, **values: Any) -> None:
    """Writes the page whole or not at all."""
    path = Path(path)
    partial = path.with_name(path.name + ".part")
    partial.write_text(render(template, **values), encoding="utf-8")
    os.replace(partial, path)
