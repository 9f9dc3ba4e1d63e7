"""The command line: composed, checked, handed to the pipeline. See `python3 main.py --help`."""

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if __name__ == "__main__":  # called as launcher_scripts/main.py: this folder's parent is the root
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from launcher_scripts.notices import Mistakes

if TYPE_CHECKING:
    from launcher_scripts.compose import Composer

HELP = """\
Compose a list of stages from YAML and run each after the success of the one before.

usage: python3 main.py [KEY=VALUE ...] [FLAGS]

stages, in their order
  data_prep         raw question answering data to JSONL files
  training          a GPT from scratch
  conversion        a checkpoint in another format
  fine_tuning       all of a model
  peft              adapters of any methods on a frozen model: model.peft.peft_scheme is some of
                    adapter, ia3, lora, ptuning, prefix, prompt, selective, qlora, or none
  adapter_learning  bottleneck adapters on a frozen model
  ia3_learning      IA3 on a frozen model
  eval              base and adapters answer the test rows, scored side by side
  export            adapters in the form of AdapterHub, peft or NeMo, or merged into their base

examples
  python3 main.py experiment=quickstart
  python3 main.py stages=adapter_learning dry_run=True
  python3 main.py stages=[data_prep,adapter_learning,eval] cluster_type=interactive \\
      adapter_learning.model.language_model_path=/models/gpt2 adapter_learning.trainer.devices=1
  python3 main.py stages=peft peft=llama/squad peft.model.peft.peft_scheme=[lora,ptuning] \\
      peft.model.language_model_path=/models/llama
  python3 main.py stages=ia3_learning ia3_learning=t5/squad cluster_type=bcp
  python3 main.py stages=adapter_learning --multirun adapter_learning.model.optim.lr=1e-3,1e-4

groups (choose with group=option)
{groups}

keys beside the stages' own
  stages, cluster_type (bcm, bcp, interactive), data_dir, base_results_dir, container,
  container_mounts, env_vars, wandb_api_key_file, launcher_scripts_path
  dry_run=True      write all files, submit nothing (NEMO_LAUNCHER_DEBUG=1 does the same)
  docs/configuration.md explains every key; --cfg job prints what is composed.

exit codes: 0 done or submitted, 1 failed, 2 wrong configuration (nothing was written),
75 checkpointed and to be started again

Hydra's flags
{flags}
"""


def main(argv: list[str]) -> int:
    """Run the command line `argv`; returns the exit code. Mistakes go to standard error."""
    from hydra._internal.utils import get_args_parser

    parser = get_args_parser()
    args = parser.parse_intermixed_args(argv)
    try:
        return _main(args, parser)
    except Mistakes as mistakes:
        print(*mistakes.lines, sep="\n", file=sys.stderr)
        return 2
    except BrokenPipeError:  # `main.py --help | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _main(args: Any, parser: Any) -> int:
    from launcher_scripts.compose import Composer

    composer = Composer(args.config_name, args.config_path, args.config_dir)
    try:
        if args.help:
            print(_help(composer, parser))
            return 0
        for flag in ("hydra_help", "cfg", "info", "shell_completion"):
            if getattr(args, flag):
                return _hydra_itself(composer, parser, args, flag)
        if args.experimental_rerun is not None:
            raise Mistakes(["--experimental-rerun: it would unpickle a file; start main.py again"])
        if args.resolve:
            raise Mistakes(["--resolve: goes with --cfg"])
        points = composer.points(args.overrides, args.multirun)
        prepared = [_prepare(composer, point) for point in points]
        folders = _folders([cfg for cfg, _ in prepared])
        if folders:
            apart = [[*point, *words] for point, words in zip(points, folders, strict=True)]
            prepared = [_prepare(composer, point) for point in apart]
    finally:
        composer.close()
    return _launch(prepared)


def _prepare(composer: "Composer", point: list[str]) -> tuple[Any, list[str]]:
    """One composed and checked configuration, and what to tell of it."""
    from launcher_scripts.checks import finish

    composition = composer.compose(point)
    return composition.cfg, finish(composition)


def _folders(runs: list[Any]) -> list[list[str]]:
    """Words that give the runs of a sweep folders and names of their own, where they share them."""
    from launcher_scripts.complete import plain_text
    from launcher_scripts.overrides import quoted

    words: list[list[str]] = [[] for _ in runs]
    for stage in dict.fromkeys(str(stage) for cfg in runs for stage in cfg.stages):
        places = {str(cfg[stage].run.results_dir) for cfg in runs if stage in cfg.stages}
        if len(places) == sum(stage in cfg.stages for cfg in runs):
            continue
        for number, cfg in enumerate(runs):
            if stage in cfg.stages:
                run = cfg[stage].run
                words[number] += [
                    f"{stage}.run.results_dir={quoted(plain_text(f'{run.results_dir}/{number}'))}",
                    f"{stage}.run.name={quoted(f'{run.name}_{number}')}",
                ]
    return words if any(words) else []


def _launch(prepared: list[tuple[Any, list[str]]]) -> int:
    """Run the chains one after the other; the first failure ends the sweep."""
    from launcher_scripts.pipeline import launch

    for number, (cfg, notices) in enumerate(prepared):
        if len(prepared) > 1:
            print(f"run {number + 1} of {len(prepared)}", flush=True)
        code = launch(cfg, notices)
        if code != 0:
            return code
    return 0


def _help(composer: "Composer", parser: Any) -> str:
    groups = [f"  {group:<18}{', '.join(options)}" for group, options in composer.options().items()]
    flags = composer.hydra.format_args_help(parser).splitlines()
    return HELP.format(groups="\n".join(groups), flags="\n".join(f"  {flag}" for flag in flags))


def _hydra_itself(composer: "Composer", parser: Any, args: Any, flag: str) -> int:
    """`--cfg`, `--info` and their kin, by Hydra, on words that are checked before."""
    hydra, name = composer.hydra, composer.name
    if flag == "hydra_help":
        hydra.hydra_help(config_name=name, args_parser=parser, args=args)
    elif flag == "shell_completion":
        hydra.shell_completion(config_name=name, overrides=args.overrides)
    else:
        words = composer.hydra_words(args.overrides)
        with composer.mistakes():
            if flag == "info":
                hydra.show_info(args.info, config_name=name, overrides=words)
            else:
                hydra.show_cfg(name, words, args.cfg, args.package, resolve=args.resolve)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
