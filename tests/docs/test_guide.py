"""The manual: a short README, pages that all can be reached, links that lead somewhere, and the same on the server."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from markdown_it import MarkdownIt

from modelyard.docs import guide
from tests.failure_codes import failure_codes
from tests.manual import ROOT, TEXTS
from tests.server import Answer, Server, serving

#: Made of parts, so that no search finds them: trainer/stall_watch.py.
BUILT_CODES = {"template_stalled", "tokenizer_stalled"}
KEY = "a-key-of-the-manual"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(tmp_path_factory.mktemp("guide") / "data") as server:
        yield server


class Page(HTMLParser):
    """A served page: its links, ids and tags."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.ids: list[str] = []
        self.tags: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note a tag."""
        found = dict(attrs)
        self.tags.add(tag)
        self.links += [found[name] or "" for name in ("href", "src") if name in found]
        self.ids += [found["id"] or ""] if "id" in found else []


def links(file: str) -> list[str]:
    """Return where a file's Markdown links to."""
    tokens = MarkdownIt("commonmark").enable("table").parse(TEXTS[file])
    return [str(part.attrs["href"]) for token in tokens for part in token.children or () if part.type == "link_open"]


def anchors(file: str) -> set[str]:
    """Return the anchors of a file's headings, as code hosts make them."""
    text = re.sub(r"^```.*?^```$", "", TEXTS[file], flags=re.MULTILINE | re.DOTALL)
    return {guide.slug(heading) for heading in re.findall(r"^#+ (.+)$", text, re.MULTILINE)}


# The files.


def test_the_readme_is_short() -> None:
    assert len(TEXTS["README.md"].splitlines()) <= 150


def test_every_file_of_the_manual_is_a_page() -> None:
    files = {f"docs/{path.name}" for path in (ROOT / "docs").iterdir()}
    assert files | {"README.md", "CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/RESULTS.md"} == set(TEXTS)


def test_every_page_is_reached_from_the_readme() -> None:
    reached, left = {"README.md"}, ["README.md"]
    while left:
        file = left.pop()
        for link in links(file):
            target = (ROOT / file).parent.joinpath(link.partition("#")[0]).resolve()
            name = str(target.relative_to(ROOT)) if target.is_relative_to(ROOT) else ""
            if name in TEXTS and name not in reached:
                reached.add(name)
                left.append(name)
    assert reached == set(TEXTS)


@pytest.mark.parametrize("file", list(TEXTS))
def test_every_link_leads_to_a_file_and_a_heading_that_are_there(file: str) -> None:
    for link in links(file):
        if re.match("https?:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (ROOT / file).parent.joinpath(path).resolve() if path else ROOT / file
        assert target.is_file(), link
        if anchor:
            assert anchor in anchors(str(target.relative_to(ROOT))), link


@pytest.mark.parametrize("file", list(TEXTS))
def test_a_page_has_one_title_and_tables_of_whole_rows(file: str) -> None:
    text = re.sub(r"^ *```.*?^ *```$", "", TEXTS[file], flags=re.MULTILINE | re.DOTALL)
    assert len(re.findall(r"^# ", text, re.MULTILINE)) == 1
    for rows in re.findall(r"(?:^\|.*\n)+", text + "\n", re.MULTILINE):
        widths = {len(re.findall(r"(?<!\\)\|", row)) for row in rows.splitlines()}
        assert len(widths) == 1, rows.splitlines()[0]


def test_the_page_of_failure_codes_has_every_code_and_no_other() -> None:
    told = set(re.findall(r"^\| `(\w+)` \|", TEXTS["docs/failure-codes.md"], re.MULTILINE))
    known = failure_codes(ROOT / "src" / "modelyard")
    assert {"gated_repository", "unsupported_adapter", "no_process", "engine_killed", "trainer_died"} <= known
    assert told == known | BUILT_CODES


def test_the_failure_codes_of_the_tree_of_errors_have_their_status() -> None:
    tree = re.findall(
        r"^[ │├└─]*\w+ +(\d{3}) (\w+)", (ROOT / "src/modelyard/errors.py").read_text("utf-8"), re.MULTILINE
    )
    assert len(tree) > 40
    rows = re.findall(r"^\| `(\w+)` \| ([^|]+) \|", TEXTS["docs/failure-codes.md"], re.MULTILINE)
    for status, code in tree:
        assert any(status in where for name, where in rows if name == code), code


def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))


def test_the_rooms_are_listed_in_the_order_of_imports() -> None:
    block = re.search(r"## Rooms\n.*?```text\n(.*?)```", TEXTS["docs/architecture.md"], re.DOTALL)
    assert block is not None
    listed = [re.split(" {2,}", line)[0] for line in block[1].splitlines()]
    contracts = project()["tool"]["importlinter"]["contracts"]
    assert listed == next(one["layers"] for one in contracts if one["name"] == "Imports point down")


# Packages.


def test_the_wheel_and_the_image_carry_every_page() -> None:
    included = project()["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"]
    dockerfile = (ROOT / "Dockerfile").read_text("utf-8")
    copied = [
        word for line in re.findall(r"^COPY (?!--from)(.+)$", dockerfile, re.MULTILINE) for word in line.split()[:-1]
    ]
    for file in TEXTS:
        [carried] = [name for name in included if file == name or file.startswith(f"{name}/")]
        assert included[carried] == f"modelyard/_guide/{carried}"
        assert any(file == name or file.startswith(f"{name}/") for name in copied), file


# The server.


@pytest.fixture(scope="module")
def pages(server: Server) -> dict[str, Answer]:
    """Return what every page's address, and the style sheet's, answers."""
    return {path: server.get(path) for path in (*map(guide.address, guide.PAGES), guide.STYLE_PATH)}


@pytest.mark.parametrize("name", list(guide.PAGES))
def test_a_page_is_served_and_all_that_it_names_is_there(pages: dict[str, Answer], name: str) -> None:
    answer = pages[guide.address(name)]
    assert (answer.status, answer.headers["content-type"]) == (200, "text/html; charset=utf-8")
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    page = Page(answer.text)
    assert not page.tags & {"script", "img", "iframe", "form", "object"}
    assert len(page.ids) == len(set(page.ids)), "an anchor twice"
    assert set(map(guide.address, guide.PAGES)) <= set(page.links), "the navigation"
    for link in set(page.links) - {"data:,"}:
        if re.match("https?:", link):
            assert f'href="{link}" rel="noreferrer"' in answer.text
            continue
        path, _, anchor = link.partition("#")
        assert pages[path].status == 200, link
        assert not anchor or anchor in Page(pages[path].text).ids, link


def test_the_style_sheet_is_one(pages: dict[str, Answer]) -> None:
    assert pages[guide.STYLE_PATH].headers["content-type"] == "text/css; charset=utf-8"


def test_a_page_answers_with_and_without_its_slash(server: Server) -> None:
    for path in ("/api/docs/guide", "/api/docs/guide/", "/api/docs/guide/settings", "/api/docs/guide/settings/"):
        assert server.get(path).status == 200
        assert server.request("HEAD", path).status == 200


@pytest.mark.parametrize(
    "path",
    ["no", "README.md", "docs/settings.md", "settings.md", "..", "../../../etc/passwd", "%2e%2e/pyproject.toml",
     "settings%2f..%2f..%2fpyproject.toml", "docs//settings.md", "%00", "style.css/x"],
)  # fmt: skip
def test_no_other_name_is_a_page(server: Server, path: str) -> None:
    answer = server.get(guide.BASE + path)
    assert (answer.status, answer.error_code) == (404, "no_such_path")


def test_the_pages_want_the_key_where_there_is_one(tmp_path: Path) -> None:
    with serving(tmp_path / "data", MODELYARD_ADMIN_KEY=KEY) as server:
        for path in (guide.address(""), guide.address("settings"), guide.STYLE_PATH):
            assert server.get(path).status == 401
            assert server.get(path, {"X-API-KEY": KEY}).status == 200


# The rendering.


@pytest.fixture
def shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return how the Markdown of a page `docs/models.md` is rendered."""
    monkeypatch.setattr(guide, "folder", lambda: tmp_path)
    (tmp_path / "docs").mkdir()

    def render(markdown: str) -> str:
        (tmp_path / "docs/models.md").write_text(markdown, "utf-8")
        tokens = guide.parsed("docs/models.md")
        markdown_it = guide._markdown()
        return str(markdown_it.renderer.render(tokens, markdown_it.options, {}))

    return render


def test_html_and_scripts_in_markdown_are_text(shown: Any) -> None:
    text = shown("# A\n\n<script>alert(1)</script> <b>b</b> [x](javascript:alert(1))\n")
    assert "<script" not in text
    assert "<b>" not in text
    assert "href" not in text


@pytest.mark.parametrize(("link", "expected"), [
    ("settings.md#bounds", '<a href="/api/docs/guide/settings#bounds">x</a>'),
    ("../README.md", '<a href="/api/docs/guide/">x</a>'),
    ("#here", '<a href="/api/docs/guide/models#here">x</a>'),
    ("../.env.example", "<span>x</span>"),
    ("../../etc/passwd", "<span>x</span>"),
    ("https://example.org/a.md", '<a href="https://example.org/a.md" rel="noreferrer">x</a>'),
])  # fmt: skip
def test_links_between_files_become_links_between_pages(shown: Any, link: str, expected: str) -> None:
    assert shown(f"[x]({link})\n") == f"<p>{expected}</p>\n"


def test_headings_of_one_name_have_anchors_of_their_own(shown: Any) -> None:
    text = shown("## What's `new`?\n\n## What's `new`?\n")
    assert '<h2 id="whats-new">' in text
    assert '<h2 id="whats-new-1">' in text
