"""Plans that go wrong, are looked at, and go on: through real Snakemake, as many people would."""

import os
import re
import subprocess
import sys
import time
from collections import Counter
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml

from mmsr.app import cli
from mmsr.app.plan import dry_run, find_profile, status_lines
from mmsr.app.run_notebook import page_error, read_parameters, read_yaml
from mmsr.app.train import TrainSettings, method_settings, training_status
from mmsr.core import FileError, SettingsError, read_json, write_json
from mmsr.networks.weights import load_generator
from mmsr.training.run_folder import locked, read_history

ROOT = Path(__file__).parents[2]
PLANS = ROOT / "workflow" / "plans"
TINY = Path(__file__).parent / "plans" / "tiny.yaml"
EVIDENCE = ROOT / "nbs" / "results" / "evidence"


def as_called_today(values: Any) -> Any:
    """Put the words of the version that trained the evidence runs into those of today."""
    words = {"strips_every": "previews_every", "judge": "discriminator_loss_min"}
    words |= {"pixel shuffle": "pixel_shuffle", "light": "strided"}
    if isinstance(values, dict):
        kept = {
            name: v for name, v in values.items() if name not in ("checkpoints_kept", "compile")
        }
        return {words.get(name, name): as_called_today(value) for name, value in kept.items()}
    return words.get(values, values) if isinstance(values, str) else values


def method_of(plan: dict[str, Any], model: str) -> dict[str, Any]:
    """Give the whole settings of a model of a plan."""
    values = {"prepared": "x", "run": "x", **plan["train"][model]}
    return method_settings(read_parameters(TrainSettings, values)).model_dump(mode="json")


@pytest.mark.parametrize(
    "kept", sorted(EVIDENCE.glob("*/config.json")), ids=lambda p: p.parent.name
)
def test_the_evidence_plan_is_what_was_trained(kept: Path) -> None:
    plan = read_yaml(PLANS / "evidence.yaml")
    assert len(plan["train"]) == 18
    assert method_of(plan, kept.parent.name) == as_called_today(read_json(kept)["settings"])


def test_every_run_that_is_kept_is_judged() -> None:
    """On the patients that the plan of its training holds out, and nothing else is judged."""
    kept = sorted(path.parent.name for path in EVIDENCE.glob("*/weights.safetensors"))
    judged, plan = read_yaml(PLANS / "kept_evidence.yaml"), read_yaml(PLANS / "evidence.yaml")
    assert sorted(judged["weights"]) == kept
    assert judged["prepare"] == plan["prepare"]
    numbers = read_json(EVIDENCE.with_name("kept_evidence.json"))
    assert {row["method"] for row in numbers["by_case"]} == {*kept, "nearest", "bicubic", "truth"}
    assert len(numbers["cases"]) == int(plan["prepare"]["held_out"])


def test_ablations_differ_in_one_thing() -> None:
    plan = read_yaml(PLANS / "ablation.yaml")
    reference, changed = method_of(plan, "reference"), set()
    for model in plan["train"]:
        settings = method_of(plan, model)
        names = {name for name in settings if settings[name] != reference[name]}
        allowed = {"identity_x", "identity_y"} if model == "identity" else {*list(names)[:1]}
        assert names == allowed, model
        changed |= names
    assert changed == {"seed", "mmsr", "identity_x", "identity_y", "degraded_fraction", "g1", "g2"}
    other = read_yaml(PLANS / "ablation_scale.yaml")
    assert other["prepare"].pop("micro_resample_um") == "117.2"
    assert other["prepare"] == plan["prepare"]
    assert method_of(other, "other-scale") == reference


@pytest.mark.parametrize("name", ["laptop", "gpus", "slurm"])
def test_profiles_hold_what_snakemake_knows(name: str) -> None:
    from snakemake.cli import get_argument_parser

    file = find_profile(name) / "config.yaml"
    known = {option for one in get_argument_parser()._actions for option in one.option_strings}
    options = yaml.safe_load(file.read_text())
    installed = find_spec("snakemake_executor_plugin_slurm") is not None
    asked = {option for option in options if installed or not option.startswith("slurm-")}
    assert {f"--{option}" for option in asked} <= known
    rules = re.findall(r"^rule (\w+):", (ROOT / "workflow" / "Snakefile").read_text(), re.MULTILINE)
    assert {*options.get("set-resources", {}), *options.get("set-threads", {})} <= {*rules}
    assert f"--profile {'my-gpus' if name == 'gpus' else name}" in file.read_text()


def test_what_is_no_plan_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "plan.json").mkdir()
    write_json(tmp_path / "config.json", {"cases": 3})
    for place in (tmp_path / "nowhere", tmp_path / "plan.json", tmp_path):
        with pytest.raises(FileError) as e:
            status_lines(place)
        assert "\n" not in str(e.value)
    (tmp_path / "plan").mkdir()
    write_json(tmp_path / "plan" / "plan.json", {"trian": {}})
    with pytest.raises(SettingsError, match="trian"):
        status_lines(tmp_path / "plan")
    with pytest.raises(SettingsError, match="expected gpus, laptop, slurm, or a folder"):
        find_profile("cloud")


def test_a_look_refuses_nobody(tmp_path: Path) -> None:
    """While one process looks again and again, another gets the lock each time it wants it."""
    (tmp_path / "lock").touch()
    code = (
        "import sys\nfrom mmsr.training.run_folder import is_locked\n"
        "print(1, flush=True)\nwhile True:\n    is_locked(sys.argv[1])"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as job:
        try:
            assert job.stdout
            job.stdout.readline()
            for _ in range(20):
                with locked(tmp_path):
                    pass
        finally:
            job.kill()


# Each kernel tells which GPU it has; the first that trains `killed` dies after a checkpoint.
KILLER = """
import os, sys, threading, time
from pathlib import Path
if "ipykernel_launcher" in sys.orig_argv:
    place = Path({place!r})
    with open(place / "gpus", "a") as file:
        file.write(os.environ.get("CUDA_VISIBLE_DEVICES", "all") + chr(10))
    def kill():
        while not list(place.glob("out/train/killed/checkpoints/step-*.pt")):
            time.sleep(0.01)
        (place / "killed").touch()
        os.kill(os.getpid(), 9)
    if not (place / "killed").exists():
        threading.Thread(target=kill, daemon=True).start()
"""


# Experiments that only write the last of their files: `bad` fails always, `once` the first time.
STUB = """
import json, os, sys
from pathlib import Path
if sys.orig_argv[1:4] == ["-m", "mmsr", "run"]:
    experiment, _, page = sys.orig_argv[4:7]
    name = Path(page).parent.name
    Path(page).parent.mkdir(parents=True, exist_ok=True)
    with open("calls", "a") as file:
        file.write(f"{experiment} {name} {os.environ.get('MMSR_GPUS')}" + chr(10))
    tries = Path("calls").read_text().count(f"train {name}")
    if experiment == "train" and (name == "bad" or (name == "once" and tries == 1)):
        os._exit(2)
    last = {"prepare": "prepare/prepared.json", "super_resolve": f"super_resolve/{name}/done.json"}
    if experiment in last:
        Path(last[experiment]).write_text("{}")
    os._exit(0)
"""


@pytest.mark.slow
def test_a_stubborn_failure_stops_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """What the workflow makes of experiments that fail, which here are stubs."""
    out, file, profile = (tmp_path / name for name in ("out", "plan.yaml", "profile"))
    plan = yaml.safe_load(TINY.read_text())
    plan["train"] = dict.fromkeys(("bad", "good", "once"), plan["train"]["with-mmsr"])
    file.write_text(yaml.safe_dump(plan))
    profile.mkdir()
    (profile / "config.yaml").write_text("cores: 1\nresources: [gpu=2]\n")
    steps = [line.partition(":")[0] for line in dry_run(file, out)]
    each = [f"{rule}/{name}" for rule in ("train", "super_resolve") for name in plan["train"]]
    assert sorted(steps) == sorted(["prepare", *each, "evaluate"])
    assert not out.exists()

    (tmp_path / "sitecustomize.py").write_text(STUB)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *sys.path[1:]]))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    with pytest.raises(SystemExit) as stopped:
        cli.main(["plan", str(file), "--out", str(out), "--profile", str(profile)])
    assert stopped.value.code == 2
    said = capfd.readouterr().err.splitlines()[-1]
    assert said == (
        f"mmsr: {out}: the plan was not finished: train/bad failed: the reason stands above; "
        "run again to go on"
    )
    calls = (out / "calls").read_text().splitlines()
    wanted = {"train bad": 2, "train good": 1, "train once": 2}
    wanted |= {"super_resolve good": 1, "super_resolve once": 1, "prepare prepare": 1}
    assert dict(Counter(line.rpartition(" ")[0] for line in calls)) == wanted
    assert {line.rpartition(" ")[2] for line in calls} == {"0,1"}
    head, *_, last = status_lines(out)
    assert head == f"{out}: nobody is at work; models: 2 done, 1 waiting"
    assert last == "evaluate  waiting"


@pytest.mark.nightly
@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="kernels are killed")
def test_one_that_fails_stops_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """One training diverges, one is killed once; both are tried again, and status tells it all."""
    plan = yaml.safe_load(TINY.read_text())
    tiny = plan["train"]["with-mmsr"]["settings"]
    slow = {**tiny, "steps": 40, "checkpoint_every": 4, "history_every": 1}
    plan["train"] = {
        "killed": {"settings": slow},
        "diverges": {"settings": {**tiny, "learning_rate": 1e30}},
    }
    out, file, profile = (tmp_path / name for name in ("out", "plan.yaml", "profile"))
    file.write_text(yaml.safe_dump(plan))
    profile.mkdir()
    (profile / "config.yaml").write_text("cores: 1\nresources: [gpu=2]\n")
    (tmp_path / "sitecustomize.py").write_text(KILLER.format(place=str(tmp_path)))
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    monkeypatch.setenv("PYTHONPATH", path)

    steps = [line.partition(":")[0] for line in dry_run(file, out)]
    models = ["diverges", "killed"]
    each = [f"{rule}/{model}" for rule in ("train", "super_resolve") for model in models]
    assert steps == ["prepare", *each, "evaluate"]
    assert not out.exists()

    arguments = ["plan", str(file), "--out", str(out), "--profile", str(profile)]
    seen: dict[str, set[str]] = {}
    said, end = tmp_path / "said", time.monotonic() + 300
    with open(said, "w") as terminal:
        job = subprocess.Popen([sys.executable, "-m", "mmsr", *arguments], stderr=terminal)
    try:
        while job.poll() is None:
            assert time.monotonic() < end
            for line in status_lines(out)[1:] if (out / "plan.json").exists() else []:
                name, state, *text = line.split(maxsplit=2)
                seen.setdefault(name, set()).add(state)
                seen.setdefault("text", set()).update(text)
            time.sleep(0.3)
    finally:
        job.kill()
    err = said.read_text()
    last = err.splitlines()[-1]
    assert job.returncode == 2, err
    assert last.startswith(f"mmsr: {out}: the plan was not finished: train/diverges failed: Div")
    assert last.endswith("run again to go on")
    assert "killed failed" not in last
    assert len(re.findall(r"^\[train/killed\] train: started$", err, re.MULTILINE)) == 2
    assert len(re.findall(r"^\[train/diverges\] train: started$", err, re.MULTILINE)) == 2

    assert read_history(out / "train/killed/history.csv")["step"] == list(range(1, 41))
    assert load_generator(out / "train/killed/weights.safetensors")[1].training["steps"] == 40
    assert (out / "super_resolve" / "killed" / "done.json").exists()
    assert "DivergenceError: step" in page_error(out / "train/diverges/notebook.running.ipynb")
    assert set((tmp_path / "gpus").read_text().splitlines()) == {"", "0"}  # prepare asks for none

    head, *lines = status_lines(out)
    states = {name: state for name, state, *_ in (line.split(maxsplit=2) for line in lines)}
    assert head == f"{out}: nobody is at work; models: 1 failed, 1 done"
    assert states == {
        "prepare": "done", "killed": "done", "diverges": "failed", "evaluate": "waiting"
    }  # fmt: skip
    assert seen["killed"] >= {"waiting", "running", "done"}
    running = r"^step \d+ of 40, .* steps/s, \d\d:\d\d left; .*cycle 0\.\d+"
    assert any(re.search(running, text) for text in seen["text"])
    steps = [line.partition(":")[0] for line in dry_run(file, out)]
    assert steps == ["train/diverges", "super_resolve/diverges", "evaluate"]
    assert training_status(out / "train" / "killed").state == "done"

    with pytest.raises(SystemExit) as stopped:
        cli.main(["status", str(out / "train" / "diverges")])
    assert stopped.value.code == 0
    assert re.search(r"diverges: failed; .*DivergenceError", capfd.readouterr().out)
