"""A hook of mkdocs: links from a page to files outside of docs/, which the site does not have, become their names."""

import re
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parents[1] / "docs"


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Called by mkdocs with the text of each page."""
    folder = DOCS / Path(page.file.src_uri).parent

    def keep(link: re.Match[str]) -> str:
        target = link[2].partition("#")[0]
        inside = "://" in target or not target or (folder / target).resolve().is_relative_to(DOCS)
        return link[0] if inside else link[1]

    return re.sub(r"(?<!!)\[([^\]]*)\]\(([^)\s]+)\)", keep, markdown)
