"""Two processes with half of the batch each are one process with the whole batch.

Real processes over gloo on the loopback interface: started by hand as a cluster's launcher would,
by torchrun, and by srun of a real Slurm, where there is one.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from slurm_node import SlurmNode, free_ports
from test_resume import SYSTEMS, train, write_banks

from mmsr.core import SettingsError
from mmsr.networks.weights import load_generator
from mmsr.training.run_folder import list_checkpoints, load_checkpoint, read_history
from mmsr.training.settings import LoopSettings

pytestmark = pytest.mark.slow

WORKER = """
import json, sys
import torch
torch.set_num_threads(1)
from mmsr.core import MMSRError, read_json
from mmsr.training.distributed import make_fabric
from mmsr.training.run import RunOptions
from mmsr.data.patches import open_bank
from mmsr.training.sr_cyclegan import SRCycleGANSettings, train_sr_cyclegan
from mmsr.training.sr_unit import SRUNITSettings, train_sr_unit

folder, options = sys.argv[1], json.loads(sys.argv[2])
values = read_json(folder + "/settings.json")
banks = open_bank(folder + "/x"), open_bank(folder + "/y")
kind, train = SRCycleGANSettings, train_sr_cyclegan
if "unit" in values:
    kind, train = SRUNITSettings, train_sr_unit
try:
    fabric = make_fabric("cpu", devices=2)
    how = RunOptions(progress=False, **options)
    train(kind.read(values), *banks, folder + "/run", fabric=fabric, options=how)
except MMSRError as e:
    print(f"{type(e).__name__}: {e}", file=sys.stderr)
    sys.exit(2)
"""
LIMIT_S = 120


def by_hand(command: list[str]) -> subprocess.CompletedProcess[str]:
    """Start two processes with the variables that a launcher sets."""
    (port,) = free_ports(1)
    shared = {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "0", "TORCHELASTIC_RUN_ID": "test",
        "GLOO_SOCKET_IFNAME": "lo",
    }  # fmt: skip
    processes = [
        subprocess.Popen(
            [sys.executable, *command],
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        errors = [process.communicate(timeout=LIMIT_S)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    code = max(abs(process.returncode) for process in processes)
    return subprocess.CompletedProcess(command, code, "", "".join(errors))


def torchrun(command: list[str]) -> subprocess.CompletedProcess[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
    launcher += ["--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0", "--local-addr=127.0.0.1"]
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*launcher, *command], env=environment, capture_output=True, text=True, timeout=LIMIT_S
    )


Launch = Callable[[list[str]], subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Banks, and a whole run of each system in one process."""
    folder = tmp_path_factory.mktemp("one")
    write_banks(folder)
    (folder / "worker.py").write_text(WORKER)
    torch_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for name, settings in SYSTEMS.items():
        own = prepare(folder, folder / name, settings)
        train(own, settings)
    torch.set_num_threads(torch_threads)
    return folder


def prepare(banks: Path, folder: Path, settings: LoopSettings) -> Path:
    """Make a folder for a run on the same banks."""
    folder.mkdir()
    for name in ("x", "y"):
        (folder / name).symlink_to(banks / name)
    (folder / "settings.json").write_text(settings.model_dump_json())
    return folder


def launch(how: Launch, place: Path, folder: Path, **options: int) -> str:
    """Train in two processes and return what they said when they failed."""
    done = how([str(place / "worker.py"), str(folder), json.dumps(options)])
    return "" if done.returncode == 0 else done.stderr or "failed"


def assert_close_run(folder: Path, whole: Path) -> None:
    """Compare two runs that differ by the order of sums only."""
    ours, theirs = (read_history(f / "run/history.csv") for f in (folder, whole))
    assert ours.keys() == theirs.keys()
    for name in theirs:
        np.testing.assert_allclose(ours[name], theirs[name], rtol=2e-3, atol=2e-4, err_msg=name)
    nets = [load_generator(f / "run/weights.safetensors")[0] for f in (folder, whole)]
    for one, other in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-2, atol=1e-3)
    states = [load_checkpoint(list_checkpoints(f / "run/checkpoints")[0]) for f in (folder, whole)]
    assert states[0].keys() == states[1].keys()
    if "pool_y" in states[0]:
        pools = [state["pool_y"]["images"] for state in states]
        torch.testing.assert_close(*pools, rtol=0, atol=5e-3)


@pytest.mark.parametrize(
    ("how", "system"),
    [
        (torchrun, "SR-CycleGAN"),
        (by_hand, "SR-UNIT"),
        pytest.param(by_hand, "SR-CycleGAN", marks=pytest.mark.nightly),
        pytest.param(torchrun, "SR-UNIT", marks=pytest.mark.nightly),
    ],
)
def test_two_processes_are_one_with_twice_the_batch(
    place: Path, tmp_path: Path, how: Launch, system: str
) -> None:
    folder = prepare(place, tmp_path / "two", SYSTEMS[system])
    assert launch(how, place, folder) == ""
    assert_close_run(folder, place / system)


def test_two_tasks_of_slurm(place: Path, tmp_path: Path, slurm: SlurmNode) -> None:
    folder = prepare(place, tmp_path / "slurm", SYSTEMS["SR-CycleGAN"])
    command = ["srun", "--ntasks=2", "--ntasks-per-node=2", "--overcommit", sys.executable]
    done = subprocess.run(
        [*command, str(place / "worker.py"), str(folder), "{}"],
        env={**slurm.environment, "GLOO_SOCKET_IFNAME": "lo"},
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
    )
    assert done.returncode == 0, done.stderr
    assert_close_run(folder, place / "SR-CycleGAN")


def test_go_on_with_another_number_of_processes(place: Path, tmp_path: Path) -> None:
    """One, then two, then one again: pools, moments and means are dealt out and gathered."""
    folder = prepare(place, tmp_path / "changing", SYSTEMS["SR-CycleGAN"])
    assert train(folder, SYSTEMS["SR-CycleGAN"], stop_at_step=10).step == 10
    assert launch(by_hand, place, folder, stop_at_step=17) == ""
    assert train(folder, SYSTEMS["SR-CycleGAN"]).finished
    assert_close_run(folder, place / "SR-CycleGAN")


def test_a_batch_that_cannot_be_dealt_out_is_refused(place: Path, tmp_path: Path) -> None:
    odd = SYSTEMS["SR-CycleGAN"].model_copy(update={"batch_size": 3})
    folder = prepare(place, tmp_path / "odd", odd)
    error = launch(by_hand, place, folder)
    lines = [line for line in error.splitlines() if line.startswith("SettingsError")]
    assert len(lines) == 2
    assert "batch_size: 3 cannot be dealt out evenly to 2 processes" in lines[0]
    assert not (folder / "run").exists()


def test_several_devices_need_a_launcher() -> None:
    from mmsr.training.distributed import make_fabric

    with pytest.raises(SettingsError, match="start them with torchrun --nproc-per-node=2"):
        make_fabric("cpu", devices=2)
