"""What the code imports is what pyproject.toml declares, and the two packages stay apart."""

import ast
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
OURS = {"graftwerk", "launcher_scripts"}
# Import names that differ from the distribution's.
DISTRIBUTIONS = {
    "hydra": "hydra-core",
    "yaml": "pyyaml",
    "lightning_fabric": "pytorch-lightning",
}
LAUNCHER_NEVER = {"torch", "pytorch_lightning", "transformers", "datasets", "numpy", "graftwerk"}


def imports(folder: Path) -> Iterator[tuple[Path, str]]:
    """(file, top-level package) of every import in a folder."""
    for path in [*folder.rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                yield from ((path, alias.name.split(".")[0]) for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                yield path, node.module.split(".")[0]


def declared() -> set[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return {re.split(r"[<>=\[ ]", line)[0].lower() for line in project["dependencies"]}


@pytest.mark.parametrize("folder", ["src", "launcher_scripts"])
def test_nothing_is_imported_that_is_not_declared(folder: str):
    known = declared()
    undeclared = {
        f"{path.relative_to(ROOT)}: {name}"
        for path, name in imports(ROOT / folder)
        if name not in sys.stdlib_module_names | OURS
        and DISTRIBUTIONS.get(name, name).replace("_", "-").lower() not in known
        and name != "wandb"  # asked for by a key, and refused where it is not installed
    }
    assert not undeclared


def test_nothing_is_declared_that_is_not_imported():
    used = {name for folder in ("src", "launcher_scripts") for _, name in imports(ROOT / folder)}
    used = {DISTRIBUTIONS.get(name, name).replace("_", "-").lower() for name in used}
    through_others = {"tensorboard"}  # Lightning's logger writes by it
    assert declared() - used == through_others


def test_the_launcher_knows_no_tensors_and_no_node_side():
    assert not [
        (p, name) for p, name in imports(ROOT / "launcher_scripts") if name in LAUNCHER_NEVER
    ]


def test_the_node_side_knows_no_launcher():
    assert not [p for p, name in imports(ROOT / "src") if name == "launcher_scripts"]


def test_the_lock_pins_every_declared_requirement_at_a_version_it_allows():
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    pinned = dict(line.lower().replace("_", "-").split("==") for line in lines if "==" in line)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for wanted in map(Requirement, project["dependencies"]):
        assert wanted.specifier.contains(pinned[wanted.name.lower()]), wanted
    assert pinned["torch"] == "2.13.0"
    assert not [name for name in pinned if name.startswith(("nvidia-", "cuda-"))]


def test_the_wheel_holds_both_packages_and_the_script_templates(tmp_path: Path):
    pytest.importorskip("setuptools", minversion="77", reason="needs the locked setuptools")
    source = tmp_path / "source"
    leftovers = shutil.ignore_patterns("__pycache__", "*.egg-info")
    shutil.copytree(ROOT / "src", source / "src", ignore=leftovers)
    leftovers = shutil.ignore_patterns("__pycache__", "results", "data")
    shutil.copytree(ROOT / "launcher_scripts", source / "launcher_scripts", ignore=leftovers)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    offline = ["--no-deps", "--no-build-isolation", "--no-index"]
    run = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", *offline, "--wheel-dir", str(tmp_path), str(source)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    (file,) = tmp_path.glob("graftwerk-*.whl")
    held = {name for name in zipfile.ZipFile(file).namelist() if ".dist-info/" not in name}
    code = [path for path in source.rglob("*.py") if "build" not in path.parts]
    templates = [*(source / "launcher_scripts" / "templates").iterdir()]
    assert len(templates) >= 3
    wanted = {str(p.relative_to(source)).removeprefix("src/") for p in [*code, *templates]}
    assert held == wanted
