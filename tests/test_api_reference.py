"""The reference is made from the docstrings, so each public name has one, with an example or the way to one."""

from __future__ import annotations

import importlib.metadata
import inspect
import re
import tomllib
from pathlib import Path

import pytest

import structprune

REFERENCE = re.compile(r"See `structprune\.(\w+)` for an example\.")


def documented(name: str) -> str:
    return inspect.getdoc(vars(structprune)[name]) or ""


def has_example(doc: str) -> bool:
    """One that runs as a doctest, or the form in which a decorator or a class is used."""
    return ">>> " in doc or re.search(r"^Example::\n\n    ", doc, re.MULTILINE) is not None


@pytest.mark.parametrize("name", structprune.__all__)
def test_every_public_name_has_an_example_or_says_where_one_is(name: str) -> None:
    doc = documented(name)
    assert len(doc) > 40
    reference = REFERENCE.search(doc)
    if reference is not None:
        assert reference[1] in structprune.__all__
        doc = documented(reference[1])
    assert has_example(doc)


@pytest.mark.parametrize("name", structprune.__all__)
def test_every_public_argument_and_method_is_described(name: str) -> None:
    thing = vars(structprune)[name]
    doc = documented(name)
    if inspect.isclass(thing):
        for method, value in vars(thing).items():
            if not method.startswith("_") and (callable(value) or isinstance(value, (property, classmethod))):
                assert inspect.getdoc(getattr(thing, method)), f"{name}.{method} has no docstring"
    given = [p for p in inspect.signature(thing).parameters.values() if not p.name.startswith("_")]
    for parameter in given:
        assert re.search(rf"^\s*{parameter.name}: \S", doc, re.MULTILINE), f"{name} does not describe {parameter.name}"


def test_public_names_are_sorted_and_there() -> None:
    assert sorted(structprune.__all__) == structprune.__all__
    assert set(structprune.__all__) <= vars(structprune).keys()


def test_the_version_is_written_once() -> None:
    project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())
    assert "version" not in project["project"]
    assert project["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "structprune.__version__"}
    assert re.fullmatch(r"\d+\.\d+\.\d+", structprune.__version__)
    assert importlib.metadata.version("structprune") == structprune.__version__
