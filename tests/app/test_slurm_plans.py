"""Plans on a real Slurm of one node: what is killed goes on, and what is done stays done."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path

import psutil
import pytest
import yaml
from slurm_node import SlurmNode

from mmsr.app.plan import dry_run, find_profile, status_lines
from mmsr.networks.weights import load_generator
from mmsr.training.run_folder import list_checkpoints, read_history

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        find_spec("snakemake_executor_plugin_slurm") is None,
        reason="needs Snakemake's plugin for Slurm: pip install 'mmsr[slurm]'",
    ),
]

TINY = Path(__file__).parent / "plans" / "tiny.yaml"
LIMIT_S = 240

# Snakemake looks at the queue each second; else a test would wait for it most of the time.
IMPATIENT = """
import asyncio, sys
if "snakemake" in sys.orig_argv:
    wait = asyncio.sleep
    asyncio.sleep = lambda seconds, *result: wait(min(seconds, 1), *result)
"""

# Experiments that only count: trainings until they are let go, from where they were killed.
STUB = """
import os, time
from pathlib import Path
if sys.orig_argv[1:4] == ["-m", "mmsr", "run"]:
    experiment, _, page = sys.orig_argv[4:7]
    folder, name = Path(page).parent, Path(page).parent.name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "notebook.running.ipynb").write_text('{"cells": []}')
    steps = folder / "steps"
    step = int(steps.read_text()) if steps.exists() else 0
    with open("calls", "a") as file:
        gpu = os.environ.get("CUDA_VISIBLE_DEVICES", "none")
        file.write(f"{experiment} {name} {step} {gpu}" + chr(10))
    while experiment == "train" and not Path("go").exists():
        step += 1
        (folder / "new").write_text(str(step))
        (folder / "new").replace(steps)
        time.sleep(0.1)
    last = {"prepare": "prepare/prepared.json", "super_resolve": f"super_resolve/{name}/done.json"}
    for path in [last[experiment]] if experiment in last else []:
        Path(path).write_text("{}")
    for path in ["report.html", "metrics.json"] if experiment == "evaluate" else []:
        Path(path).touch()
    (folder / "notebook.running.ipynb").unlink()
    os._exit(0)
"""


def wait_for(what: Callable[[], object], limit_s: float = LIMIT_S) -> None:
    """Wait until something is so."""
    end = time.monotonic() + limit_s
    while not what():
        assert time.monotonic() < end, "nothing came of it"
        time.sleep(0.1)


class Plan:
    """A plan for Slurm, and how it is called and looked at."""

    def __init__(
        self, place: Path, slurm: SlurmNode, changes: dict[str, object], code: str
    ) -> None:
        self.slurm, self.out, self.file = slurm, place / "out", place / "plan.yaml"
        plan = yaml.safe_load(TINY.read_text()) | changes
        self.file.write_text(yaml.safe_dump(plan))
        self.profile = place / "profile"
        self.profile.mkdir()
        options = yaml.safe_load((find_profile("slurm") / "config.yaml").read_text())
        options |= {"latency-wait": 5, "slurm-init-seconds-before-status-checks": 1}
        options |= {"max-status-checks-per-second": 10}
        (self.profile / "config.yaml").write_text(yaml.safe_dump(options))
        (place / "sitecustomize.py").write_text(code)
        self.said = place / "said"
        path = [str(place), *filter(None, [os.environ.get("PYTHONPATH")])]
        self.environment = {**slurm.environment, "PYTHONPATH": os.pathsep.join(path)}

    @contextmanager
    def called(self) -> Iterator[subprocess.Popen[bytes]]:
        """Call `mmsr plan`; end it, and what it started, with the block."""
        command = [sys.executable, "-m", "mmsr", "plan", str(self.file), "--out", str(self.out)]
        command += ["--profile", str(self.profile)]
        with open(self.said, "w") as terminal:
            job = subprocess.Popen(
                command, env=self.environment, stderr=terminal, start_new_session=True
            )
        try:
            yield job
        finally:
            if job.poll() is None:
                os.killpg(job.pid, signal.SIGKILL)
                job.wait()

    def snakemake(self, mmsr: subprocess.Popen[bytes]) -> int:
        """Find the process that submits the jobs."""
        children = Path(f"/proc/{mmsr.pid}/task/{mmsr.pid}/children").read_text().split()
        (found,) = (
            one for one in children if b"snakemake" in Path(f"/proc/{one}/cmdline").read_bytes()
        )
        return int(found)

    def jobs(self, rule: str, *options: str) -> list[str]:
        """List the numbers of a rule's jobs that are in the queue."""
        said = self.slurm.ask("squeue", "--noheader", "--format=%i %k", *options) or ""
        return [line.split()[0] for line in said.splitlines() if line.endswith(f" rule_{rule}")]

    def states(self) -> dict[str, str]:
        """Give the states that `mmsr status` tells, by model or step."""
        head, *rows = status_lines(self.out)
        return {"": head, **{name: state for name, state, *_ in map(str.split, rows)}}


def test_whatever_is_killed_the_plan_goes_on(tmp_path: Path, slurm: SlurmNode) -> None:
    """A job, slurmd and Snakemake are killed one after the other; experiments are stubs here."""
    plan = Plan(tmp_path, slurm, {}, IMPATIENT + STUB)
    calls = plan.out / "calls"
    steps = {name: plan.out / "train" / name / "steps" for name in ("with-mmsr", "without-mmsr")}
    with plan.called() as job:
        wait_for(lambda: all(path.exists() for path in steps.values()) or job.poll() is not None)
        assert job.poll() is None, plan.said.read_text()
        asked = slurm.ask("squeue", "--noheader", "--format=%C %m %l")
        assert asked
        assert set(asked.splitlines()) == {"4 8000M 1-00:00:00"}
        assert plan.states()[""].endswith(": at work; models: 2 running")

        slurm.daemons["slurmd"].kill()
        slurm.daemons["slurmd"].wait()
        before = int(steps["without-mmsr"].read_text())
        slurm.start_slurmd()
        wait_for(lambda: int(steps["without-mmsr"].read_text()) > before + 5)

        (killed,) = plan.jobs("train_wildcards_with-mmsr")
        slurm.ask("scancel", killed)
        wait_for(lambda: calls.read_text().count("train with-mmsr") == 2 or job.poll() is not None)
        assert job.poll() is None, plan.said.read_text()

        os.kill(plan.snakemake(job), signal.SIGKILL)
        job.wait(30)
    assert plan.said.read_text().splitlines()[-1] == (
        f"mmsr: {plan.out}: the plan was not finished: Snakemake was killed; run again to go on"
    )
    assert plan.states()[""].endswith(": nobody is at work; models: 2 stopped")
    left = plan.jobs("train_wildcards_with-mmsr") + plan.jobs("train_wildcards_without-mmsr")
    assert len(left) == 2

    with plan.called() as job:
        wait_for(lambda: len(calls.read_text().splitlines()) >= 6 or job.poll() is not None)
        (plan.out / "go").touch()
        job.wait(LIMIT_S)
    assert job.returncode == 0, plan.said.read_text()
    states = slurm.ask("squeue", "--states=all", "--noheader", f"--jobs={','.join(left)}", "-o%T")
    assert states
    assert set(states.splitlines()) == {"CANCELLED"}
    tries = [line.split() for line in calls.read_text().splitlines()]
    once = [experiment for experiment, *_ in tries if experiment != "train"]
    assert once == ["prepare", "super_resolve", "super_resolve", "evaluate"]
    begun = {name: [int(step) for _, one, step, _ in tries[:6] if one == name] for name in steps}
    assert [len(begun[name]) for name in steps] == [3, 2]  # each goes on from where it was
    assert all(first == 0 < second for first, second, *_ in begun.values())
    assert sorted(begun["with-mmsr"]) == begun["with-mmsr"]
    gpus = {
        experiment: {gpu for one, _, _, gpu in tries if one == experiment} for experiment in once
    }
    assert gpus == {"prepare": {"none"}, "super_resolve": {"0", "1"}, "evaluate": {"none"}}
    assert {gpu for experiment, _, _, gpu in tries if experiment == "train"} == {"0", "1"}
    assert set(plan.states().values()) >= {"done"}
    assert dry_run(plan.file, plan.out, None, str(plan.profile)) == ["nothing is to be done"]


# Trainings are slow until they are let go.
SLOW = """
from pathlib import Path
if "ipykernel_launcher" in sys.orig_argv:
    import time
    import torch
    backward = torch.Tensor.backward
    def slowly(*values, **more):
        time.sleep(0 if Path(__file__).with_name("go").exists() else 0.5)
        return backward(*values, **more)
    torch.Tensor.backward = slowly
"""


@pytest.mark.nightly
@pytest.mark.timeout(1500)
def test_trainings_go_on_from_their_checkpoints(tmp_path: Path, slurm: SlurmNode) -> None:
    """A kernel is killed, a training's time is up, the node's power is cut, Snakemake is killed."""
    settings = yaml.safe_load(TINY.read_text())["train"]["with-mmsr"]["settings"]
    settings |= {"steps": 80, "checkpoint_every": 2, "history_every": 1}
    train = {name: {"settings": settings} for name in ("killed", "told")}
    plan = Plan(tmp_path, slurm, {"train": train, "retries": 2}, IMPATIENT + SLOW)
    place = {name: plan.out / "train" / name for name in train}

    def last_step(name: str) -> int:
        found = list_checkpoints(place[name] / "checkpoints")
        return max((int(path.stem.partition("-")[2]) for path in found), default=0)

    def trainings() -> list[str]:
        return [one for name in train for one in plan.jobs(f"train_wildcards_{name}")]

    def wait_for_steps(job: subprocess.Popen[bytes]) -> None:
        """Wait until both trainings have saved more than they had."""
        had = {name: last_step(name) for name in train}
        wait_for(lambda: job.poll() is not None or all(last_step(n) > had[n] for n in train), 600)
        assert job.poll() is None, plan.said.read_text()

    with plan.called() as job:
        wait_for_steps(job)
        prepared = (plan.out / "prepare" / "prepared.json").stat()
        (killed,), (told,) = (plan.jobs(f"train_wildcards_{name}") for name in train)
        for process in slurm.processes(killed):
            if "ipykernel_launcher" in process.cmdline():
                process.kill()
        slurm.ask("scancel", "--signal=TERM", told)  # as Slurm says before the time is up
        wait_for(lambda: not {killed, told} & {*trainings()})
        assert job.poll() is None, plan.said.read_text()
        wait_for_steps(job)

        jobs = trainings()
        time.sleep(25)  # a job that is younger counts as starting, and would be missed later
        slurm.daemons["slurmd"].kill()
        slurm.daemons["slurmd"].wait()
        for process in slurm.processes(*jobs):
            with suppress(psutil.NoSuchProcess):
                process.kill()
        slurm.start_slurmd()
        wait_for_steps(job)
        assert trainings() == jobs

        os.kill(plan.snakemake(job), signal.SIGKILL)
        job.wait(30)
    states = plan.states()
    assert states[""].endswith(": jobs are at work, but no `mmsr plan`; models: 2 running")
    assert states["prepare"] == "done"

    reached = {name: last_step(name) for name in train}
    with plan.called() as job:
        wait_for(lambda: job.poll() is not None or not {*jobs} & {*trainings()})
        assert all(last_step(name) >= reached[name] > 0 for name in train)
        (tmp_path / "go").touch()
        job.wait(900)
    assert job.returncode == 0, plan.said.read_text()
    assert (plan.out / "prepare" / "prepared.json").stat().st_mtime_ns == prepared.st_mtime_ns
    for folder in place.values():
        assert read_history(folder / "history.csv")["step"] == list(range(1, 81))
        assert load_generator(folder / "weights.safetensors")[1].training["steps"] == 80
    assert plan.states()[""].endswith(": nobody is at work; models: 2 done")
    assert dry_run(plan.file, plan.out, None, str(plan.profile)) == ["nothing is to be done"]
