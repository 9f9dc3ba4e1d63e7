"""Material for tests of jobs: a small configuration, a stage that tells what it met, stand-ins."""

import json
import stat
import sys
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

BCM = {
    "partition": None,
    "account": None,
    "exclusive": True,
    "gpus_per_task": 1,
    "gpus_per_node": None,
    "mem": 0,
    "overcommit": False,
    "job_name_prefix": "nemo-megatron-",
    "nodelist": None,
    "srun_args": ["--no-container-mount-home"],
}

# What runs in place of a stage: writes down what it got, then does as `behave` in its config says.
STAGE = """
import json, os, signal, sys, time
from pathlib import Path
import yaml
stage, path = sys.argv[1:]
config = yaml.safe_load(Path(path).read_text())
rank = os.environ.get("SLURM_PROCID", os.environ.get("RANK", "0"))
met = {"argv": sys.argv[1:], "env": dict(os.environ), "pid": os.getpid(), "cwd": os.getcwd()}
Path(path).with_name(f"met.{rank}").write_text(json.dumps(met))
Path(path).with_name(f"met.{rank}").rename(Path(path).with_name(f"met-{rank}.json"))
behave = config.get("behave", {})
if behave.get("checkpoints"):
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, lambda *_: os._exit(75))
os.write(1, (behave.get("say", f"{stage} rank {rank} at work") + "\\n").encode())
if rank == str(behave.get("failing_rank")):
    while not Path(path).with_name("met-0.json").exists():
        time.sleep(0.05)
else:
    time.sleep(behave.get("sleep", 0))
if behave.get("failing_rank") in (None, int(rank)):
    sys.exit(behave.get("exit", 0))
"""

# sbatch that queues nothing: runs the job at once, unless what it waits for failed.
SBATCH = r"""
import json, os, re, subprocess, sys
from pathlib import Path
home = Path(os.environ["FAKE_SLURM"])
def read_word(line):  # as Slurm 22.05 reads it: no shell's rules
    word, quote, escaped = "", "", False
    for at, char in enumerate(line):
        if char.isspace() and not quote:
            return word, line[at:]
        if escaped:
            word, escaped = word + char, False
        elif char == "\\":
            escaped = True
        elif quote and char == quote:
            quote = ""
        elif not quote and char in "\"'":
            quote = char
        elif not quote and char == "#":
            return word, ""
        else:
            word += char
    return word, ""
if (home / "refuse").exists() and (home / "jobs").read_text() == (home / "refuse").read_text():
    sys.exit("sbatch: error: invalid partition specified: nowhere")
if (home / "mumble").exists():
    print("queued, thank you"); sys.exit(0)
number = int((home / "jobs").read_text()) + 1
(home / "jobs").write_text(str(number))
script = Path(sys.argv[-1])
options = {}
for line in script.read_text().splitlines():
    if not line.startswith("#"):
        break
    if line.startswith("#SBATCH "):
        word, rest = read_word(line[8:])
        if rest.strip():
            sys.exit(f"sbatch: error: Invalid directive found in batch script: {rest}")
        key, _, value = word.partition("=")
        options[key] = value
job = f"{1000 + number}"
print(f"Submitted batch job {job}")
sys.stdout.flush()
(home / f"{job}.json").write_text(json.dumps(options))
dependency = options.get("--dependency", "")
(home / f"{job}.rc").write_text("0")
def run(name, task=None):
    before = re.findall(r"afterok:([\d:]+)", dependency)
    needed = [n for ids in before for n in ids.split(":")]
    needed += [f"{n}_{task}" for n in re.findall(r"aftercorr:(\d+)", dependency)]
    if any((home / f"{n}.rc").read_text() != "0" for n in needed) or (home / "hold").exists():
        (home / f"{name}.rc").write_text("cancelled")
        return
    env = dict(os.environ, SLURM_JOB_ID=job, SLURM_NNODES=options["--nodes"],
               SLURM_NTASKS_PER_NODE=options["--ntasks-per-node"])
    if task is not None:
        env |= {"SLURM_ARRAY_JOB_ID": job, "SLURM_ARRAY_TASK_ID": str(task)}
    logs = [re.sub("%[jA]", job, options[f"--{key}"]) for key in ("output", "error")]
    with open(logs[0], "ab") as out, open(logs[1], "ab") as err:
        code = subprocess.run(["bash", script], env=env, stdout=out, stderr=err).returncode
    (home / f"{name}.rc").write_text(str(code))
    if task is not None and code:
        (home / f"{job}.rc").write_text(str(code))
if "--array" not in options:
    run(job)
else:
    first, last = options["--array"].split("%")[0].split("-")
    for task in range(int(first), int(last) + 1):
        run(f"{job}_{task}", task)
"""

SRUN = r"""
import json, os, subprocess, sys
from pathlib import Path
args = sys.argv[1:]
with open(Path(os.environ["FAKE_SLURM"]) / "srun", "a") as file:
    file.write(json.dumps(args) + "\n")
tasks = int(os.environ["SLURM_NNODES"]) * int(os.environ["SLURM_NTASKS_PER_NODE"])
while args and args[0].startswith("-"):
    option = args.pop(0)
    if option.startswith("--ntasks="):
        tasks = int(option[9:])
    if option in ("--container-image", "--container-mounts"):
        args.pop(0)
running = [subprocess.Popen(args, env=dict(os.environ, SLURM_PROCID=str(n))) for n in range(tasks)]
sys.exit(max(process.wait() for process in running))
"""

SCANCEL = r"""
import os, sys
from pathlib import Path
with open(Path(os.environ["FAKE_SLURM"]) / "cancelled", "a") as file:
    print(*sys.argv[1:], file=file)
"""

# scontrol that knows of a running job and writes down what it is asked to do.
SCONTROL = r"""
import os, sys
from pathlib import Path
with open(Path(os.environ["FAKE_SLURM"]) / "scontrol", "a") as file:
    print(*sys.argv[1:], file=file)
if "show" in sys.argv:
    print("JobId=1 JobState=RUNNING Reason=None Restarts=0 NodeList=n1")
if "requeue" in sys.argv and (Path(os.environ["FAKE_SLURM"]) / "stay").exists():
    sys.exit("Requested operation is presently disabled")
"""

# bcprun as the platform's, for one node: the command goes through a shell, once for each process.
BCPRUN = r"""
import argparse, json, os, subprocess, sys
parser = argparse.ArgumentParser(allow_abbrev=False)
parser.add_argument("--nnodes", type=int, required=True)
parser.add_argument("--npernode", type=int, required=True)
parser.add_argument("--env", action="append", default=[])
parser.add_argument("--cmd", required=True)
args = parser.parse_args()
with open(os.environ["FAKE_BCP"], "a") as file:
    file.write(json.dumps(sys.argv[1:]) + "\n")
keep = ("PATH", "HOME", "FAKE_BCP")  # what a shell on another node would have
env = {key: os.environ[key] for key in keep if key in os.environ}
env.update(pair.split("=", 1) for pair in args.env)
env.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29500", WORLD_SIZE=str(args.npernode))
running = [
    subprocess.Popen(["sh", "-c", args.cmd], env=dict(env, RANK=str(n), LOCAL_RANK=str(n)))
    for n in range(args.npernode)
]
sys.exit(max(process.wait() for process in running))
"""


def program(folder: Path, name: str, source: str) -> None:
    """An executable of that name in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_text(f"#!{sys.executable} -E\n{source}")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def checkout(root: Path) -> Path:
    """A folder laid out as this repository, whose `graftwerk` is STAGE; returns its launcher's."""
    package = root / "src" / "graftwerk"
    package.mkdir(parents=True, exist_ok=True)
    (package / "__init__.py").touch()
    (package / "__main__.py").write_text(STAGE)
    (root / "launcher_scripts").mkdir(exist_ok=True)
    return root / "launcher_scripts"


def config(root: Path, cluster_type: str, *stages: str, **changes: Any) -> DictConfig:
    """A complete configuration; `changes` has dots as double underscores, as in `cluster__mem`."""
    cfg = OmegaConf.create(
        {
            "stages": list(stages),
            "cluster_type": cluster_type,
            "cluster": BCM if cluster_type == "bcm" else {},
            "dry_run": False,
            "launcher_scripts_path": str(checkout(root / "checkout")),
            "data_dir": str(root / "data"),
            "base_results_dir": str(root / "results"),
            "container": None,
            "container_mounts": [None],
            "env_vars": {},
            "wandb_api_key_file": None,
            **{stage: _stage(stage) for stage in stages},
        }
    )
    for key, value in changes.items():
        OmegaConf.update(cfg, key.replace("__", "."), value, force_add=True)
    return cfg


def _stage(name: str) -> dict[str, Any]:
    run = {
        "name": "squad_tiny",
        "time_limit": "01:00:00",
        "dependency": "singleton",
        "results_dir": f"${{base_results_dir}}/tiny/{name}",
    }
    if name == "data_prep":
        return {"run": {**run, "dependency": None}, "output_dir": "${data_dir}/squad"}
    run |= {"max_requeues": 2, "signal_seconds": 60}
    trainer = {"devices": 1, "num_nodes": 1, "accelerator": "cpu"}
    return {"run": run, "trainer": trainer, "model": {"language_model_path": "/base"}}


def results(cfg: DictConfig, stage: str) -> Path:
    return Path(cfg[stage].run.results_dir)


def script(cfg: DictConfig, stage: str) -> Path:
    (path,) = results(cfg, stage).glob("*_submission.sh")
    return path


def state(cfg: DictConfig, stage: str) -> dict[str, Any]:
    return json.loads((results(cfg, stage) / "state.json").read_text())


def met(cfg: DictConfig, stage: str, rank: int = 0) -> dict[str, Any]:
    """What the process of that rank wrote down: argv, env, pid, cwd."""
    return json.loads((results(cfg, stage) / f"met-{rank}.json").read_text())


def ran(cfg: DictConfig, stage: str) -> bool:
    return (results(cfg, stage) / "met-0.json").exists()
