"""What people and machines do to a run: other arithmetic, tampered files, locks, signals."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_resume import SETTINGS, SYSTEMS, UNIT_SETTINGS, start_anew, train, write_banks

from mmsr.core import FileError, MMSRError, ResourceError, SettingsError
from mmsr.data.patches import open_bank
from mmsr.networks.weights import load_generator
from mmsr.training.distributed import make_fabric
from mmsr.training.health import HealthError
from mmsr.training.run_folder import list_checkpoints, load_checkpoint, locked, read_history
from mmsr.training.settings import HealthSettings, LoopSettings

pytestmark = [pytest.mark.slow, pytest.mark.no_cover]


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of each system."""
    folder = tmp_path_factory.mktemp("done")
    write_banks(folder)
    for name, settings in SYSTEMS.items():
        (folder / name).mkdir()
        train(start_anew(folder, folder / name, settings), settings)
    return folder


@pytest.fixture
def stopped(done: Path, tmp_path: Path) -> Path:
    """A run of SR-CycleGAN that was stopped at step 8."""
    folder = start_anew(done, tmp_path)
    train(folder, stop_at_step=8)
    return folder


def last_row(folder: Path) -> dict[str, float]:
    return {name: values[-1] for name, values in read_history(folder / "run/history.csv").items()}


@pytest.mark.parametrize(
    "system", ["SR-CycleGAN", pytest.param("SR-UNIT", marks=pytest.mark.nightly)]
)
def test_bf16_and_the_layout_change_little(done: Path, tmp_path: Path, system: str) -> None:
    settings = SYSTEMS[system]
    reference = last_row(done / system)
    for name, changes, precision, tolerance in (
        ("bf16", {}, "bf16", 0.1),
        ("last", {"channels_last": True}, "32", 0.02),
    ):
        (tmp_path / name).mkdir()
        folder = start_anew(done, tmp_path / name, settings)
        fabric = make_fabric("cpu", precision=precision)  # type: ignore[arg-type]
        run = train(folder, settings.model_copy(update=changes), fabric=fabric)
        assert run.finished
        row = last_row(folder)
        for column in ("total", "cycle_y", "structure_x", "d_y"):
            assert row[column] == pytest.approx(reference[column], rel=tolerance), (name, column)
        _, record = load_generator(run.weights)
        assert record.training["precision"] == ("bf16-mixed" if precision == "bf16" else "32-true")
    assert row["total"] != pytest.approx(last_row(tmp_path / "bf16")["total"], rel=1e-6)


def test_precision_belongs_to_the_run(stopped: Path) -> None:
    with pytest.raises(SettingsError, match='precision: "32-true" → "bf16-mixed"'):
        train(stopped, fabric=make_fabric("cpu", precision="bf16"))


def test_a_folder_of_another_system_is_refused(done: Path, stopped: Path) -> None:
    with pytest.raises(SettingsError, match=r'method: "SR-CycleGAN" → "SR-UNIT"'):
        train(stopped, UNIT_SETTINGS)
    assert train(stopped, UNIT_SETTINGS, on_change="move", stop_at_step=1).step == 1
    moved = stopped / "run/earlier-1"
    assert load_checkpoint(list_checkpoints(moved / "checkpoints")[0])["step"] == 8
    assert (moved / "previews/step-000000006.png").exists()
    assert (moved / "events.out.tfevents.mmsr").exists()


def test_nothing_is_moved_when_the_new_run_cannot_start(stopped: Path) -> None:
    wide = SETTINGS.model_copy(
        update={"mmsr": SETTINGS.mmsr.model_copy(update={"ssim_window": (11, 1.5)})}
    )
    with pytest.raises(MMSRError, match="ssim_window"):
        train(stopped, wide, on_change="move")
    assert not (stopped / "run/earlier-1").exists()


def test_two_processes_in_one_folder(stopped: Path) -> None:
    with locked(stopped / "run"), pytest.raises(ResourceError, match="another process trains"):
        train(stopped)
    assert train(stopped).finished


def test_results_without_checkpoints_are_not_overwritten(stopped: Path) -> None:
    shutil.rmtree(stopped / "run/checkpoints")
    before = (stopped / "run/weights.safetensors").read_bytes()
    with pytest.raises(FileError, match="no checkpoint to go on from"):
        train(stopped)
    assert (stopped / "run/weights.safetensors").read_bytes() == before


def tamper(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change what the latest checkpoint holds, and leave no other."""
    latest, *others = list_checkpoints(folder / "run/checkpoints")
    state = load_checkpoint(latest)
    change(state)
    torch.save(state, latest)
    for path in others:
        path.unlink()


TAMPERED: dict[str, Callable[[dict[str, Any]], Any]] = {
    "a moment of another shape": lambda s: s["optimiser_g"]["state"][0].update(
        exp_avg=torch.zeros(3)
    ),
    "no moments": lambda s: s["optimiser_d"]["state"].clear(),
    "a moment of another step": lambda s: s["optimiser_g"]["state"][0].update(
        step=torch.tensor(3.0)
    ),
    "a weight of another shape": lambda s: s["g1"].update({"last.bias": torch.zeros(2)}),
    "a weight that is none": lambda s: s["g1"].update({"last.bias": 1}),
    "no network": lambda s: s.pop("d_x"),
    "a pool of another size": lambda s: s["pool_x"].update(images=torch.zeros(2, 7, 1, 8, 8)),
    "an empty pool": lambda s: s["pool_x"].update(images=None),
    "sums of another length": lambda s: s["meter"].update(sums=torch.zeros(3)),
    "no sums": lambda s: s.pop("meter"),
    "another step": lambda s: s.update(step=7),
    "a step that is none": lambda s: s.update(step="8"),
    "no settings": lambda s: s.pop("config"),
}


@pytest.mark.parametrize("what", TAMPERED)
def test_tampered_checkpoint(stopped: Path, what: str) -> None:
    tamper(stopped, TAMPERED[what])
    with pytest.raises(MMSRError) as caught:
        train(stopped)
    assert "\n" not in str(caught.value)
    assert "step" in str(caught.value) or "settings" in str(caught.value)


def test_damaged_and_foreign_weights_are_written_anew(done: Path, stopped: Path) -> None:
    weights = stopped / "run/weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    train(stopped)
    whole = (done / "SR-CycleGAN/run/weights.safetensors").read_bytes()
    assert weights.read_bytes() == whole
    shutil.copy(done / "SR-UNIT/run/weights.safetensors", weights)
    train(stopped)
    assert weights.read_bytes() == whole


def test_a_history_that_is_none(stopped: Path) -> None:
    history = stopped / "run/history.csv"
    good = history.read_text()
    whole = good.encode()
    for bad in (whole + b"7,garbage\n", whole + b"7,1\n", b"\xff\xfe\x00", b"a,b\n1,2\n"):
        history.write_bytes(bad)
        with pytest.raises(FileError, match=r"is no history|expected the columns"):
            train(stopped)
        assert history.read_bytes() == bad
    history.write_text(good)
    train(stopped, stop_at_step=9)
    assert read_history(history)["step"] == [3, 6, 9]


def test_curves_that_cannot_be_written_end_no_run(stopped: Path) -> None:
    curves = stopped / "run/events.out.tfevents.mmsr"
    curves.unlink()
    curves.mkdir()
    with pytest.warns(UserWarning, match="no more curves for TensorBoard"):
        assert train(stopped).finished


def test_blank_outputs_stop_a_run_and_only_warn_about_a_baseline(
    done: Path, tmp_path: Path
) -> None:
    strict = HealthSettings(after=0, rows=2, spread_hu=1e5)
    plain = dict.fromkeys(("structure_x", "structure_y", "down", "up"), 0.0)

    def run(name: str, **changes: Any) -> None:
        (tmp_path / name).mkdir()
        settings: LoopSettings = SETTINGS.model_copy(update={"health": strict, **changes})
        train(start_anew(done, tmp_path / name, settings), settings)

    with pytest.raises(HealthError, match="step 6: the outputs are blank"):
        run("with")
    # The check is free to change: the same run goes on where it was stopped.
    off = SETTINGS.model_copy(update={"health": HealthSettings(spread_hu=None)})
    assert train(tmp_path / "with", off).finished
    with pytest.warns(UserWarning, match="the outputs are blank"):
        run("without", mmsr=SETTINGS.mmsr.model_copy(update=plain))


def test_poisoned_bank(stopped: Path) -> None:
    """A float bank with a NaN that nobody wrote through this package."""
    x, y = open_bank(stopped / "x"), open_bank(stopped / "y")
    patches = np.array(y.patches, np.float32)
    patches[3, 5, 7] = np.nan
    from mmsr.training.sr_cyclegan import train_sr_cyclegan

    with pytest.raises(MMSRError, match="micro bank: holds values that are not finite"):
        train_sr_cyclegan(SETTINGS, x, y._replace(patches=patches), stopped / "new")
    assert not (stopped / "new").exists()


LONG = """
import sys
import torch
torch.set_num_threads(1)
from mmsr.core import MMSRError
from test_resume import *
try:
    train(Path(sys.argv[1]), SETTINGS.model_copy(update={"steps": 100000, "previews_every": 0}))
except MMSRError as e:
    print(e)
    sys.exit(2)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_an_orderly_end(done: Path, tmp_path: Path, number: signal.Signals) -> None:
    """Slurm, Ctrl-C, a closed terminal: the step is finished and saved, one line is said."""
    folder = start_anew(done, tmp_path)
    process = subprocess.Popen(
        [sys.executable, "-c", LONG, str(folder)],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent)},
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        end = time.monotonic() + 60
        while not list_checkpoints(folder / "run/checkpoints"):
            assert time.monotonic() < end
            time.sleep(0.05)
        time.sleep(0.3)
        process.send_signal(number)
        said, _ = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 2
    assert f"was told to end ({number.name}) and is saved; run again to go on" in said
    step = load_checkpoint(list_checkpoints(folder / "run/checkpoints")[0])["step"]
    assert f"step {step}:" in said
