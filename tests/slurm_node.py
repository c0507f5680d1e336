"""A Slurm of one node on the loopback interface, for tests of what runs on a cluster."""

import contextlib
import os
import shutil
import socket
import subprocess
import time
from pathlib import Path
from typing import Any

import psutil

# The node promises more than it has, as two GPUs, so that jobs ask for what they would elsewhere.
# Nothing is kept of jobs but what slurmctld remembers: no accounting, as in many small clusters.
CONFIGURATION = """ClusterName=test
SlurmctldHost=localhost(127.0.0.1)
AuthType=auth/none
CredType=cred/none
SlurmUser=root
SlurmdUser=root
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
GresTypes=gpu
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
ReturnToService=2
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
NodeName=localhost NodeAddr=127.0.0.1 CPUs={cpus} RealMemory=64000 Gres=gpu:2 State=UNKNOWN
PartitionName=main Nodes=localhost Default=YES DefMemPerCPU=1000 MaxTime=INFINITE State=UP
"""


def free_ports(n: int) -> list[int]:
    """Find ports that nobody uses, below those that systems deal out to whoever asks for any."""
    ports: list[int] = []
    with contextlib.ExitStack() as open_ones:
        for port in range(20_000 + os.getpid() % 1000 * 10, 32_000):
            one = open_ones.enter_context(socket.socket())
            with contextlib.suppress(OSError):
                one.bind(("127.0.0.1", port))
                ports.append(port)
            if len(ports) == n:
                break
    return ports


def why_not() -> str:
    """Say why no Slurm can be started here, or nothing."""
    programs = [shutil.which(name, path="/usr/sbin:/usr/bin") for name in ("slurmctld", "slurmd")]
    if not all(programs) or not shutil.which("srun"):
        return "needs Slurm: apt-get install slurmctld slurmd slurm-client"
    return "" if os.getuid() == 0 else "Slurm's daemons want to be started by root"


class SlurmNode:
    """A Slurm whose daemons are told to end when the `with` does; `environment` finds it."""

    def __init__(self, folder: Path, cpus: int) -> None:
        for name in ("state", "spool"):
            (folder / name).mkdir(parents=True)
        configuration = folder / "slurm.conf"
        configuration.write_text(
            CONFIGURATION.format(ports=free_ports(2), folder=folder, cpus=cpus)
        )
        (folder / "gres.conf").write_text("NodeName=localhost Name=gpu File=/dev/null,/dev/zero\n")
        self.environment = {**os.environ, "SLURM_CONF": str(configuration)}
        self.daemons: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, name: str, *options: str) -> None:
        """Start a daemon, for the first time or again."""
        program = shutil.which(name, path="/usr/sbin:/usr/bin") or name
        how: Any = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        command = [program, "-D", *options]
        self.daemons[name] = subprocess.Popen(command, env=self.environment, **how)

    def start_slurmd(self) -> None:
        """Start what runs the jobs, and wait until it does."""
        self.start("slurmd", "-N", "localhost")
        end = time.monotonic() + 30
        while self.ask("srun", "-t", "1", "true", check=False) is None:
            assert time.monotonic() < end, "Slurm did not come up"
            time.sleep(0.5)

    def ask(self, *command: str, check: bool = True) -> str | None:
        """Give what one of Slurm's programs says, None where it fails and may."""
        how: Any = {"capture_output": True, "text": True, "timeout": 60}
        done = subprocess.run(command, env=self.environment, **how)
        assert not (check and done.returncode), done.stderr
        return None if done.returncode else done.stdout.strip()

    def processes(self, *jobs: str) -> list[psutil.Process]:
        """Find the processes of jobs, or of all jobs; first those that watch over them."""
        watching, found = set(), []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                variables, watches = process.environ(), process.name() == "slurmstepd"
                if variables.get("SLURM_CONF") != self.environment["SLURM_CONF"]:
                    continue
                job = variables.get("SLURM_JOB_ID")
                if job in jobs or (not jobs and (job or watches)):
                    found.append(process)
                    watching |= {one for one in process.parents() if one.name() == "slurmstepd"}
        return [*watching, *found]

    def __enter__(self) -> "SlurmNode":
        self.start("slurmctld")
        try:
            self.start_slurmd()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        for process in self.processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        for daemon in self.daemons.values():
            daemon.terminate()
        for daemon in self.daemons.values():
            try:
                daemon.wait(20)
            except subprocess.TimeoutExpired:
                daemon.kill()
