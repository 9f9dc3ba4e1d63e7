"""A real Slurm on this machine, from nothing and without a trace: munge, slurmctld, some nodes.

All of it lives in namespaces of its own (network, processes, mounts, host name), and each node in
a further set within. So addresses and ports are always the same and meet nothing else, killing the
first process of a node is what pulling its plug is, and killing the outermost ends everything.
"""

import os
import re
import shlex
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "ip", "unshare")
OF_ACCOUNTS = ("slurmdbd", "sacctmgr", "mariadbd", "mariadb", "mariadb-install-db")
SPACES = ("--net", "--uts", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc")
PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin:/usr/bin:/bin"

CONF = """\
ClusterName=test
SlurmctldHost=control(10.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
MailProg=/bin/true
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
DefMemPerCPU=100
GresTypes=gpu
# Nodes are declared larger than the machine is.
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=10
MinJobAge={memory}
SchedulerParameters=bf_interval=2,sched_interval=5,batch_sched_delay=0
JobRequeue=1
{accounts}
NodeName=n[1-{nodes}] Sockets=1 CoresPerSocket=8 ThreadsPerCore=1 RealMemory=8000 Gres=gpu:4 \
Feature=fast State=UNKNOWN
PartitionName=debug Nodes=n[1-{nodes}] Default=YES MaxTime=1-0 DefaultTime=10 State=UP
"""

NO_ACCOUNTS = """\
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none"""

ACCOUNTS = """\
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=control
AccountingStoragePass={folder}/munge.socket
JobAcctGatherType=jobacct_gather/linux"""

SLURMDBD = """\
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
DbdHost=control
SlurmUser=root
LogFile={folder}/slurmdbd.log
PidFile={folder}/slurmdbd.pid
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StorageUser=slurm
StoragePass=slurm
StorageLoc=slurm
CommitDelay=1
"""

# The daemons of the accounts, and the database behind them.
BOOKS = """\
mkdir mysql
mariadb-install-db --no-defaults --user=root --datadir="$1/mysql" --skip-test-db \\
  --auth-root-authentication-method=normal >mariadb.log
mariadbd --no-defaults --user=root --datadir="$1/mysql" --socket="$1/mysql.socket" \\
  --pid-file="$1/mysql.pid" --bind-address=127.0.0.1 --skip-name-resolve \\
  --innodb-buffer-pool-size=64M --innodb-lock-wait-timeout=900 \\
  --innodb-flush-log-at-trx-commit=0 >>mariadb.log 2>&1 &
sql() { mariadb --no-defaults --user=root --socket="$1/mysql.socket" --execute="$2"; }
until sql "$1" "select 1" >/dev/null 2>&1; do sleep 0.1; done
sql "$1" "create database slurm; create user slurm@127.0.0.1 identified by 'slurm';
  grant all on slurm.* to slurm@127.0.0.1"
slurmdbd -D &
until sacctmgr --noheader show cluster >/dev/null 2>&1; do sleep 0.1; done
sacctmgr --immediate add cluster test >/dev/null
"""

# The outermost process. Its children are the daemons; what nobody waits for becomes its own.
INIT = """\
set -eu
cd "$1"
hostname control
mount --bind hosts /etc/hosts
ip link set lo up
ip link add bridge type bridge
ip addr add 10.0.0.1/24 dev bridge
ip link set bridge up
munged --key-file="$1/munge.key" --socket="$1/munge.socket" --pid-file="$1/munged.pid" \\
  --log-file="$1/munged.log" --seed-file="$1/munged.seed" --num-threads=2
[ ! -e slurmdbd.conf ] || . "$1/books.sh"
touch ready
slurmctld -D -f "$1/slurm.conf" &
while :; do sleep 3600 & wait $!; done
"""

# A node: plugged in from outside, then itself.
PLUG = """\
set -eu
cd "$1"
rm -f "born.$2"
ip link del "to-$2" 2>/dev/null || true
setsid unshare {spaces} bash -c '
  set -eu
  hostname "$2"
  touch "$1/born.$2"
  until ip link show eth0 >/dev/null 2>&1; do sleep 0.02; done
  ip link set lo up
  ip addr add "10.0.0.1${{2#n}}/24" dev eth0
  ip link set eth0 up
  NODE=$2 slurmd -D -N "$2" -f "$1/slurm.conf" &
  while :; do sleep 3600 & wait $!; done
' node "$1" "$2" </dev/null >"node.$2.log" 2>&1 &
echo $! >"node.$2.pid"
until [ -e "born.$2" ]; do sleep 0.02; done
first=$(cat /proc/$!/task/$!/children)
# Always the same hardware address, which the other nodes remember.
ip link add "to-$2" type veth peer name eth0 address "02:00:00:00:00:0${{2#n}}" \\
  netns "${{first%% *}}"
ip link set "to-$2" master bridge up
until (: >"/dev/tcp/10.0.0.1${{2#n}}/6818") 2>/dev/null; do sleep 0.05; done
"""


def lacking(accounts: bool = False) -> str | None:
    """Why no cluster can run here, and what would enable it; None where one can."""
    programs = [*PROGRAMS, *(OF_ACCOUNTS if accounts else ())]
    missing = [name for name in programs if shutil.which(name, path=PATH) is None]
    if missing:
        more = " slurmdbd slurm-wlm-mysql-plugin mariadb-server" if accounts else ""
        return (
            f"no {', '.join(missing)} on this machine: as root, `apt-get install "
            f"--no-install-recommends slurm-wlm munge iproute2{more}` (Debian, Ubuntu) enables "
            "these tests"
        )
    if subprocess.run(["unshare", *SPACES, "true"], capture_output=True).returncode:
        return "namespaces cannot be made: run the tests as root, in a privileged container if any"
    return None


class Cluster:
    """A running cluster; `folder` holds its files and logs.

    `accounts`: jobs are kept in a database too. `memory`: for how many seconds the controller
    knows of a job that has ended.
    """

    def __init__(
        self, folder: Path, nodes: int = 2, accounts: bool = False, memory: int = 3600
    ) -> None:
        self.folder, self.accounts, self.memory = folder, accounts, memory
        self.nodes = [f"n{number}" for number in range(1, nodes + 1)]
        self.gone: set[str] = set()  # nodes without power
        self.environment = {**os.environ, "PATH": PATH, "SLURM_CONF": f"{folder}/slurm.conf"}
        for variable in [
            name for name in self.environment if name.startswith(("SLURM_", "SBATCH"))
        ]:
            if variable != "SLURM_CONF":
                del self.environment[variable]
        self._write()
        # --pdeathsig: however the tests end, nothing stays behind.
        command = ["setpriv", "--pdeathsig", "KILL", "unshare", *SPACES, "bash", "-c", INIT]
        with open(folder / "init.log", "wb") as log:
            self.process = subprocess.Popen(
                [*command, "init", str(folder)],
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        try:
            until(lambda: (folder / "ready").exists(), 60, "munged", self._log)
            for name in self.nodes:
                self.start(name)
            until(lambda: self.idle() == len(self.nodes), 40, "the nodes", self._log)
        except BaseException:
            self.down()
            raise

    def _write(self) -> None:
        (self.folder / "state").mkdir()
        key = self.folder / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(1024))
        hosts = {"localhost": "127.0.0.1", "control": "10.0.0.1"}
        hosts |= {name: f"10.0.0.1{name[1:]}" for name in self.nodes}
        lines = (f"{address} {name}\n" for name, address in hosts.items())
        (self.folder / "hosts").write_text("".join(lines))
        (self.folder / "cgroup.conf").write_text("CgroupAutomount=no\n")
        for number in range(4):  # devices that nobody opens
            os.mknod(self.folder / f"gpu{number}", 0o020666, os.makedev(1, 3))
        (self.folder / "gres.conf").write_text(
            f"AutoDetect=off\nName=gpu File={self.folder}/gpu[0-3]\n"
        )
        accounts = (ACCOUNTS if self.accounts else NO_ACCOUNTS).format(folder=self.folder)
        text = CONF.format(
            folder=self.folder, nodes=len(self.nodes), accounts=accounts, memory=self.memory
        )
        (self.folder / "slurm.conf").write_text(text)
        if self.accounts:
            secret = self.folder / "slurmdbd.conf"
            secret.touch(mode=0o600)
            secret.write_text(SLURMDBD.format(folder=self.folder))
            (self.folder / "books.sh").write_text(BOOKS)

    def _log(self) -> str:
        logs = ("init.log", "slurmctld.log", "munged.log", "slurmdbd.log", "mariadb.log")
        texts = [self.folder / name for name in logs if (self.folder / name).exists()]
        return "\n".join(f"{path.name}: {path.read_text()[-2000:]}" for path in texts)

    def inside(self, *command: str, processes: bool = False) -> list[str]:
        """The command line that runs `command` where the cluster is."""
        first = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text()
        spaces = ["--net", "--uts", "--mount", *(["--pid"] if processes else [])]
        where = ["nsenter", "--target", first.split()[0], *spaces]
        return [*where, "--", *command]

    def run(self, *command: str, processes: bool = False) -> subprocess.CompletedProcess[str]:
        """Run a program where the cluster is, with its output as text."""
        return subprocess.run(
            self.inside(*command, processes=processes),
            env=self.environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=120,
        )

    def programs(self) -> str:
        """A PATH whose programs of Slurm see this cluster, for a launcher that runs here."""
        folder = self.folder / "bin"
        folder.mkdir(exist_ok=True)
        for name in ("sbatch", "srun", "scancel", "scontrol", "squeue", "sinfo", "sacct"):
            *words, target = self.inside(name)
            variables = f"PATH={shlex.quote(PATH)} SLURM_CONF={self.folder}/slurm.conf"
            line = f'{variables} exec {shlex.join(words[:-1])} --wd="$PWD" -- {target} "$@"'
            (folder / name).write_text(f"#!/bin/sh\n{line}\n")
            (folder / name).chmod(0o755)
        return f"{folder}:{PATH}"

    def ask(self, *command: str) -> str:
        """The output of a program of Slurm's that must succeed."""
        done = self.run(*command)
        assert done.returncode == 0, f"{command}: {done.stderr}{done.stdout}"
        return done.stdout

    def idle(self) -> int:
        """How many nodes are ready and without a job."""
        done = self.run("sinfo", "--noheader", "--Node", "--format=%t")
        return sum(line.strip() == "idle" for line in done.stdout.splitlines())

    def start(self, name: str) -> None:
        """Plug a node in."""
        plug = PLUG.format(spaces=" ".join(SPACES))
        done = self.run("bash", "-c", plug, "plug", str(self.folder), name, processes=True)
        assert done.returncode == 0, f"{name}: {done.stderr}"

    def crash(self, name: str) -> None:
        """Pull a node's plug: no process of it does anything any more."""
        pid = (self.folder / f"node.{name}.pid").read_text().strip()
        self.run("kill", "-KILL", pid, processes=True)
        self.gone.add(name)

    def kill_rank(self, job_id: str, rank: int) -> None:
        """Kill -9 the Python of a rank, not the shell around it."""
        self._kill("graftwerk", f"SLURM_JOB_ID={job_id}", f"SLURM_PROCID={rank}")

    def kill_daemon(self, name: str) -> None:
        """Kill -9 a node's slurmd; what runs on the node runs on."""
        self._kill("slurmd", f"NODE={name}")
        self.gone.add(name)

    def _kill(self, word: str, *variables: str) -> None:
        """Kill the process of this cluster with such a command line and environment."""
        wanted = {f"SLURM_CONF={self.folder}/slurm.conf", *variables}
        for process in Path("/proc").glob("[0-9]*"):
            try:
                words = (process / "cmdline").read_text().split("\0")
                given = (process / "environ").read_text().split("\0")
            except (OSError, UnicodeDecodeError):
                continue  # it has ended
            if word in words and wanted <= set(given):
                os.kill(int(process.name), signal.SIGKILL)
                return
        raise AssertionError(f"no process {word} of {variables}")

    def mend(self) -> None:
        """Start the nodes that are down."""
        for name in list(self.gone):
            self.crash(name)
            self.start(name)
            self.run("scontrol", "update", f"nodename={name}", "state=resume")
        self.gone.clear()
        until(lambda: self.idle() == len(self.nodes), 40, "all nodes", lambda: self.ask("sinfo"))

    def clear(self) -> None:
        """Cancel all jobs and wait for their ends; a node that is gone would delay them."""
        self.run("scancel", "--user=root")
        for name in self.gone:
            self.run("scontrol", "update", f"nodename={name}", "state=down", "reason=gone")
        until(lambda: not self.ask("squeue", "--noheader").strip(), 40, "an empty queue")

    def job(self, job_id: str) -> dict[str, str]:
        """What `scontrol show job` says of it."""
        line = self.ask("scontrol", "--oneliner", "show", "job", job_id)
        return dict(re.findall(r"(\S+?)=(\S*)", line))

    def down(self) -> None:
        """End every process; the folder stays."""
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()


def until(
    true: Callable[[], object], seconds: float, what: str, why: Callable[[], str] = str
) -> None:
    """Wait for something to become true; fails with `what` and what `why` returns."""
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, f"after {seconds} s still waiting: {what}\n{why()}"
        time.sleep(0.1)


@contextmanager
def cluster(nodes: int = 2, accounts: bool = False, memory: int = 3600) -> Iterator[Cluster]:
    """A cluster in a folder of its own under /tmp (sockets need short paths)."""
    folder = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))
    folder.chmod(0o755)
    try:
        running = Cluster(folder, nodes, accounts, memory)
        try:
            yield running
        finally:
            running.down()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
