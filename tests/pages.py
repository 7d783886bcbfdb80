"""The README and the pages of docs/: their blocks of Python, links and headings."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
NOT_RUN = "<!-- not run -->"
FENCED = re.compile(r"^( *)```.*?^\1```$", re.S | re.M)


def blocks(page: Path) -> list[str]:
    """The blocks of Python that a page says it runs."""
    text = page.read_text()
    found = re.finditer(r"```python\n(.*?)```", text, re.S)
    return [each[1] for each in found if not text[: each.start()].rstrip().endswith(NOT_RUN)]


def execute(code: str, names: dict[str, Any], page: Path) -> dict[str, Any]:
    """Run a block; returns the names that it and those before it leave behind."""
    exec(compile(code, page.name, "exec"), names)
    return names


def links(page: Path) -> list[str]:
    """What a page refers to, by links and images."""
    text = re.sub(r"`[^`\n]*`", "", FENCED.sub("", page.read_text()))
    return re.findall(r"\]\(([^)\s]+)\)", text)


def anchors(page: Path, renderer: str) -> list[str]:
    """The headings of a page, as "github" or "mkdocs" name them in links."""
    found: list[str] = []
    for title in re.findall(r"^#+ (.*)$", FENCED.sub("", page.read_text()), re.M):
        plain = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", title).replace("`", "").strip().lower()
        slug = re.sub(r"[^\w\s-]", "", plain)
        slug = slug.replace(" ", "-") if renderer == "github" else re.sub(r"[-\s]+", "-", slug).strip("-")
        joint = "-" if renderer == "github" else "_"
        taken = {slug, *(f"{slug}{joint}{n}" for n in range(1, 99))} & set(found)
        found.append(f"{slug}{joint}{len(taken)}" if taken else slug)
    return found
