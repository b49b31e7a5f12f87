"""The documentation as a site: every page is in its contents, and nothing in it is fetched from elsewhere."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parent.parent
SITE = yaml.safe_load((ROOT / "mkdocs.yml").read_text())


def pages(nav: Any) -> list[str]:
    """The files that a part of the contents names."""
    if isinstance(nav, str):
        return [nav]
    return [page for part in (nav.values() if isinstance(nav, dict) else nav) for page in pages(part)]


def test_every_page_is_in_the_contents_once() -> None:
    there = sorted(str(page.relative_to(ROOT / "docs")) for page in (ROOT / "docs").rglob("*.md"))
    assert sorted(pages(SITE["nav"])) == there


def test_nothing_is_asked_of_others() -> None:
    assert SITE["theme"]["font"] is False and SITE["plugins"] == ["search"] and SITE["strict"] is True
    assert not any("://" in file for file in [*SITE["extra_css"], *SITE.get("extra_javascript", [])])


@pytest.mark.skipif(importlib.util.find_spec("mkdocs") is None, reason="mkdocs is not installed (extra: docs)")
def test_it_is_built_and_loads_its_own_files_alone(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = [page for page in tmp_path.rglob("*.html") if page.name != "404.html"]
    assert len(found) == len(pages(SITE["nav"]))
    for page in found:
        loaded = re.findall(r"<(?:script|img|link|iframe)[^>]*(?:src|href)=[\"']?([^\"' >]+)", page.read_text())
        assert not [place for place in loaded if place.startswith(("http", "//"))], page
