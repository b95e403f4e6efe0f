"""A throw-away Slurm cluster of two nodes on this machine, for the tests: real daemons, in namespaces of their own.

The namespaces have their own network (loopback alone), processes, host name and /etc/hosts. The kernel ends all
processes in them with the first one, and that one ends with the process that started it. So nothing outlives a test run
that is killed, clusters do not see one another, and nothing of the machine changes but the packages installed.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from pathlib import Path

PACKAGES = {"munged": "munge", "slurmctld": "slurmctld", "slurmd": "slurmd", "sbatch": "slurm-client"}
PATH = f"{os.environ['PATH']}:/usr/sbin:/sbin"
NODES = ("node1", "node2")
ADDRESS = "10.0.0.1"  # of all nodes; with loopback's 127.0.0.1 alone Slurm's look-ups find nothing (AI_ADDRCONFIG)
CONFIG = """
ClusterName=tests
SlurmctldHost=login({address})
SlurmUser=root
SlurmdUser=root
# how long a credential holds, and a requeued job waits (by default 120 s)
AuthInfo=socket={folder}/munge.socket,cred_expire={requeue_seconds}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
# each node claims more processors than the machine may have
SlurmdParameters=config_overrides
# a job in "high" requeues jobs in "low": they get their --signal first, and GraceTime to save
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
ReturnToService=2
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=0
{nodes}
PartitionName=main Nodes=ALL Default=YES MaxTime=60 DefaultTime=10 PriorityTier=5 PreemptMode=OFF
PartitionName=low  Nodes=ALL MaxTime=60 DefaultTime=10 PriorityTier=1 PreemptMode=REQUEUE GraceTime=30
PartitionName=high Nodes=ALL MaxTime=60 DefaultTime=10 PriorityTier=9 PreemptMode=OFF
"""
# $1: the folder. The shell stays as the first process: it collects processes that lose their parents.
FIRST_PROCESS = """
cd "$1" && hostname login && ip link set lo up && ip address add %(address)s/32 dev lo \\
    && mount --bind hosts /etc/hosts || exit 1
mungekey --create --keyfile=munge.key
munged --force --key-file="$1/munge.key" --socket="$1/munge.socket" --pid-file="$1/munged.pid" \\
    --log-file="$1/munged.log" --seed-file="$1/munged.seed" || exit 1
slurmctld || exit 1
for node in %(nodes)s; do slurmd -N "$node" || exit 1; done
while :; do sleep 3600 & wait $!; done
"""


class NoCluster(Exception):
    """This machine cannot run one; the message says why."""


class Cluster:
    """Two nodes of eight processors each, and partitions main, low and high; a job in high preempts those in low.

    Args:
        folder: Where configuration, state and logs go.

    Raises:
        NoCluster: If this machine cannot run one.
    """

    def __init__(self, folder: Path) -> None:
        install()
        self.folder = folder
        (folder / "state").mkdir()
        nodes = [
            f"NodeName={n} NodeHostname=login NodeAddr={ADDRESS} Port={6900 + i} CPUs=8" for i, n in enumerate(NODES)
        ]
        values = {"folder": folder, "address": ADDRESS, "nodes": "\n".join(nodes), "requeue_seconds": 5}
        (folder / "slurm.conf").write_text(CONFIG.format(**values))
        (folder / "hosts").write_text(f"127.0.0.1 localhost\n{ADDRESS} login {' '.join(NODES)}\n")
        clean = {"PATH": PATH, "LANG": "C.UTF-8", "SLURM_CONF": str(folder / "slurm.conf")}
        script = FIRST_PROCESS % {"address": ADDRESS, "nodes": " ".join(NODES)}
        namespaces = ["unshare", "--net", "--pid", "--mount", "--uts", "--mount-proc", "--fork", "--kill-child"]
        with (folder / "first.log").open("wb") as log:
            self._process = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", *namespaces, "bash", "-c", script, "first", str(folder)],
                env=clean, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            )  # fmt: skip
        try:
            self._first = self._first_process()
            self.bin = self.clients()
            self._wait_for_nodes()
        except BaseException:
            self.stop()
            raise

    def clients(self) -> Path:
        """Returns a folder of Slurm's commands, for PATH: as if typed on the login node."""
        home = self.folder / "bin"
        home.mkdir()
        for name in ("sbatch", "squeue", "scancel", "scontrol", "srun", "salloc", "sinfo"):
            environment = ["env", f"PATH={PATH}", f"SLURM_CONF={self.folder}/slurm.conf"]
            command = ["nsenter", f"--target={self._first}", "--net", "--pid", "--mount", "--uts", '--wd="$PWD"']
            (home / name).write_text(f'#!/bin/sh\nexec {" ".join([*command, *environment, name])} "$@"\n')
            (home / name).chmod(0o755)
        return home

    def stop(self) -> None:
        """Ends all that runs on the cluster, and its daemons."""
        self._process.kill()
        self._process.wait()

    def _first_process(self) -> int:
        children = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children")
        for _ in range(100):
            if self._process.poll() is None and (found := children.read_text().split()):
                return int(found[0])
            time.sleep(0.05)
        raise NoCluster(f"namespaces cannot be made: {(self.folder / 'first.log').read_text().strip()}")

    def _wait_for_nodes(self) -> None:
        for _ in range(60):
            sinfo = [self.bin / "sinfo", "-h", "-N", "-p", "main", "-o", "%t"]
            states = subprocess.run(sinfo, capture_output=True, text=True, check=False).stdout
            if states.split() == ["idle"] * len(NODES):
                return
            if self._process.poll() is not None:
                break
            time.sleep(0.25)
        logs = "\n".join(f"{file.name}: {file.read_text()[-1000:]}" for file in self.folder.glob("*.log"))
        raise NoCluster(f"the nodes do not come up. {logs}")


def install() -> None:
    """Installs Debian's packages, where they are missing.

    Raises:
        NoCluster: If they cannot be installed.
    """
    if os.geteuid() != 0:
        raise NoCluster("only root can start one")
    missing = [package for program, package in PACKAGES.items() if not shutil.which(program, path=PATH)]
    if not missing:
        return
    if not shutil.which("apt-get"):
        raise NoCluster(f"{', '.join(missing)} are not installed, and there is no apt-get")
    for command in (["update"], ["install", "--yes", "--no-install-recommends", *missing]):
        done = subprocess.run(
            ["apt-get", "-qq", *command],
            env={**os.environ, "DEBIAN_FRONTEND": "noninteractive"}, capture_output=True, text=True, check=False,
        )  # fmt: skip
    if done.returncode:
        raise NoCluster(f"apt-get cannot install {', '.join(missing)}: {done.stderr.strip()[-300:]}")
