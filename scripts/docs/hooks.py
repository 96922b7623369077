"""What MkDocs does beside its own work: reference pages from the code, and links that only the repository can follow."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[2]
LINK = re.compile(r"\[([^\]]*)\]\(((?:\.\./)+[^)#\s]+)(?:#[^)]*)?\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Every page has its place: those that ``nav`` leaves out, and the reference."""
    for folder in (ROOT, Path(__file__).parent):
        if str(folder) not in sys.path:
            sys.path.insert(0, str(folder))
    import reference

    nav: list[Any] = list(config.nav or [])
    named = set(_paths(nav))
    rest = sorted(file.src_uri for file in files.documentation_pages() if file.src_uri not in named)
    pages = reference.pages()
    for path, text in pages.items():
        files.append(File.generated(config, path, content=text))
    config.nav = [*nav, *([{"More": rest}] if rest else []), {"Reference": list(pages)}]
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links to files of the repository that are no pages become plain text; what is not there stays a broken link."""
    here = Path(config.docs_dir, page.file.src_uri).parent

    def replaced(link: re.Match[str]) -> str:
        target = (here / link[2]).resolve()
        outside = not target.is_relative_to(Path(config.docs_dir).resolve())
        return link[1] if outside and target.exists() else link[0]

    return LINK.sub(replaced, markdown)


def _paths(nav: Any) -> Iterator[str]:
    for entry in nav.values() if isinstance(nav, dict) else nav:
        if isinstance(entry, str):
            yield entry
        else:
            yield from _paths(entry)
