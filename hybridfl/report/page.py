"""The page: one HTML file with its style, script and data inside."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from typing import Any

SCRIPTS = ("dom.js", "charts.js", "results.js", "participants.js", "runs.js", "script.js")


def page(content: Mapping[str, Any]) -> str:
    """The page that shows ``content``, see :func:`hybridfl.report.content.content`.

    Texts reach the document as text only: nothing in a name is read as markup.
    """
    inserted = {
        "title": html.escape(str(content["title"]).encode("utf-8", "replace").decode()),
        "style": _file("style.css"),
        "data": as_script(content),
        "script": "\n".join(_file(name) for name in SCRIPTS),
    }
    # In one pass, as what is inserted may itself look like a place to insert something.
    return re.sub(r"\{\{(\w+)\}\}", lambda found: inserted[found[1]], _file("page.html"))


def as_script(content: Mapping[str, Any]) -> str:
    """JSON in ASCII that no HTML parser takes for the end of the element it stands in."""
    text = json.dumps(content, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


@cache
def _file(name: str) -> str:
    return files(__package__).joinpath(name).read_text(encoding="utf-8")
