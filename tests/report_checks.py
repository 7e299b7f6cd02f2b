"""What must hold of every page: well-formed, self-contained, safe, with figures that are described."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser


class Nesting(HTMLParser):
    """Fails on a tag that is closed in the wrong place; collects tags, attributes and text."""

    VOID = ("meta", "br", "link", "img", "input", "hr")

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text: list[str] = []
        self.feed(html)
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def check_page(html: str) -> Nesting:
    """Nothing is fetched, nothing runs, and links within the page find their ends."""
    nesting = Nesting(html)
    assert not {"script", "iframe", "object", "embed", "link", "img", "base", "form"} & set(nesting.tags)
    assert not [name for name, _ in nesting.attributes if name.startswith("on") or name in ("src", "srcset", "action")]
    assert all(value and value.startswith("#") for name, value in nesting.attributes if name in ("href", "xlink:href"))
    assert not re.search(r"url\(|@import|https?://", html)
    ids = [value for name, value in nesting.attributes if name == "id"]
    targets = [value[1:] for name, value in nesting.attributes if name == "href" and value]
    assert len(ids) == len(set(ids))
    assert set(targets) <= set(ids)
    return nesting


def check_figures(html: str) -> list[str]:
    """Every figure is well-formed and says what it shows."""
    pictures = [svg for svg in re.findall(r"<svg.*?</svg>", html, re.DOTALL) if "aria-hidden" not in svg]
    for svg in pictures:
        root = ElementTree.fromstring(svg)
        assert root.attrib["role"] == "img"
        assert root.attrib["aria-label"]
        assert root.find("title") is not None
        assert "nan" not in svg
        assert "None" not in svg
    return pictures
