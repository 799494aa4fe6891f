"""What people get: wheel and sdist are built, hold what they should, and work where nothing else of the source is."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

import structprune

ROOT = Path(__file__).parent.parent
SOURCES = ("pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "constraints.txt", "structprune", "tests")
KINDS = (".py", ".css", ".js", "py.typed")


def ran(*command: object, cwd: Path) -> str:
    """What a command printed, in the environment of somebody who has no checkout."""
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME")}
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:] + done.stdout[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """The folder with both: the one named by STRUCTPRUNE_DIST, or built here from a copy of the sources."""
    if given := os.environ.get("STRUCTPRUNE_DIST"):
        return ROOT / given
    pytest.importorskip("build", reason="needs the package build, of the extra dev")
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, source)
    # Without isolation: the index need not be there, and setuptools of this environment is the one that is pinned.
    ran(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, source, cwd=out)
    return out


def only(folder: Path, pattern: str) -> Path:
    (found,) = folder.glob(pattern)
    return found


def package_files() -> set[str]:
    return {
        str(file.relative_to(ROOT))
        for file in (ROOT / "structprune").rglob("*")
        if file.name.endswith(KINDS) and "__pycache__" not in file.parts
    }


def test_the_wheel_holds_the_package_and_nothing_else(built) -> None:
    with zipfile.ZipFile(only(built, "*.whl")) as wheel:
        names = set(wheel.namelist())
        info = f"structprune-{structprune.__version__}.dist-info"
        metadata = Parser().parsestr(wheel.read(f"{info}/METADATA").decode())
        scripts = wheel.read(f"{info}/entry_points.txt").decode()
    assert {name for name in names if not name.startswith(info)} == package_files()
    assert {"structprune/py.typed", "structprune/reporting/style.css", "structprune/reporting/script.js"} <= names
    assert f"{info}/licenses/LICENSE" in names
    assert metadata["Version"] == structprune.__version__
    assert metadata["Requires-Python"] == ">=3.11"
    assert "structprune = structprune.cli:main" in scripts
    extras = metadata.get_all("Provides-Extra")
    assert {"cli", "models", "onnx", "search", "plot", "lightning", "ignite", "dev"} <= set(extras)
    plain = [line for line in metadata.get_all("Requires-Dist") if "extra ==" not in line]
    assert sorted(line.split(">")[0] for line in plain) == [
        "networkx", "numpy", "rich", "safetensors", "scipy", "torch",
    ]  # fmt: skip


def test_the_sdist_can_be_built_from_and_holds_no_tests(built) -> None:
    with tarfile.open(only(built, "*.tar.gz")) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert package_files() | {"pyproject.toml", "README.md", "LICENSE", "PKG-INFO"} <= names
    assert not [name for name in names if name.startswith(("tests", "benchmarks", ".", "docs"))]


PRUNE = """
import sys, torch, structprune
model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
slim = structprune.prune(model, torch.randn(1, 4), ratio=0.5)
structprune.report(model, torch.randn(1, 4), "report.html")
print(structprune.__version__, slim[0].out_features, structprune.__file__)
"""


def test_the_wheel_works_in_an_environment_of_its_own(built, tmp_path) -> None:
    """Torch and the other dependencies are those of this environment: they take minutes to install."""
    place = tmp_path / "venv"
    venv.create(place, with_pip=False, symlinks=os.name != "nt")
    paths = sysconfig.get_paths("venv", {"base": str(place), "platbase": str(place)})
    (Path(paths["purelib"]) / "dependencies.pth").write_text(f"{sysconfig.get_path('purelib')}\n")
    python = Path(paths["scripts"]) / "python"
    install = ("install", "-q", "--no-deps", "--no-index", "--ignore-installed", "--disable-pip-version-check")
    ran(sys.executable, "-m", "pip", "--python", python, *install, only(built, "*.whl"), cwd=tmp_path)
    version, width, file = ran(python, "-P", "-c", PRUNE, cwd=tmp_path).split()
    assert (version, width) == (structprune.__version__, "4")
    assert Path(file).is_relative_to(place)
    assert "<style>" in (tmp_path / "report.html").read_text()
    shown = ran(Path(paths["scripts"]) / "structprune", "info", cwd=tmp_path)
    assert f"structprune {structprune.__version__}" in shown
