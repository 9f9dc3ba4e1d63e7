"""The image for containers: what goes into it, and a stage run in one built from nothing."""

import ast
import json
import os
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
DOCKERFILE = (ROOT / "containers/Dockerfile").read_text()
# All that the launcher and the preparation of synthetic data import, but for PyYAML: the base has
# it, to see that a package of the base is found.
ENOUGH = {
    *("hydra-core", "omegaconf", "antlr4-python3-runtime", "packaging", "Jinja2", "MarkupSafe"),
    *("rich", "Pygments", "markdown-it-py", "mdurl"),
}
BASE, IMAGE = "localhost/graftwerk-test-base", "localhost/graftwerk-test"
STRANGER = "4321:4321"  # a user that the image does not know
ENABLE = (
    "to build an image, be root on a host with Debian's packages: "
    "apt-get install --no-install-recommends podman runc debootstrap"
)


def copied() -> list[str]:
    """The files and folders of the checkout that the Dockerfile copies, but for REQUIREMENTS."""
    lines = re.findall(r"^COPY (?!\$)(.+) \S+$", DOCKERFILE, re.MULTILINE)
    return [name for line in lines for name in line.split()]


def lock() -> list[str]:
    return (ROOT / "requirements.lock").read_text().splitlines()


def ignored() -> list[str]:
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def test_all_that_the_image_copies_is_in_the_checkout_and_in_the_build_context():
    assert {"main.py", "conf", "launcher_scripts", "src"} <= set(copied())
    for name in copied():
        assert (ROOT / name).exists(), name
        assert name not in ignored()


def test_the_pinned_versions_are_what_the_image_installs():
    assert "ARG REQUIREMENTS=requirements.lock\n" in DOCKERFILE
    pins = dict(line.split("==") for line in lock() if not line.startswith("#"))
    assert "torch" in pins
    installed = re.findall(r"pip install(?:[^&]*)--requirement (\S+)", DOCKERFILE)
    (copy,) = re.findall(r"^COPY \$\{REQUIREMENTS\} (\S+)$", DOCKERFILE, re.MULTILINE)
    assert installed == [copy], "one installation, of that list"


def test_nothing_that_git_ignores_reaches_the_build_context():
    for line in (ROOT / ".gitignore").read_text().split():
        name = line.strip("/")
        assert (name if line.startswith("/") else f"**/{name}") in ignored(), line
    assert ".git" in ignored()


def test_the_base_must_have_a_python_that_the_project_supports():
    project = (ROOT / "pyproject.toml").read_text()
    ((low, high),) = re.findall(r'requires-python = ">=3\.(\d+),<3\.(\d+)"', project)
    assert f"(3, {low}) <= sys.version_info[:2] <= (3, {int(high) - 1})" in DOCKERFILE


# --- a real image -------------------------------------------------------------------------------


def run(*command: str, **options) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=900, **options)


def limits() -> list[str]:
    """Modest ones: podman asks for more than a root without CAP_SYS_RESOURCE is given."""
    kinds = {"nofile": resource.RLIMIT_NOFILE, "nproc": resource.RLIMIT_NPROC}
    hard = {name: resource.getrlimit(kind)[1] for name, kind in kinds.items()}
    return [f"--ulimit={name}={min(4096, end) if end > 0 else 4096}" for name, end in hard.items()]


@pytest.fixture(scope="module")
def podman(tmp_path_factory) -> Iterator[list[str]]:
    """`podman --runtime ...` that can run a container of BASE, which debootstrap makes first."""
    missing = [name for name in ("podman", "debootstrap") if shutil.which(name) is None]
    if missing or os.geteuid() != 0:
        pytest.skip(f"{' and '.join(missing) or 'root'} missing: {ENABLE}")
    tree, tar = (tmp_path_factory.mktemp("base") / name for name in ("tree", "base.tar"))
    packages = "--include=python3,python3-venv,python3-yaml"
    made = run("debootstrap", "--variant=minbase", packages, "bookworm", str(tree))
    if made.returncode:
        pytest.skip(f"debootstrap has no base: {(made.stdout + made.stderr).splitlines()[-1:]}")
    subprocess.run(["tar", "-C", tree, "-cf", tar, "."], check=True)
    shutil.rmtree(tree)
    subprocess.run(["podman", "import", "--quiet", tar, BASE], check=True, capture_output=True)
    tar.unlink()
    try:
        said = ""
        for runtime in filter(shutil.which, ("crun", "runc")):
            command = ["podman", "--runtime", runtime]
            tried = run(*command, "run", "--rm", "--network=host", *limits(), BASE, "true")
            if tried.returncode == 0:
                break
            said += tried.stderr
        else:
            pytest.skip(f"podman runs no container here ({said.strip()}): {ENABLE}")
        yield command
    finally:
        run("podman", "rmi", "--force", IMAGE, BASE)


def pip_configuration(target: Path) -> list[str]:
    """Write what pip is told on this host; returns the options that mount the local files of it."""
    listed = run(sys.executable, "-m", "pip", "config", "list")
    assert listed.returncode == 0, listed.stderr
    values: dict[str, str] = {}
    # The environment wins over files.
    for line in sorted(listed.stdout.splitlines(), key=lambda line: line.startswith(":env:")):
        name, _, value = line.partition("=")
        values[name.rpartition(".")[2]] = ast.literal_eval(value)
    text = "".join(f"{key} = {' '.join(value.split())}\n" for key, value in values.items())
    target.touch(mode=0o600)
    target.write_text(f"[global]\n{text}")
    mounts = set()
    for key in values.keys() & {
        "cert",
        "client-cert",
        "find-links",
        "index-url",
        "extra-index-url",
    }:
        for address in values[key].split():
            path = Path(urlsplit(address).path)
            if urlsplit(address).scheme in ("", "file") and path.is_absolute() and path.exists():
                # The pages of an index name files of folders beside it.
                mounts.add(str(path.parent if key.endswith("index-url") else path))
    return [f"--volume={path}:{path}:ro" for path in sorted(mounts)]


@pytest.fixture(scope="module")
def image(podman: list[str], tmp_path_factory) -> list[str]:
    """Build IMAGE from a checkout that only root may read, with things git ignores in it."""
    folder = tmp_path_factory.mktemp("image")
    context = folder / "checkout"
    context.mkdir()
    for name in [*copied(), ".dockerignore", "containers/Dockerfile"]:
        target = context / name
        target.parent.mkdir(exist_ok=True)
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, target)
    for left in ("src/graftwerk/__pycache__", "launcher_scripts/results"):
        (context / left).mkdir()
        (context / left / "left_behind").touch()
    for path in context.rglob("*"):
        path.chmod(0o700 if path.is_dir() else 0o600)
    pins = [line for line in lock() if line.partition("==")[0] in ENOUGH]
    assert len(pins) == len(ENOUGH)
    (context / "few.txt").write_text("\n".join(pins))
    configuration = folder / "pip.conf"
    mounts = pip_configuration(configuration)
    built = run(
        *podman,
        "build",
        "--network=host",
        *limits(),
        *mounts,
        f"--secret=id=pip.conf,src={configuration}",
        f"--build-arg=BASE={BASE}",
        "--build-arg=REQUIREMENTS=few.txt",
        "--build-arg=GPUS=void",
        f"--tag={IMAGE}",
        "--file=containers/Dockerfile",
        ".",
        cwd=context,
    )
    assert built.returncode == 0, built.stdout[-2000:] + built.stderr[-2000:]
    return [
        *podman,
        "run",
        "--rm",
        "--network=none",
        "--read-only",
        f"--user={STRANGER}",
        *limits(),
    ]


@pytest.mark.long
def test_a_stage_runs_in_an_image_built_from_nothing_as_a_user_it_does_not_know(
    image: list[str], tmp_path: Path
):
    os.chown(tmp_path, *map(int, STRANGER.split(":")))
    main = ["python3", "main.py", "experiment=quickstart", "stages=[data_prep]"]
    folders = ["data_dir=/mnt/run/data", "base_results_dir=/mnt/run/results"]
    done = run(*image, f"--volume={tmp_path}:/mnt/run", IMAGE, *main, *folders)
    assert done.returncode == 0, done.stdout + done.stderr
    state = json.loads((tmp_path / "results/data_prep_synthetic/state.json").read_text())
    assert state["state"] == "COMPLETED"
    (rows,) = tmp_path.glob("data/**/translate_train.jsonl")
    assert json.loads(rows.read_text().splitlines()[0])["taskname"] == "translate"


@pytest.mark.long
def test_the_image_holds_its_own_python_and_nothing_of_the_builder(image: list[str]):
    look = """
import os, sys, importlib.metadata as m, graftwerk, yaml
print(sys.prefix, os.environ["NVIDIA_VISIBLE_DEVICES"], graftwerk.__file__, yaml.__file__)
print(*(f"{name}=={m.version(name)}" for name in sys.argv[1:]))
print(*(name for top in ("/opt", "/run/secrets", "/etc/pip.conf") for _, below, files in
        os.walk(top) for name in below + files if name in ("left_behind", "pip.conf", "few.txt")))
print(*(os.path.join(top, name) for top, below, files in os.walk("/opt", onerror=print)
        for name in below + files if not os.access(os.path.join(top, name), os.R_OK)))
"""
    done = run(*image, IMAGE, "python3", "-c", look, *ENOUGH)
    assert done.returncode == 0, done.stderr
    where, versions, of_the_builder, unreadable = done.stdout.splitlines()
    prefix, gpus, package, of_the_base = where.split()
    assert (prefix, gpus) == ("/opt/venv", "void")
    assert package == "/opt/graftwerk/src/graftwerk/__init__.py"
    assert of_the_base.startswith("/usr/lib/python3/"), "the packages of the base are seen"
    assert sorted(versions.split()) == [
        pin for pin in sorted(lock()) if pin.partition("==")[0] in ENOUGH
    ]
    assert (of_the_builder, unreadable) == ("", "")
