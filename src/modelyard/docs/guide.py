"""The manual as web pages, rendered from the Markdown files that are read on a code host.

`PAGES` is the whole list: a page has a name there, which is the end of its address, and a file. Links between the files
become links between the pages; a link to a file that is no page becomes plain text. HTML in the Markdown is shown as
text, and no page has a script.
"""

from __future__ import annotations

import functools
import html
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from markdown_it import MarkdownIt
    from markdown_it.token import Token

BASE = "/api/docs/guide/"
STYLE_PATH = f"{BASE}style.css"
#: Each page's name and file, in the order in which a reader meets them.
PAGES = {
    "": "README.md",
    "models": "docs/models.md",
    "deploying": "docs/deploying.md",
    "datasets": "docs/datasets.md",
    "fine-tuning": "docs/fine-tuning.md",
    "families": "docs/families.md",
    "clients": "docs/clients.md",
    "raw-prompts": "docs/raw-prompts.md",
    "rest": "docs/rest.md",
    "settings": "docs/settings.md",
    "operating": "docs/operating.md",
    "security": "docs/security.md",
    "failure-codes": "docs/failure-codes.md",
    "architecture": "docs/architecture.md",
    "adding-a-room": "docs/adding-a-room.md",
    "contributing": "CONTRIBUTING.md",
    "changelog": "CHANGELOG.md",
    "results": "benchmarks/RESULTS.md",
}
_NAMES = {file: name for name, file in PAGES.items()}
STYLE = """body { margin: 0 auto; max-width: 62rem; padding: 1rem; font: 1rem/1.5 system-ui, sans-serif; }
nav { border-bottom: 1px solid #8888; padding-bottom: .5rem; } nav a { margin-right: .8rem; white-space: nowrap; }
nav a[aria-current] { font-weight: bold; text-decoration: none; color: inherit; }
pre { overflow-x: auto; padding: .8rem; background: #8881; } code { font: .9em ui-monospace, monospace; }
table { display: block; overflow-x: auto; border-collapse: collapse; }
th, td { border: 1px solid #8886; padding: .25rem .5rem; text-align: left; vertical-align: top; }
.right { text-align: right; }
:root { color-scheme: light dark; }
"""
FRAME = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<link rel="stylesheet" href="{style}">
<link rel="icon" href="data:,">
</head>
<body>
<nav>
{navigation}
</nav>
<main>
{content}</main>
</body>
</html>
"""


def address(name: str) -> str:
    """Return the path at which a page is served."""
    return BASE + name


def folder() -> Path:
    """Return where the pages' files lie: at the top of a checkout, or inside the package once installed."""
    installed = Path(__file__).parents[1] / "_guide"
    return installed if installed.is_dir() else Path(__file__).parents[3]


@functools.cache
def page(name: str) -> str:
    """Return a page as HTML. `name` is one of `PAGES`: no other has a route."""
    tokens = parsed(PAGES[name])
    markdown = _markdown()
    content = markdown.renderer.render(tokens, markdown.options, {})
    navigation = "\n".join(
        f'<a href="{address(other)}"{" aria-current=page" if other == name else ""}>{html.escape(title(other))}</a>'
        for other in PAGES
    )
    return FRAME.format(title=html.escape(title(name)), style=STYLE_PATH, navigation=navigation, content=content)


@functools.cache
def title(name: str) -> str:
    """Return a page's first heading."""
    found = re.search(r"^# (.+)$", (folder() / PAGES[name]).read_text("utf-8"), re.MULTILINE)
    return found[1] if found else name


def parsed(file: str) -> list[Token]:
    """Return the Markdown of a page's file, its headings with ids and its links as they are on the server."""
    tokens = _markdown().parse((folder() / file).read_text("utf-8"))
    seen: dict[str, int] = {}
    for number, token in enumerate(tokens):
        if token.type == "heading_open":
            token.attrSet("id", _unique(slug(tokens[number + 1].content), seen))
        elif token.type in ("th_open", "td_open") and "right" in str(token.attrs.pop("style", "")):
            token.attrSet("class", "right")
        for link in _links(token.children or []):
            _point(link, file)
    return tokens


def slug(heading: str) -> str:
    """Return the anchor of a heading's Markdown, as code hosts make it: small letters, hyphens, no punctuation."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def _unique(anchor: str, seen: dict[str, int]) -> str:
    count = seen.get(anchor, 0)
    seen[anchor] = count + 1
    return f"{anchor}-{count}" if count else anchor


def _links(tokens: list[Token]) -> Iterator[tuple[Token, Token]]:
    """Yield the opening and closing token of each link; links do not nest."""
    opening: Token | None = None
    for token in tokens:
        if token.type == "link_open":
            opening = token
        elif token.type == "link_close" and opening is not None:
            yield opening, token
            opening = None


def _point(link: tuple[Token, Token], file: str) -> None:
    opening, closing = link
    target, _, anchor = str(opening.attrs["href"]).partition("#")
    if re.match(r"\A[a-z]+:", target):
        opening.attrSet("rel", "noreferrer")
        return
    where = posixpath.normpath(posixpath.join(posixpath.dirname(file), target)) if target else file
    if where in _NAMES:
        opening.attrSet("href", address(_NAMES[where]) + (f"#{anchor}" if anchor else ""))
        return
    opening.tag = closing.tag = "span"
    opening.attrs.clear()


@functools.cache
def _markdown() -> MarkdownIt:
    # Imported when the first page is asked for: a start of the server need not wait for it.
    from markdown_it import MarkdownIt

    return MarkdownIt("commonmark", {"html": False}).enable("table")
