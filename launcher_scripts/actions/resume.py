"""`action=resume`: launch again, in the same folders, from the first stage that did not succeed."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import yaml

from launcher_scripts import multirun, pipeline
from launcher_scripts.actions import Request, find, truth
from launcher_scripts.checks import finish
from launcher_scripts.job import Job, LaunchError
from launcher_scripts.manifest import Chain, Command, Launch
from launcher_scripts.notices import Mistakes

if TYPE_CHECKING:
    from launcher_scripts.sweep import Point

# What may be otherwise than at the launch: where and how long it runs, not what it computes.
FREE = (
    "run.time_limit",
    "run.dependency",
    "run.max_requeues",
    "run.signal_seconds",
    "trainer.devices",
    "trainer.num_nodes",
    "model.tensor_model_parallel_size",
    "model.pipeline_model_parallel_size",
    "model.pipeline_model_parallel_split_rank",
    "model.sequence_parallel",
    "model.use_fsdp",
    "model.activations_checkpoint_granularity",
    "model.compile",
    "model.micro_batch_size",
)
NOTHING = object()


@dataclass
class Rest:
    """A chain, and the jobs of it that are still to run; none where it goes on, or is done."""

    run: multirun.Run
    chain: Chain
    left: tuple[Job, ...]
    live: str | None = None  # what of it is queued or runs


def run(asked: Request) -> int:
    """Resume; returns what a launch returns."""
    launch = find.launch(asked)
    command = asked.command
    if asked.results is not None:
        command = _stored(asked, launch)
    runs, notices = _compose(command, launch)
    rest = _rest(runs)
    mistakes = [line for one in rest for line in changed(one.run.jobs)]
    if mistakes:
        raise Mistakes(list(dict.fromkeys(mistakes)))
    live = [one.live for one in rest if one.live]
    todo = [one for one in rest if one.left]
    if not todo and live:
        raise Mistakes([f"nothing to resume: {live[0]}; action=cancel would end it"])
    if not todo:
        print("nothing to resume: every stage has succeeded")
        return 0
    try:
        return _start(todo, rest, notices, launch, command)
    except LaunchError as error:
        raise Mistakes([str(error)]) if error.code == 2 else error from None


def _start(
    todo: Sequence[Rest], rest: Sequence[Rest], notices: list[str], launch: Launch, command: Command
) -> int:
    # What is in the manifest stays there as it was launched.
    chains = [] if launch.launched else [one.chain for one in rest]
    if launch.is_sweep:
        runs = [replace(one.run, jobs=one.left) for one in todo]
        return multirun.start(runs, notices, chains, command)
    run, left = todo[0].run, list(todo[0].left)
    return pipeline.start(run.cfg, run.cluster, left, notices, chains, command)


def _stored(asked: Request, launch: Launch) -> Command:
    """The words of the launch, then those that are typed now."""
    if launch.command is None or launch.command.cwd is None:
        raise Mistakes(
            [
                f"results: no pipeline.json says how {asked.results} was launched; give the words "
                "of its launch instead"
            ]
        )
    os.chdir(launch.command.cwd)  # relative paths are meant from there
    return replace(launch.command, words=(*launch.command.words, *asked.command.words))


def _compose(command: Command, launch: Launch) -> tuple[list[multirun.Run], list[str]]:
    """The jobs of the launch as they would be now, checked; and what the user should know."""
    from launcher_scripts import sweep

    composer = find.open_composer(command)
    names = {tuple(stage.stage for stage in chain.stages) for chain in launch.chains}
    # The stages that were launched, `data_prep` too where its files are there by now.
    fixed = [f"stages=[{','.join(*names)}]"] if len(names) == 1 else []
    words = [word for word in command.words if not word.startswith("stages=") or not fixed]
    try:
        with sweep.quick_interpolation():
            points = sweep.points(composer, [*words, *fixed])
            points = [point for point in points if _is_meant(point, launch)]
            if launch.is_sweep:
                notices = sweep.finish_all(points)
            else:
                points[0].activate()
                notices = finish(points[0].composition)
            named = [(point.label, point.composition.cfg) for point in points]
            return multirun.plan(named), notices
    finally:
        composer.close()


def _is_meant(point: "Point", launch: Launch) -> bool:
    """Of a sweep only the points of the folder that was named."""
    return not launch.is_sweep or point.label in {chain.point for chain in launch.chains}


def _rest(runs: Sequence[multirun.Run]) -> list[Rest]:
    chains = [Chain(pipeline.stages_of(run.cfg, list(run.jobs)), run.label or None) for run in runs]
    found = []
    for run, chain, row in zip(runs, chains, truth.look(chains), strict=True):
        live = next((one for one in row if one.live), None)
        first = next((n for n, one in enumerate(row) if not one.succeeded), len(row))
        if live is None:
            found.append(Rest(run, chain, run.jobs[first:]))
        else:
            job = f" (job {live.job_id})" if live.job_id else ""
            found.append(Rest(run, chain, (), f"{live.stage.stage}{job} is {live.state}"))
    return found


def changed(jobs: Sequence[Job]) -> list[str]:
    """A line for each key by which the present words compute something else than the launch's."""
    lines = []
    for job in jobs:
        try:
            stored = job.config_path.read_text(encoding="utf-8")
        except FileNotFoundError:
            continue  # the launch did not come so far
        if stored == job.config:
            continue
        try:
            before = dict(_leaves(yaml.safe_load(stored)))
        except yaml.YAMLError:
            lines.append(f"{job.stage}: {job.config_path} cannot be read: launch it anew")
            continue
        now = dict(_leaves(yaml.safe_load(job.config)))
        for key in dict.fromkeys([*before, *now]):
            old, new = before.get(key, NOTHING), now.get(key, NOTHING)
            if old != new and key not in FREE:
                lines.append(
                    f"{job.stage}.{key}: {_said(new)}, but the run to resume has {_said(old)}: "
                    "leave it as it was, or launch in another results_dir"
                )
    return lines


def _leaves(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(node, dict) and node:
        for key, value in node.items():
            yield from _leaves(value, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, node


def _said(value: object) -> str:
    return "nothing" if value is NOTHING else repr(value)
