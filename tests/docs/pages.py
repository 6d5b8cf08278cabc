"""The pages of the documentation and what tests read off them: fenced blocks with their lines, links, headings."""

import re
from pathlib import Path
from typing import NamedTuple

__all__ = ["PAGES", "ROOT", "Block", "anchors", "blocks", "links"]

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]

FENCE = re.compile(
    r"(?:<!-- (?P<comment>[^\n]*) -->\n)?```(?P<language>\w+)\n(?P<text>.*?)^```$", re.DOTALL | re.MULTILINE
)
LINK = re.compile(r"\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)


class Block(NamedTuple):
    """A fenced block of a page: its language, text, the line of the page that it starts at, and a comment before it."""

    language: str
    text: str
    line: int
    comment: str


def blocks(page: Path, language: str) -> list[Block]:
    """Return the fenced blocks of a language in a page's order."""
    text = page.read_text()
    found = []
    for fence in FENCE.finditer(text):
        if fence["language"] == language:
            line = text.count("\n", 0, fence.start("text")) + 1
            found.append(Block(language, fence["text"], line, fence["comment"] or ""))
    return found


def links(page: Path) -> list[str]:
    """Return what a page links to, outside of its fenced blocks."""
    return LINK.findall(FENCE.sub("", page.read_text()))


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as the site and GitHub make them."""
    headings = HEADING.findall(FENCE.sub("", page.read_text()))
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}
