"""A training run may be killed at any moment: it must end with the bits of one that never was.

`make test` kills a few real processes; MMSR_KILLS=20 kills more.
"""

import contextlib
import errno
import json
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import time
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mmsr.core import (
    FileError,
    ResourceError,
    SettingsError,
    ShapeError,
    read_json,
    seeded,
    write_json,
)
from mmsr.data.patches import PatchBank, PatchCase, open_bank, write_bank
from mmsr.data.windows import Window
from mmsr.networks.weights import load_generator
from mmsr.training import sr_cyclegan, sr_unit
from mmsr.training.health import DivergenceError, check_finite_weights
from mmsr.training.run import RunOptions, TrainedRun
from mmsr.training.run_folder import (
    CHECKPOINT_FORMAT,
    list_checkpoints,
    load_checkpoint,
    read_history,
    save_checkpoint,
)
from mmsr.training.settings import LoopSettings
from mmsr.training.sr_cyclegan import cyclegan_settings, train_sr_cyclegan
from mmsr.training.sr_unit import train_sr_unit, unit_settings

pytestmark = [pytest.mark.slow, pytest.mark.no_cover]  # measured where one run is enough

KILLS = int(os.environ.get("MMSR_KILLS", "3"))
LOOP = {
    "steps": 24,
    "batch_size": 2,
    "ema": 0.9,
    "history_every": 3,
    "checkpoint_every": 4,
    "previews_every": 6,
}
DISCRIMINATORS = {"d_x": {"channels": 8, "layers": 1}, "d_y": {"channels": 8, "layers": 1}}
SMALL = {"channels": 8, "blocks": 1}
# The defaults with all that draws random numbers: noise in G1, pools, noise on UNIT's latents, R15.
SETTINGS = cyclegan_settings(
    changes={
        **LOOP,
        **DISCRIMINATORS,
        "g1": {**SMALL, "head_kernel": 3, "last_kernel": 3},
        "g2": SMALL,
        "pool_size": 10,
        "degraded_fraction": 0.25,
    }
)
UNIT_SETTINGS = unit_settings(
    changes={**LOOP, **DISCRIMINATORS, "unit": {"latent": 8, "blocks": 1}}
)
QUIET = RunOptions(progress=False)
SYSTEMS: dict[str, LoopSettings] = {"SR-CycleGAN": SETTINGS, "SR-UNIT": UNIT_SETTINGS}
# Loads the library once, then forks a process for each line on its input, tells its number, and
# how it ended. A process may be told to kill itself at a certain call of os.replace, just before
# or just after a file is moved into place.
NURSERY = """
import json, os, signal, sys
import torch
torch.set_num_threads(1)
from mmsr.core import read_json
from mmsr.data.patches import open_bank
from mmsr.training.run import RunOptions
from mmsr.training.sr_cyclegan import SRCycleGANSettings, train_sr_cyclegan
from mmsr.training.sr_unit import SRUNITSettings, train_sr_unit

quiet = RunOptions(progress=False)

def train(folder, when, at):
    calls, replace = 0, os.replace
    def fatal(old, new):
        nonlocal calls
        calls += 1
        if calls == at and when == "after":
            replace(old, new)
        if calls == at:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(old, new)
    os.replace = fatal
    values = read_json(folder + "/settings.json")
    x, y = open_bank(folder + "/x"), open_bank(folder + "/y")
    if "unit" in values:
        train_sr_unit(SRUNITSettings.read(values), x, y, folder + "/run", options=quiet)
    else:
        train_sr_cyclegan(SRCycleGANSettings.read(values), x, y, folder + "/run", options=quiet)

print("ready", flush=True)
for line in sys.stdin:
    child = os.fork()
    if not child:
        code = 1
        try:
            train(*json.loads(line))
            code = 0
        finally:
            os._exit(code)
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


def write_banks(folder: Path) -> tuple[PatchBank, PatchBank]:
    """Cut patches of 8 and 64 pixels from smooth noise."""
    banks = []
    for name, modality, size, side in (("x", "clinical", 8, 48), ("y", "micro", 64, 160)):
        noise = seeded(0, "scan", name).normal(0, 1, (2, side // 4, side // 4))
        array = np.kron(noise, np.ones((1, 4, 4))) * 200 - 600
        volume = types.SimpleNamespace(array=array.astype(np.int16), spacing_mm=(1.0, 0.625, 0.625))
        case = PatchCase(f"case {name}", volume, np.ones(array.shape, bool))
        window = Window(-1000.0, 50.0, "HU" if name == "x" else "grey")
        banks.append(
            write_bank(
                folder / name,
                [case],
                modality=modality,  # type: ignore[arg-type]
                size=size,
                per_case=12,
                window=window,
                seed=0,
            )
        )
    return banks[0], banks[1]


@pytest.fixture(scope="module")
def wholes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Train each system without a break, once."""
    folders = {name: tmp_path_factory.mktemp("whole") for name in SYSTEMS}
    for name, folder in folders.items():
        write_banks(folder)
        train(folder, SYSTEMS[name])
    return folders


@pytest.fixture(scope="module")
def whole(wholes: dict[str, Path]) -> Path:
    return wholes["SR-CycleGAN"]


def start_anew(whole: Path, folder: Path, settings: LoopSettings = SETTINGS) -> Path:
    """Give the same banks, and no run."""
    for name in ("x", "y"):
        shutil.copytree(whole / name, folder / name)
    (folder / "settings.json").write_text(settings.model_dump_json())
    return folder


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    return start_anew(whole, tmp_path)


def train(folder: Path, settings: LoopSettings = SETTINGS, **options: Any) -> TrainedRun:
    """Train in this process on the banks of a folder."""
    banks = open_bank(folder / "x"), open_bank(folder / "y")
    fabric = options.pop("fabric", None)
    how = RunOptions(**{"progress": False, **options})
    if isinstance(settings, sr_unit.SRUNITSettings):
        return train_sr_unit(settings, *banks, folder / "run", fabric=fabric, options=how)
    assert isinstance(settings, sr_cyclegan.SRCycleGANSettings)
    return train_sr_cyclegan(settings, *banks, folder / "run", fabric=fabric, options=how)


class Nursery:
    """A process that starts training processes quickly."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", NURSERY],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.line() == "ready"

    def line(self) -> str:
        """Wait for the next line of its output."""
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def start(self, folder: Path, when: str = "never", at: int = 0) -> int:
        """Train in a new process and return its number; `line` then tells how it ended."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps([str(folder), when, at]) + "\n")
        self.process.stdin.flush()
        return int(self.line())


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    nursery = Nursery()
    yield nursery
    nursery.process.kill()
    nursery.process.communicate()


def assert_same(a: Any, b: Any, name: str = "state") -> None:
    """Compare two checkpoints to the bit."""
    assert type(a) is type(b), name
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype, name
        assert torch.equal(a, b), name
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), name
        for key in a:
            assert_same(a[key], b[key], f"{name}.{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), name
        for i, (one, other) in enumerate(zip(a, b, strict=True)):
            assert_same(one, other, f"{name}.{i}")
    else:
        assert a == b, name


def assert_same_run(folder: Path, whole: Path) -> None:
    """Compare all that two finished runs left."""
    previews = [f"previews/{path.name}" for path in (whole / "run/previews").iterdir()]
    for file in ("history.csv", "weights.safetensors", "config.json", *previews):
        assert (folder / "run" / file).read_bytes() == (whole / "run" / file).read_bytes(), file
    ours, theirs = (list_checkpoints(f / "run/checkpoints") for f in (folder, whole))
    assert [path.name for path in ours] == [path.name for path in theirs]
    for one, other in zip(ours, theirs, strict=True):
        assert_same(load_checkpoint(one), load_checkpoint(other), one.name)
    left = [path.name for path in (folder / "run").rglob(".*")]
    assert not left, f"leftovers of killed writes: {left}"


def test_the_pools_and_moments_are_compared(whole: Path) -> None:
    """The comparison below would be empty if checkpoints held less than they should."""
    state = load_checkpoint(list_checkpoints(whole / "run/checkpoints")[0])
    assert state["step"] == SETTINGS.steps
    assert state["pool_x"]["images"].shape == (2, 5, 1, 8, 8)
    assert state["pool_y"]["images"].shape == (2, 5, 1, 64, 64)
    assert len(state["optimiser_g"]["state"]) > 10
    other = {**state, "pool_x": {**state["pool_x"], "images": state["pool_x"]["images"] + 1e-7}}
    with pytest.raises(AssertionError, match="pool_x"):
        assert_same(state, other)


@pytest.mark.parametrize(
    "system", ["SR-CycleGAN", pytest.param("SR-UNIT", marks=pytest.mark.nightly)]
)
def test_kill_at_random_moments(
    system: str, wholes: dict[str, Path], tmp_path: Path, nursery: Nursery
) -> None:
    """Kill one run again and again, wherever it happens to be, until it has had its share."""
    whole = wholes[system]
    folder = start_anew(whole, tmp_path, SYSTEMS[system])
    moments = random.Random(0)
    kills, progress = 0, set()
    history = folder / "run/history.csv"
    while True:
        seen, before = history.stat().st_ino if history.exists() else 0, 0
        pid = nursery.start(folder)
        if kills < KILLS:
            end, rows = time.monotonic() + 20, moments.randint(0, 3)
            started = False  # on starting, the rows after the last checkpoint go
            while not started or len(history.read_text().splitlines()) < before + rows:
                if not started:
                    started = history.exists() and history.stat().st_ino != seen
                    before = len(history.read_text().splitlines()) if started else 0
                if (folder / "run/weights.safetensors").exists():
                    break
                assert time.monotonic() < end
                time.sleep(0.001)
            time.sleep(moments.uniform(0, 0.05))
            with contextlib.suppress(ProcessLookupError):  # it may be done already
                os.kill(pid, signal.SIGKILL)
        code = int(nursery.line())
        assert code in (0, -signal.SIGKILL)
        if code:
            kills += 1
            progress.add(len(history.read_text().splitlines()))
            continue
        assert_same_run(folder, whole)
        if kills >= KILLS:
            break
        shutil.rmtree(folder / "run")  # it was done before the last kill: once more
    assert len(progress) > 1  # not always at the same step


# What a whole run moves into place, in order; a number is the checkpoint of that step.
MOVES = ["config", "environment", "history", "row", 4, "row", "preview", 8, "row", "row", "preview"]
MOVES += [12, "row", 16, "row", "preview", "row", 20, "row", "preview", 24, "weights"]


@pytest.mark.parametrize(
    ("when", "at"),
    [
        pytest.param("before", 1, marks=pytest.mark.nightly),
        pytest.param("after", 3, marks=pytest.mark.nightly),
        pytest.param("before", 4, marks=pytest.mark.nightly),
        ("after", 5),
        pytest.param("after", 8, marks=pytest.mark.nightly),
        ("before", 12),
        pytest.param("after", 21, marks=pytest.mark.nightly),
        pytest.param("before", 22, marks=pytest.mark.nightly),
    ],
)
def test_kill_while_a_file_is_moved_into_place(
    folder: Path, whole: Path, nursery: Nursery, when: str, at: int
) -> None:
    nursery.start(folder, when, at)
    assert int(nursery.line()) == -signal.SIGKILL
    moved = MOVES[: at if when == "after" else at - 1]
    steps = [step for step in moved if isinstance(step, int)][::-1]
    # A checkpoint that was just moved has not yet pushed out the oldest.
    steps = steps[: 3 if when == "after" and isinstance(moved[-1], int) else 2]
    found = [load_checkpoint(p)["step"] for p in list_checkpoints(folder / "run/checkpoints")]
    assert found == steps
    train(folder)
    assert_same_run(folder, whole)


@pytest.mark.parametrize("stop", [1, 6])
def test_stop_and_go_on(folder: Path, whole: Path, stop: int) -> None:
    """A run that is told to stop writes a checkpoint wherever it is, and usable weights."""
    run = train(folder, stop_at_step=stop)
    assert (run.step, run.finished) == (stop, False)
    _, record = load_generator(run.weights)
    assert record.training["steps"] == stop
    assert record.training["steps_planned"] == SETTINGS.steps
    assert train(folder, stop_after_s=0.0).step == stop + 1
    assert train(folder).finished
    # Stopping leaves checkpoints of its own, which the two latest no longer show.
    assert_same_run(folder, whole)


def test_a_finished_run_is_left_alone(whole: Path) -> None:
    files = [path for path in (whole / "run").rglob("*") if path.suffix in (".pt", ".safetensors")]
    before = {path: path.stat().st_mtime_ns for path in files}
    run = train(whole)
    assert run.finished
    assert run.step == SETTINGS.steps
    assert {path: path.stat().st_mtime_ns for path in files} == before
    saved, _ = load_generator(run.weights)
    for ours, theirs in zip(run.g1.parameters(), saved.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_history_equals_the_steps(whole: Path) -> None:
    history = read_history(whole / "run/history.csv")
    assert history["step"] == [*range(3, 24, 3), 24]
    assert {"total", "structure_x", "d_x", "gradient_g", "spread_hu"} <= set(history)
    assert all(np.isfinite(values).all() for values in history.values())


@pytest.mark.parametrize("damage", ["cut", "empty", "flipped", "foreign", "hostile"])
def test_damaged_checkpoint(folder: Path, whole: Path, damage: str) -> None:
    """The newest is damaged: a warning names it, and the one before it is taken."""
    train(folder, stop_at_step=8)
    newest, _ = list_checkpoints(folder / "run/checkpoints")
    content = newest.read_bytes()
    marker = folder / "hostile code ran"

    class Hostile:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(marker),)

    if damage == "flipped":
        place = content.index(load_checkpoint(newest)["g1"]["last.weight"].numpy().tobytes())
        content = content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]
    content = {"cut": content[:-1000], "empty": b"", "foreign": b"PK\x03\x04 no"}.get(
        damage, content
    )
    newest.write_bytes(content)
    if damage == "hostile":
        torch.save({"g1": Hostile(), "format": CHECKPOINT_FORMAT}, newest)
    with pytest.raises(FileError, match=newest.name) as caught:
        load_checkpoint(newest)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400
    with pytest.warns(UserWarning, match=f"{newest.name}.*taking the checkpoint before it"):
        train(folder)
    assert not marker.exists()
    assert_same_run(folder, whole)

    for path in list_checkpoints(folder / "run/checkpoints"):
        path.write_bytes(content[:100])
    with (
        pytest.raises(FileError, match="no other is left"),
        pytest.warns(UserWarning, match="taking the checkpoint before it"),
    ):
        train(folder)


def test_plain_pickle_is_not_opened(tmp_path: Path) -> None:
    class Hostile:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "ran"),)

    (tmp_path / "step-000000001.pt").write_bytes(pickle.dumps(Hostile()))
    with pytest.raises(FileError, match="is not a checkpoint"):
        load_checkpoint(tmp_path / "step-000000001.pt")
    assert not (tmp_path / "ran").exists()


def test_other_settings_are_refused(folder: Path) -> None:
    train(folder, stop_at_step=1)
    other = SETTINGS.model_copy(update={"learning_rate": 1e-3, "steps": 50})
    before = (folder / "run/config.json").read_bytes()
    with pytest.raises(SettingsError) as caught:
        train(folder, other)
    text = str(caught.value)
    assert "\n" not in text
    assert "settings.learning_rate: 0.0002 → 0.001" in text
    assert "settings.steps: 24 → 50" in text
    assert (folder / "run/config.json").read_bytes() == before
    often = SETTINGS.model_copy(update={"checkpoint_every": 1})
    assert train(folder, often, stop_at_step=2).step == 2  # decides no result: allowed


def test_checkpoint_of_another_run_is_refused(folder: Path, whole: Path) -> None:
    """config.json was lost, or checkpoints were copied in."""
    train(folder, stop_at_step=1)
    (folder / "run/config.json").unlink()
    with pytest.raises(SettingsError, match=r"settings\.seed: 0 → 1"):
        train(folder, SETTINGS.model_copy(update={"seed": 1}))


def test_other_patches_are_refused(folder: Path) -> None:
    train(folder, stop_at_step=1)
    x = open_bank(folder / "x")
    info = x.info.model_copy(update={"fingerprint": "0" * 16})
    with pytest.raises(SettingsError, match=r"data\.clinical\.fingerprint"):
        train_sr_cyclegan(
            SETTINGS, x._replace(info=info), open_bank(folder / "y"), folder / "run", options=QUIET
        )


def test_swapped_or_unfit_banks(folder: Path) -> None:
    x, y = open_bank(folder / "x"), open_bank(folder / "y")
    with pytest.raises(SettingsError, match="swapped"):
        train_sr_cyclegan(SETTINGS, y, x, folder / "run", options=QUIET)
    small = y._replace(info=y.info.model_copy(update={"size": 32}))
    with pytest.raises(ShapeError, match="expected patches of 64 pixels"):
        train_sr_cyclegan(SETTINGS, x, small, folder / "run", options=QUIET)
    assert not (folder / "run").exists()


def test_full_disk(folder: Path, whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk fills up in the middle of the second checkpoint; the first stays, and serves."""
    write = Path.write_bytes

    def full(self: Path, data: bytes) -> int:
        if "step-000000008" in self.name:
            write(self, bytes(data)[:500])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(self, data)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        with pytest.raises(
            ResourceError, match=r"step-000000008\.pt: not written, the disk is full"
        ):
            train(folder)
    files = [path.name for path in (folder / "run/checkpoints").iterdir()]
    assert files == ["step-000000004.pt"]
    train(folder)
    assert_same_run(folder, whole)


def test_full_disk_in_the_history(
    folder: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk fills up while a row is written; the rows before it stay."""
    write = Path.write_text

    def full(self: Path, text: str, **how: Any) -> int:
        if "history" in self.name and "\n6," in text:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(self, text, **how)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", full)
        with pytest.raises(ResourceError, match=r"history\.csv: not written, the disk is full"):
            train(folder)
    assert read_history(folder / "run/history.csv")["step"] == [3]
    train(folder)
    assert_same_run(folder, whole)


def test_folder_that_cannot_be_made(folder: Path) -> None:
    (folder / "run").write_text("a file")
    with pytest.raises(FileError, match="run folder cannot be made"):
        train(folder)


def test_divergence_keeps_the_last_checkpoint(
    folder: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cycle, calls = sr_cyclegan.reconstruction_loss, 0

    def diverging(image: torch.Tensor, cycled: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return cycle(image, cycled) * (float("nan") if calls == 2 * 7 else 1.0)

    with monkeypatch.context() as patch:
        patch.setattr(sr_cyclegan, "reconstruction_loss", diverging)
        with pytest.raises(DivergenceError, match="step 7: 'total' is nan"):
            train(folder)
    assert [path.name for path in list_checkpoints(folder / "run/checkpoints")] == [
        "step-000000004.pt"
    ]
    train(folder)
    assert_same_run(folder, whole)


def test_weights_that_are_not_finite_are_never_saved(folder: Path) -> None:
    """A gradient overflowed, the loss before it did not: the checkpoint is refused."""
    run = train(folder, stop_at_step=1)
    with torch.no_grad():
        next(run.networks.g2.parameters()).view(-1)[0] = float("inf")
    with pytest.raises(DivergenceError, match="the weight g2"):
        check_finite_weights(run.networks._asdict(), 1)


def test_keep(tmp_path: Path) -> None:
    for step in (1, 2, 10, 30):
        save_checkpoint(tmp_path, step, {"a": torch.ones(1)})
    assert [load_checkpoint(path)["step"] for path in list_checkpoints(tmp_path)] == [30, 10]


def test_nothing_names_the_place_or_the_user(whole: Path) -> None:
    run = whole / "run"
    text = (run / "config.json").read_text() + (run / "environment.json").read_text()
    _, record = load_generator(run / "weights.safetensors")
    text += record.model_dump_json() + str(
        load_checkpoint(list_checkpoints(run / "checkpoints")[0])
    )
    assert str(whole) not in text
    assert str(Path.home()) + os.sep not in text
    data = read_json(run / "config.json")["data"]
    assert data["clinical"]["cases"].keys() == {"case x"}
    assert data["micro"]["fingerprint"] in record.data


def test_the_callers_random_numbers_are_untouched(folder: Path) -> None:
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    train(folder, stop_at_step=1)
    assert torch.equal(torch.rand(2), expected)


def test_words_of_earlier_versions_are_refused_by_those_of_today(folder: Path) -> None:
    """A run that an earlier version left unfinished: one line, and the way out works."""
    train(folder, stop_at_step=1)
    config = read_json(folder / "run/config.json")
    config["settings"]["strips_every"] = config["settings"].pop("previews_every")
    config["settings"]["health"]["judge"] = config["settings"]["health"].pop(
        "discriminator_loss_min"
    )
    write_json(folder / "run/config.json", config)
    with pytest.raises(SettingsError) as caught:
        train(folder)
    assert "\n" not in str(caught.value)
    assert "strips_every is called previews_every now" in str(caught.value)
    assert "judge is called discriminator_loss_min now" in str(caught.value)
    assert train(folder, on_change="move", stop_at_step=1).step == 1
    assert (folder / "run/earlier-1/config.json").exists()
    for values in ({"strips_every": 1}, {"health": {"judge": 0.1}}):
        with pytest.raises(SettingsError, match=r"is called \w+ now"):
            cyclegan_settings(changes=values)
    with pytest.raises(SettingsError, match="released is called code_2022 now"):
        cyclegan_settings("released")  # type: ignore[arg-type]


def test_a_history_of_before_is_read(folder: Path, whole: Path) -> None:
    """Its columns have not changed, so curves and verdicts of old runs are drawn as they were."""
    columns = (
        "step,total,adversarial_x,adversarial_y,cycle_x,cycle_y,identity_x,identity_y,structure_x,"
        "structure_y,down,up,d_x,d_y,gradient_g,gradient_d,correlation,drift_hu,spread_hu"
    )
    assert (whole / "run/history.csv").read_text().splitlines()[0] == columns
