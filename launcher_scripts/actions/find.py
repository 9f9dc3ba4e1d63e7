"""Which launch an action means: by a folder of results, or by the words that composed it."""

from pathlib import Path
from typing import TYPE_CHECKING

from launcher_scripts import manifest, state
from launcher_scripts.actions import Request
from launcher_scripts.manifest import Chain, Command, Launch, Stage
from launcher_scripts.notices import Mistakes

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from launcher_scripts.compose import Composer


def launches(asked: Request) -> list[Launch]:
    """What an action is about, the newest last; at least one.

    Raises:
        Mistakes: nothing was launched there, or the words compose nothing.
    """
    if asked.results is None:
        return [_composed(asked.command)]
    found, _ = manifest.of_folder(asked.results)
    if not found and (single := _single(asked.results)) is not None:
        found = [single]
    if not found:
        raise Mistakes(
            [
                f"results: nothing was launched in {asked.results}: there is no state.json in it "
                f"and no {manifest.NAME} in it or above that names it"
            ]
        )
    return found


def launch(asked: Request) -> Launch:
    """The one launch that an action is about.

    Raises:
        Mistakes: the folder holds several, or none.
    """
    found = launches(asked)
    if len(found) > 1:
        folders = ", ".join(str(one.chains[0].stages[-1].results_dir) for one in found)
        raise Mistakes(
            [f"results: {len(found)} launches share {asked.results}; name a stage's: {folders}"]
        )
    return found[0]


def others(part: Launch) -> frozenset[Path]:
    """The folders of a launch's other chains, where `part` is only some points of a sweep."""
    for root in part.chains[0].stages[-1].results_dir.parents:
        for whole in manifest.read(root):
            if whole.launched == part.launched and part.folders <= whole.folders:
                mine = {chain.point for chain in part.chains}
                apart = [chain.folders for chain in whole.chains if chain.point not in mine]
                return frozenset().union(*apart)
    return frozenset()


def _single(folder: Path) -> Launch | None:
    """A stage's folder whose results root is not known."""
    told = state.read(folder / "state.json")
    if told is None or not told.get("stage"):
        return None
    stage = Stage(str(told["stage"]), str(told.get("job_name")), folder, folder / "results")
    try:
        on_slurm = "\n#SBATCH" in stage.script.read_text(encoding="utf-8")
    except OSError:
        on_slurm = bool(told.get("job_id"))
    return Launch("bcm" if on_slurm else "interactive", (Chain((stage,)),))


def _composed(command: Command) -> Launch:
    """What the words compose, with the stages that were launched with it."""
    from launcher_scripts.sweep import quick_interpolation

    composer = open_composer(command)
    try:
        with quick_interpolation():
            chains, root, cluster_type = _chains(composer, command)
    finally:
        composer.close()
    composed = Launch(cluster_type, chains, command)
    for earlier in reversed(manifest.read(root)):
        if composed.folders <= earlier.folders:
            kept = tuple(c for c in earlier.chains if any(c.folders >= o.folders for o in chains))
            if kept:
                return Launch(earlier.cluster_type, kept, earlier.command, earlier.launched)
    return composed


def open_composer(command: Command) -> "Composer":
    from launcher_scripts.compose import Composer

    return Composer(command.config_name, command.config_path, command.config_dir)


def _chains(composer: "Composer", command: Command) -> tuple[tuple[Chain, ...], Path, str]:
    """The chains of a command line by names and folders; values are not checked for this."""
    from launcher_scripts import sweep

    chains = []
    points = sweep.points(composer, command.words)
    if len(points) > 1 and not command.multirun:
        raise Mistakes(["several values are a sweep: add --multirun, as at its launch"])
    for point in points:
        if point.composition.problems:
            raise Mistakes(point.composition.problems)
        point.activate()
        cfg = sweep.outline(point.composition.cfg)
        with composer.mistakes():
            stages = tuple(_stage(cfg, name) for name in point.composition.stages)
        chains.append(Chain(stages, point.label if len(points) > 1 else None))
    root = Path(str(cfg.base_results_dir)).expanduser().absolute()
    return tuple(chains), root, str(cfg.cluster_type)


def _stage(cfg: "DictConfig", name: str) -> Stage:
    from launcher_scripts.clusters import backend
    from launcher_scripts.job import job_name
    from launcher_scripts.pipeline import log_dir

    run = cfg[name].run
    folder = Path(str(run.results_dir)).expanduser().absolute()
    prefix = backend(str(cfg.cluster_type)).prefix(cfg.cluster)
    return Stage(name, job_name(name, str(run.name), prefix), folder, log_dir(cfg[name], folder))
