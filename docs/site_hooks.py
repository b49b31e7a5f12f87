"""What the site needs beside the pages: figures of committed results, and anchors of headings that stand twice."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent.parent / "benchmarks" / "results"


def on_files(files: Any, config: Any) -> Any:
    """The figures, which lie outside of the pages' directory."""
    from mkdocs.structure.files import File

    for figure in sorted(RESULTS.glob("*.svg")):
        files.append(File.generated(config, f"figures/{figure.name}", abs_src_path=str(figure)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links as the site has them: GitHub numbers a repeated heading `name-1`, Python-Markdown `name_1`."""
    markdown = markdown.replace("(../benchmarks/results/", "(figures/")
    return re.sub(r"\(#([a-z0-9-]+)-(\d)\)", r"(#\1_\2)", markdown) if page.file.src_path == "methods.md" else markdown
