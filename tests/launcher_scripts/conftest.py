"""The command line, called in this process on folders of the test's own."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from launcher_scripts.main import main


@dataclass
class Answer:
    """What one command line came to."""

    code: int
    out: str
    lines: list[str]  # of standard error
    folder: Path

    def stages(self) -> list[str]:
        """The stages of the printed table."""
        table = self.out.split("\n\n")[0].splitlines()
        return [line.split()[0] for line in table[1:]]

    def config(self, stage: str) -> dict[str, Any]:
        """The resolved configuration that the stage's job was given."""
        found = [
            path
            for path in self.folder.rglob("*_hydra.yaml")
            if stage in path.name.removesuffix("_hydra.yaml")
        ]
        assert len(found) == 1, found
        return yaml.safe_load(found[0].read_text())

    def script(self, stage: str) -> str:
        (found,) = [p for p in self.folder.rglob("*_submission.sh") if stage in p.name]
        return found.read_text()

    def written(self) -> list[str]:
        return sorted(str(p.relative_to(self.folder)) for p in self.folder.rglob("*"))


@pytest.fixture
def command(tmp_path, monkeypatch, capsys) -> Callable[..., Answer]:
    """`command("stages=eval", ...)`: results and data under `tmp_path/o`, nothing submitted.

    `dry_run=True` is added unless the words say otherwise; the current folder is empty.
    """
    here = tmp_path / "here"
    here.mkdir()
    folder = tmp_path / "o"
    monkeypatch.chdir(here)
    monkeypatch.delenv("NEMO_LAUNCHER_DEBUG", raising=False)
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)

    def call(*words: str) -> Answer:
        given = [word.split("=")[0] for word in words]
        own = {"base_results_dir": folder / "results", "data_dir": folder / "data", "dry_run": True}
        added = [f"{key}={value}" for key, value in own.items() if key not in given]
        capsys.readouterr()
        try:
            code = main([*words, *added])
        except SystemExit as stop:
            code = int(stop.code or 0)
        said = capsys.readouterr()
        assert list(here.iterdir()) == []
        return Answer(code, said.out, said.err.splitlines(), folder)

    return call
