"""The documentation's site: it builds without a warning, needs no network, and holds every page and every name."""

from __future__ import annotations

import importlib
import inspect
import os
import re
import runpy
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.browser import CHROMIUM, Browser

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
# What users import from; whatever these list as public has to be in the reference.
PUBLIC = [
    "structprune",
    "structprune.benchmarking",
    "structprune.errors",
    "structprune.importance",
    "structprune.reporting",
    "structprune.training",
]
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed to show the page in")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site as `make docs` builds it."""
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", folder],
        cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_every_page_is_built_and_nothing_comes_from_elsewhere(site: Path) -> None:
    for page in DOCS.rglob("*.md"):
        assert (site / page.relative_to(DOCS).with_suffix(".html")).is_file()
    assert not list(site.rglob("*.py"))
    for page in site.rglob("*.html"):
        text = page.read_text()
        assert not re.findall(r"<(?:script|img|iframe)[^>]*\ssrc=\"?https?:", text)
        assert not re.findall(r"<link[^>]*\srel=\"?(?:stylesheet|preconnect)[^>]*https?:", text)


def _pages(nav: Any) -> Iterator[str]:
    if isinstance(nav, str):
        yield nav
    else:
        for part in nav.values() if isinstance(nav, dict) else nav:
            yield from _pages(part)


def test_every_page_is_in_the_navigation() -> None:
    listed = list(_pages(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]))
    there = {page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md")}
    assert len(listed) == len(set(listed))
    assert there == set(listed), "each page of docs/ takes one line under nav: in mkdocs.yml"


def _object(path: str) -> Any:
    """What a dotted path names: the module is as much of it as can be imported and does not stand for another thing."""
    parts = path.split(".")
    for cut in range(len(parts) - 1, 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:cut]))
        except ModuleNotFoundError:
            continue
        for name in parts[cut:]:
            found = getattr(found, name)
        return found
    raise AssertionError(f"{path} names nothing")


def _entries() -> list[tuple[str, str]]:
    """Heading and identifier of every entry of the reference."""
    text = "".join(page.read_text() for page in sorted((DOCS / "reference").glob("*.md")))
    found = re.findall(r"^::: (\S+)\n    options:\n      heading: (\S+)\n      toc_label: (\S+)$", text, re.MULTILINE)
    assert len(found) == text.count("::: ")
    assert all(heading.rpartition(".")[2] == label for _, heading, label in found)
    return [(heading, identifier) for identifier, heading, _ in found]


def test_a_heading_of_the_reference_names_what_stands_below_it() -> None:
    for heading, identifier in _entries():
        assert _object(heading) is _object(identifier), heading


@pytest.mark.parametrize("module", PUBLIC)
def test_every_public_name_is_in_the_reference(module: str) -> None:
    described = [_object(identifier) for _, identifier in _entries()]
    there = importlib.import_module(module)
    names = getattr(there, "__all__", None) or [name for name, value in vars(there).items() if isinstance(value, type)]
    values = {name: getattr(there, name) for name in names}
    missing = [
        name
        for name, value in values.items()
        if not inspect.ismodule(value) and not any(value is one for one in described)
    ]
    assert not missing, f"{module}: {missing} need an entry in docs/reference/"


@needs_browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_site_is_read_and_searched_from_a_folder(site: Path, scheme: str) -> None:
    with Browser() as browser:
        browser.open(site / "index.html", scheme=scheme)
        _wait(lambda: browser.evaluate("document.body.getAttribute('data-md-color-scheme')"), _SCHEME[scheme])
        browser.evaluate("document.querySelector('[data-md-component=search-query]').focus()")
        for letter in "latency":
            browser.press(letter)
        meta = "(document.querySelector('.md-search-result__meta')?.textContent || '').trim()"
        _wait(lambda: bool(re.match(r"[1-9]\d* matching document", browser.evaluate(meta))), True)
        assert all(address.startswith(("file:", "data:")) for address in browser.requests)
        assert not browser.problems


_SCHEME = {"light": "default", "dark": "slate"}


def _wait(look: Callable[[], Any], for_what: Any) -> None:
    end = time.monotonic() + 60
    while (seen := look()) != for_what:
        assert time.monotonic() < end, f"{seen!r}, not {for_what!r}"
        time.sleep(0.1)


def test_pictures_are_what_the_script_draws() -> None:
    namespace = runpy.run_path(str(DOCS / "assets" / "draw.py"))
    drawn = {name: draw().svg() for name, draw in namespace["PICTURES"].items()}
    assert {file.stem: file.read_text() for file in (DOCS / "assets").glob("*.svg")} == drawn
