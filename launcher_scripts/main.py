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
    from launcher_scripts.manifest import Command

HELP = """\
Compose a list of stages from YAML and run each after the success of the one before.

usage: python3 main.py [KEY=VALUE ...] [FLAGS]

stages, in their order
  data_prep         raw question answering data to JSONL files
  training          a GPT from scratch
  conversion        a checkpoint in another format
  fine_tuning       all of a model
  peft              adapters of any methods on a frozen model: model.peft.peft_scheme is some of
                    adapter, ia3, lora, ptuning, prefix, prompt, selective, qlora, fusion,
                    or none
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

looking after what was launched, with the same words or with results=FOLDER (docs/actions.md)
  action=status     every stage: state, job, runtime, progress, why it waits or failed;
                    watch=True keeps it on the screen
  action=logs       the log of a stage (stage=NAME, of a sweep point=NAME); watch=True follows it
  action=cancel     end the chain, the last stage first
  action=resume     launch again from the first stage that has not succeeded

groups (choose with group=option)
{groups}

keys beside the stages' own
  stages, cluster_type (bcm, bcp, interactive), data_dir, base_results_dir, container,
  container_mounts, env_vars, wandb_api_key_file, launcher_scripts_path, sweep.max_parallel
  dry_run=True      write all files, submit nothing (NEMO_LAUNCHER_DEBUG=1 does the same)
  profile=True      write where the time of learning goes: a table and a trace in results/profile
  docs/configuration.md explains every key; --cfg job prints what is composed.

exit codes: 0 done or submitted, 1 failed, 2 wrong configuration (nothing was written),
75 checkpointed and to be started again, 76 the same behind the loss of another process

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
    if any(word.lstrip("+").startswith("action=") for word in args.overrides):
        from launcher_scripts import actions

        asked = actions.request(_command(args))
        if asked is not None:
            return actions.perform(asked)
        args.overrides = [w for w in args.overrides if not w.lstrip("+").startswith("action=")]
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
        command = _command(args)
        if args.multirun:
            return _sweep(composer, command)
        return _one(composer, command)
    finally:
        composer.close()


def _command(args: Any) -> "Command":
    """The words and flags, so that they compose the same from any folder."""
    from launcher_scripts.manifest import Command

    return Command(
        tuple(args.overrides),
        bool(args.multirun),
        args.config_name,
        args.config_path,
        args.config_dir,
        os.getcwd(),
    )


def _one(composer: "Composer", command: "Command") -> int:
    from launcher_scripts.checks import finish
    from launcher_scripts.pipeline import launch

    composition = composer.compose(command.words)
    return launch(composition.cfg, finish(composition), command)


def _sweep(composer: "Composer", command: "Command") -> int:
    """All points composed and checked, then all launched; a wrong one launches none."""
    from launcher_scripts import multirun, sweep
    from launcher_scripts.pipeline import launch

    with sweep.quick_interpolation():
        points = sweep.points(composer, command.words)
        notices = sweep.finish_all(points)
        if len(points) == 1:
            return launch(points[0].composition.cfg, notices, command)
        named = [(point.label, point.composition.cfg) for point in points]
        return multirun.launch(named, notices, command)


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
