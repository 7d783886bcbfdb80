"""A hook of mkdocs: the figures of the pages lie in benchmarks/results, beside the rows that they are made from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

RESULTS = Path(__file__).parent.parent / "benchmarks" / "results"


def on_files(files: Files, *, config: Any) -> Files:
    """Add every figure to the site."""
    for figure in sorted(RESULTS.glob("*.png")):
        files.append(File.generated(config, f"figures/{figure.name}", abs_src_path=str(figure)))
    return files


def on_page_markdown(markdown: str, **rest: Any) -> str:
    """What is a path in the repository becomes one in the site."""
    return markdown.replace("](../benchmarks/results/", "](figures/")
