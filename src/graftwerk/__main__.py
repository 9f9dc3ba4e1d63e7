"""`python3 -m graftwerk`: what a job runs on a node, and small commands.

    python3 -m graftwerk STAGE CONFIG.yaml
    python3 -m graftwerk score PREDICTIONS GROUND_TRUTH
    python3 -m graftwerk generate --model MODEL [--adapter ADAPTER] --prompt TEXT
    python3 -m graftwerk merge --model MODEL --adapter ADAPTER --output PATH --format FORMAT
    python3 -m graftwerk inspect CHECKPOINT_OR_ADAPTER [--json]

Exit codes: 0 done, 1 failed, 2 wrong configuration or input, 75 checkpointed and to be requeued,
76 another process of the run was lost.
"""

import importlib
import os
import sys
import traceback
from pathlib import Path
from typing import Any

from graftwerk.errors import Ended, Exit, UserError, is_storage, one_line

# Imported when asked for: `score` needs no torch, and a wrong name needs nothing. The learning
# stages are one, which is told its name.
LEARNING = ("training", "fine_tuning", "peft", "adapter_learning", "ia3_learning")
STAGES = {
    "data_prep": "graftwerk.stages.data_prep",
    "conversion": "graftwerk.stages.conversion",
    **dict.fromkeys(LEARNING, "graftwerk.stages.learning"),
    "eval": "graftwerk.stages.eval",
    "export": "graftwerk.stages.export",
}
COMMANDS = {
    "score": "graftwerk.evaluation.score",
    "generate": "graftwerk.generation.command",
    "merge": "graftwerk.checkpoints.merge",
    "inspect": "graftwerk.checkpoints.inspect",
}


def main(argv: list[str]) -> int:
    """Runs a stage or a command; returns the exit code."""
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(usage())
        return Exit.DONE if argv else Exit.WRONG_INPUT
    name, *rest = argv
    if name in COMMANDS:
        return importlib.import_module(COMMANDS[name]).main(rest) or 0
    if name not in STAGES:
        raise UserError(
            f"{name!r} is no stage or command: use one of {', '.join([*STAGES, *COMMANDS])}"
        )
    if len(rest) != 1 or rest[0] in ("-h", "--help"):
        raise UserError(f"usage: python3 -m graftwerk {name} CONFIG.yaml")
    cfg = read_config(Path(rest[0]))
    return run_stage(name, cfg)


def run_stage(name: str, cfg: Any) -> int:
    """Runs a stage; stopped by a signal one that keeps no checkpoints leaves with 75 too."""
    from graftwerk.training.stopping import Interrupted, Stop

    stage = importlib.import_module(STAGES[name])
    if name in LEARNING:
        return stage.run(name, cfg) or 0
    try:
        with Stop():
            return stage.run(cfg) or 0
    except Interrupted as reason:
        if first_rank():
            print(f"stopped by {reason}: start again to repeat it")
        return Exit.REQUEUE


def usage() -> str:
    """The help text."""
    head, _, codes = (__doc__ or "").partition("\n\n")[2].rpartition("\n\n")
    return f"usage:\n{head}\n\nSTAGE: {', '.join(STAGES)}\n{codes}".rstrip()


def read_config(path: Path):
    """A job's YAML as a DictConfig."""
    import yaml
    from omegaconf import DictConfig, OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        cfg = OmegaConf.load(path)
        OmegaConf.resolve(cfg)
    except (OSError, UnicodeDecodeError, yaml.YAMLError, OmegaConfBaseException) as error:
        raise UserError(f"{path} cannot be read: {' '.join(str(error).split())}") from None
    if not isinstance(cfg, DictConfig):
        raise UserError(f"{path} must hold keys and values: a job's <job>_hydra.yaml")
    return cfg


def guarded(argv: list[str]) -> int:
    """`main` with errors turned into messages and exit codes."""
    try:
        code = main(argv)
    except BrokenPipeError:  # `... inspect FILE | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return Exit.FAILED
    except UserError as error:
        if first_rank():
            print(one_line(error), file=sys.stderr)
        code = Exit.WRONG_INPUT
    except Ended as end:
        code = int(end.code or Exit.FAILED)
    except Exception as error:
        if is_storage(error):
            print(one_line(error), file=sys.stderr)
        else:
            traceback.print_exc()
        code = Exit.FAILED
    leave_group()
    return code


def first_rank() -> bool:
    """Whether this process is the one that speaks: torchrun's rank zero, or srun's, or alone."""
    rank = os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or "0"
    return rank == "0"


def leave_group() -> None:
    """Ends the process group where there is one; gloo aborts a process that leaves it open."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is None or not distributed.is_available() or not distributed.is_initialized():
        return
    distributed.destroy_process_group()


if __name__ == "__main__":
    sys.exit(guarded(sys.argv[1:]))
