"""The text that the demo model learns: HTML pages that Sphinx wrote, as Markdown documents.

Knows Sphinx's markup (sections, signatures, code blocks) and nothing of tokens or training.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import NamedTuple

VOID = {"area", "base", "br", "col", "hr", "img", "input", "link", "meta", "source", "wbr"}
SKIPPED = {"script", "style", "nav", "svg", "button", "form", "footer", "header", "table", "math"}
SKIPPED_CLASSES = {"headerlink", "viewcode-link", "toctree-wrapper", "linenos", "copybutton"}
SKIPPED_CLASSES |= {"contents", "sphinxsidebar", "audit-hook", "breadcrumbs", "linenodiv"}
BLOCKS = {"p", "li", "dt", "dd", "div", "section", "blockquote", "h1", "h2", "h3", "h4", "h5", "h6"}
MARKS = {"code": "`", "tt": "`", "em": "*", "i": "*", "strong": "**", "b": "**"}
PLAIN = str.maketrans(
    {"\u201c": '"', "\u201d": '"', "\u2018": "'", "\u2019": "'", "\u2026": "...", "\xa0": " "}
)
WORTHLESS_PAGES = re.compile(
    r"genindex|search|modindex|_modules|changelog|/license|copyright|/bugs"
)
QUESTIONS = (
    "What does `{}` do?",
    "What is `{}`?",
    "Explain `{}`.",
    "How do I use `{}`?",
    "Tell me about `{}`.",
)


class Document(NamedTuple):
    """kind: "page" for a section of a page, "chat" for a question and its answer."""

    source: str
    kind: str
    question: str
    text: str


class Block(NamedTuple):
    kind: str  # a tag: h1 to h6, dt, pre, li, p
    text: str
    name: str = ""  # of a dt that signs an object: its dotted name


class SphinxPage(HTMLParser):
    """Collects the blocks of the part of a page that Sphinx marks as its body."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks: list[Block] = []
        self.text: list[str] = []
        self.kind, self.name = "p", ""
        self.stack: list[tuple[str, bool, bool]] = []  # tag, in the body, skipped

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in VOID:
            self.text.append(" " if tag == "br" else "")
            return
        named = dict(attrs)
        classes = set((named.get("class") or "").split())
        _, inside, skipped = self.stack[-1] if self.stack else ("", False, False)
        inside = inside or named.get("role") == "main" or bool(classes & {"section", "body"})
        skipped = skipped or tag in SKIPPED or bool(classes & SKIPPED_CLASSES)
        if tag in BLOCKS | {"pre"}:
            self.flush()
            self.kind = tag
            self.name = (named.get("id") or "") if tag == "dt" and "sig" in classes else ""
        elif inside and not skipped and self.kind not in ("pre", "dt"):
            self.text.append(MARKS.get(tag, ""))
        self.stack.append((tag, inside, skipped))

    def handle_endtag(self, tag: str) -> None:
        if tag in VOID or tag not in (entry[0] for entry in self.stack):
            return
        if tag in BLOCKS | {"pre"}:
            self.flush()
            self.kind = "p"
        elif self.taken() and self.kind not in ("pre", "dt"):
            self.text.append(MARKS.get(tag, ""))
        while self.stack.pop()[0] != tag:
            pass

    def handle_data(self, data: str) -> None:
        if self.taken():
            self.text.append(data)

    def taken(self) -> bool:
        return bool(self.stack) and self.stack[-1][1] and not self.stack[-1][2]

    def flush(self) -> None:
        text = "".join(self.text).translate(PLAIN)
        text = text.strip("\n") if self.kind == "pre" else " ".join(text.split())
        if text.strip() and text not in ("``", "**", "****"):
            self.blocks.append(Block(self.kind, text, self.name))
        self.text = []


def markdown(block: Block) -> str:
    if block.kind == "pre":
        return f"```\n{block.text.rstrip()}\n```"
    if block.kind == "li":
        return f"* {block.text}"
    if block.kind == "dt":
        return f"#### `{block.text}`" if block.name else f"*{block.text}*"
    if block.kind[0] == "h":
        return f"{'#' * int(block.kind[1])} {block.text.replace('`', '')}"
    return block.text


def sections(blocks: list[Block]) -> Iterator[list[Block]]:
    """The page cut at every h1 and h2; each later piece begins with the page's title again."""
    title = next((block for block in blocks if block.kind == "h1"), None)
    piece: list[Block] = []
    for block in blocks:
        if block.kind in ("h1", "h2"):
            yield piece
            piece = [title] if title and block.kind == "h2" else []
        piece.append(block)
    yield piece


def answers(blocks: list[Block]) -> Iterator[tuple[str, str]]:
    """(question, answer) for every signed object: its signature and what is said first."""
    for place, block in enumerate(blocks):
        if "." not in block.name or block.name.startswith("c."):
            continue
        said = []
        for later in blocks[place + 1 :]:
            if later.kind == "dt" or later.kind[0] == "h" or sum(map(len, said)) > 500:
                break
            said.append(markdown(later))
        text = "\n\n".join(said)
        if 40 < len(text) < 1400:
            asked = block.name + ("()" if "(" in block.text else "")
            # A question by the name's length: fixed, and spread over the five.
            question = QUESTIONS[sum(block.name.encode()) % len(QUESTIONS)].format(asked)
            yield question, f"`{block.text}`\n\n{text}"


def page_blocks(path: Path) -> list[Block]:
    page = SphinxPage()
    page.feed(path.read_text(errors="replace"))
    page.close()
    return page.blocks


def documents(folder: Path, chat: bool) -> Iterator[Document]:
    """Every page under folder as sections, and with chat its objects as questions, in order."""
    for path in sorted(folder.rglob("*.html")):
        source = path.relative_to(folder).as_posix()
        if WORTHLESS_PAGES.search("/" + source) or path.is_symlink():
            continue
        blocks = page_blocks(path)
        for piece in sections(blocks):
            text = "\n\n".join(map(markdown, piece)).strip()
            if len(text) > 200:
                yield Document(source, "page", "", text)
        if chat:
            for question, answer in answers(blocks):
                yield Document(source, "chat", question, answer)
