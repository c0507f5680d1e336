"""The whole chain, through real Snakemake and papermill: stopped, changed, wrong; on real scans."""

import copy
import errno
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
import pytest
import yaml

from mmsr.app import cli
from mmsr.app.plan import check_plan, snakemake_command
from mmsr.app.prepare import prepare
from mmsr.app.run_notebook import run_experiment
from mmsr.app.train import TrainSettings, launch_training, method_settings, train
from mmsr.app.training_cases import PrepareSettings, clinical_cases
from mmsr.core import FileError, MMSRError, ResourceError, SettingsError, ShapeError, read_json
from mmsr.data.patches import open_bank
from mmsr.data.sampling import split_cases
from mmsr.evaluation.protocols import Model, columns_of, measure_case, open_models
from mmsr.evaluation.report import SITE
from mmsr.evaluation.structure import Structure
from mmsr.inference.two_grids import enlarge_bicubic
from mmsr.networks.weights import load_generator
from mmsr.scans.cases import open_case, prepared_cases, read_prepared
from mmsr.scans.read import read_volume
from mmsr.training.run_folder import read_history

REAL = os.environ.get("MMSR_REAL_DATA")
TINY = Path(__file__).parent / "plans" / "tiny.yaml"
MODELS = ("with-mmsr", "without-mmsr")
SMALL_NETWORKS = {
    "g1": {"channels": 8, "blocks": 1, "norm": "none", "skip": False, "noise": False},
    "g2": {"channels": 8, "blocks": 1},
    "d_x": {"channels": 4, "layers": 1},
    "d_y": {"channels": 4, "layers": 2},
    "batch_size": 2,
}


@pytest.fixture(scope="module", autouse=True)
def progress_as_text() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MMSR_PROGRESS", "text")  # run_experiment sets it: put it back afterwards
        yield


def snakemake(plan: Path, out: Path) -> str:
    """Carry out a plan in a process of its own; give what the experiments printed."""
    out.mkdir(exist_ok=True)
    command = snakemake_command(plan, out, 2)
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def stamps(folder: Path) -> dict[str, int]:
    """Give the time of the last change of each file of a plan's folder."""
    files = (p for p in sorted(folder.rglob("*")) if p.is_file())
    return {
        str(p.relative_to(folder)): p.stat().st_mtime_ns
        for p in files
        if ".snakemake" not in p.parts
    }


def started(err: str) -> list[str]:
    """List the places of the experiments that were started."""
    return sorted(re.findall(r"^\[([^\]]*)\] \w+: started$", err, re.MULTILINE))


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the tiny plan, carried out once."""
    out = tmp_path_factory.mktemp("chain") / "tiny"
    said = snakemake(TINY, out)
    assert len(started(said)) == 6
    return out


@pytest.fixture
def own_chain(chain: Path, tmp_path: Path) -> Path:
    """A copy of the folder that a test may change."""
    return shutil.copytree(chain, tmp_path / "tiny")


@pytest.mark.slow
def test_report_holds_everything_in_one_page(chain: Path) -> None:
    page = (chain / "report.html").read_text(encoding="utf8")
    outside = re.findall(r"(?:src|href|action|url)\s*=?\s*[\"'(]\s*(?!data:)([^\"')]+)", page)
    assert outside == [SITE]  # one link to follow; nothing is fetched
    assert page.count(f"<a href='{SITE}'>") == page.count("https:") == 1
    assert "http:" not in page
    assert "<script" not in page
    assert page.count("src='data:image/png;base64,") >= 3  # the held-out case and two histories
    assert all(f">{label}<" in page for label in (*MODELS, "bicubic", "truth"))
    assert "Research only" in page
    order = ["What may be believed", "Pictures", "Numbers", "What was trained", "How this page"]
    places = [page.index(f"<h2>{heading}") for heading in order]
    assert places == sorted(places)
    assert "the anatomy of the scan (r = " in page[places[0] : places[1]]
    assert page.count("alt='patient-1; rows: ") == 1
    assert re.findall(r"<code>mmsr run evaluate (-p \w+=)", page) == ["-p prepared="]
    assert "phantom, held out" in page or "phantom" in page
    assert str(chain) not in page
    assert "nan" not in re.sub(r"base64,[^']*", "", page).lower().split()


@pytest.mark.slow
def test_metrics_are_finite(chain: Path) -> None:
    metrics = json.loads((chain / "metrics.json").read_text())
    rows = {row["method"]: row for row in metrics["rows"]}
    assert list(rows) == ["nearest", "bicubic", *MODELS, "truth"]
    for method, row in rows.items():
        numbers = {name: value for name, value in row.items() if isinstance(value, float)}
        assert len(numbers) >= 5, method
        assert all(math.isfinite(value) for value in numbers.values())
        lacking = {name for name, value in row.items() if value is None}
        no_detail, no_error = {"corr_detail"}, {"psnr", "psnr_matched"}
        allowed = {"nearest": no_detail, "truth": no_error}.get(method, set()) | {"tile"}
        allowed |= set(Structure._fields) - {"corr_noiseless"}  # so small a phantom lacks much
        assert lacking <= allowed, (method, lacking)
    assert rows["truth"]["ssim"] == pytest.approx(1)
    assert rows["bicubic"]["psnr"] > rows["nearest"]["psnr"]
    assert (metrics["cases"], metrics["slices"]) == (["patient-1"], 1)
    assert metrics["by_case"] == [{**row, "case": "patient-1"} for row in metrics["rows"]]


@pytest.mark.slow
def test_a_test_case_found_in_training(chain: Path) -> None:
    """A scan that weights were trained on is known by its voxels, whatever it is called."""
    settings = PrepareSettings(**read_prepared(chain / "prepare").settings, out="unused")
    trained, held_out = clinical_cases(settings)
    assert read_prepared(chain / "prepare").train == (trained.name,)
    folders = {"mine": str(chain / "super_resolve" / MODELS[0])}
    assert len(open_models(folders, [held_out])) == 1
    leaked = held_out._replace(volume=trained.volume)
    with pytest.raises(SettingsError, match="mine: patient-1 is patient-0 of its training"):
        open_models(folders, [leaked])


@pytest.mark.slow
def test_trainings_differ_by_the_loss_only(chain: Path) -> None:
    one, other = (read_json(chain / "train" / model / "config.json") for model in MODELS)
    assert one["settings"]["mmsr"] != other["settings"]["mmsr"]
    one["settings"]["mmsr"] = other["settings"]["mmsr"]
    assert (one.pop("method"), other.pop("method")[:15]) == ("SR-CycleGAN", "CycleGAN (R14a,")
    assert one == other
    for model in MODELS:
        g1, record = load_generator(chain / "train" / model / "weights.safetensors")
        assert record.training["steps"] == 6
        assert read_history(chain / "train" / model / "history.csv")["step"] == [2, 4, 6]
        assert not g1.settings.skip
        case = open_case(chain / "prepare" / "cases" / "patient-1")
        sr = read_volume(chain / "super_resolve" / model / "patient-1.mha", modality="micro")
        assert sr.array.shape == (1, 384, 384)
        assert not case.seen


@pytest.mark.slow
def test_nothing_but_results_is_left(chain: Path) -> None:
    names = set(stamps(chain))
    assert not [name for name in names if ".running" in name or "/." in name or ".log" in name]
    made = sorted(p.parent.name for p in chain.rglob("notebook.ipynb"))
    assert made == sorted(["prepare", *MODELS, *MODELS, "evaluate"])


@pytest.mark.slow
def test_second_run_does_nothing(
    chain: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = stamps(chain)
    with pytest.raises(SystemExit) as stopped:
        cli.main(["plan", str(TINY), "--out", str(chain)])
    said = capfd.readouterr()
    assert stopped.value.code == 0
    assert "started" not in said.err
    assert str(chain / "report.html") in said.out
    assert stamps(chain) == before


@pytest.mark.nightly
@pytest.mark.slow
def test_changed_training_reruns_what_depends_on_it(own_chain: Path, tmp_path: Path) -> None:
    before = stamps(own_chain)
    plan = yaml.safe_load(TINY.read_text())
    plan["train"]["with-mmsr"]["settings"] = {**plan["train"]["with-mmsr"]["settings"], "steps": 4}
    (tmp_path / "changed.yaml").write_text(yaml.safe_dump(plan))
    said = snakemake(tmp_path / "changed.yaml", own_chain)
    assert started(said) == ["evaluate", "super_resolve/with-mmsr", "train/with-mmsr"]
    after = stamps(own_chain)
    for name, when in before.items():
        part = name.split("/")
        if part[0] == "prepare" or "without-mmsr" in part:
            assert after[name] == when, name
    run = own_chain / "train" / "with-mmsr"
    aside = run / "earlier-1"
    assert read_json(aside / "config.json")["settings"]["steps"] == 6
    assert read_history(aside / "history.csv")["step"] == [2, 4, 6]
    assert (aside / "weights.safetensors").is_file()
    assert list((aside / "checkpoints").glob("step-*.pt"))
    assert read_history(run / "history.csv")["step"] == [2, 4]
    assert load_generator(run / "weights.safetensors")[1].training["steps"] == 4
    done = read_json(own_chain / "super_resolve" / "with-mmsr" / "done.json")
    assert done["weights"]["training"]["steps"] == 4
    assert after["report.html"] > before["report.html"]
    assert after["metrics.json"] > before["metrics.json"]


WRONG = {
    "prepare": ({"prepare": {"patchsize": 4}}, "patchsize"),
    "prepare, value": ({"prepare": {"size": 100}}, "size"),
    "train": ({"train": {"with-mmsr": {"setings": {}}}}, "setings"),
    "train, inside": ({"train": {"with-mmsr": {"settings": {"stepss": 4}}}}, "stepss"),
    "train, deep inside": (
        {"train": {"without-mmsr": {"settings": {"g1": {"chanels": 4}}}}},
        "chan",
    ),
    "super_resolve": ({"super_resolve": {"tiles": 8}}, "tiles"),
    "evaluate": ({"evaluate": {"titel": "x"}}, "titel"),
    "section": ({"evalute": {"title": "x"}}, "evalute"),
}


def merge(into: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Put nested values into a copy of a plan."""
    merged = copy.deepcopy(into)
    for name, value in changes.items():
        inner = isinstance(value, dict) and isinstance(merged.get(name), dict)
        merged[name] = merge(merged[name], value) if inner else value
    return merged


@pytest.mark.slow
@pytest.mark.parametrize("where", WRONG)
def test_wrong_parameter_in_a_plan(
    chain: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], where: str
) -> None:
    changes, word = WRONG[where]
    plan = tmp_path / "wrong.yaml"
    plan.write_text(yaml.safe_dump(merge(yaml.safe_load(TINY.read_text()), changes)))
    before = stamps(chain)
    with pytest.raises(SystemExit) as stopped:
        cli.main(["plan", str(plan), "--out", str(chain)])
    err = capfd.readouterr().err
    assert stopped.value.code == 2
    (line,) = [line for line in err.splitlines() if word in line]
    assert line.startswith("mmsr: ")
    assert "Traceback" not in err
    assert started(err) == []
    assert stamps(chain) == before


PLANS = {
    "no models": ({"train": {}}, "one or more models"),
    "weights, a list": ({"weights": [1]}, "weights"),
    "weights, a number": ({"weights": {"b": 5}}, "weights.b"),
    "weights, no file": ({"weights": {"b": "none.safetensors"}}, "weights.b: "),
    "weights, a folder": ({"weights": {"b": "."}}, "weights.b: "),
    "weights, unset variable": ({"weights": {"b": "${MMSR_NOT_SET}/w"}}, "MMSR_NOT_SET"),
    "trained and given": ({"train": {"a": {}}, "weights": {"a": "bundled"}}, "a stands under"),
    "retries, text": ({"retries": "x"}, "retries"),
    "retries, truth": ({"retries": True}, "retries"),
    "retries, none": ({"retries": None}, "retries"),
    "retries, negative": ({"retries": -1}, "retries"),
    "model, a path": ({"train": {"a/b": {}}}, "a/b"),
    "model, hidden": ({"train": {".a": {}}}, ".a"),
    "model, a space": ({"train": {"a b": {}}}, "a b"),
    "model, braces": ({"weights": {"{a}": "bundled"}}, "{a}"),
    "model, a number": ({"train": {1: {}}}, "train.1"),
    "model, nothing": ({"train": {"a": None}}, "train.a"),
    "own, prepare": ({"prepare": {"out": "x"}}, "prepare.out: is the workflow's own"),
    "own, run": ({"train": {"a": {"run": "x"}}}, "train.a.run: is the workflow's own"),
    "own, prepared": ({"train": {"a": {"prepared": "x"}}}, "train.a.prepared: is"),
    "own, weights": ({"super_resolve": {"weights": "x"}}, "super_resolve.weights: is"),
    "own, models": ({"evaluate": {"models": {}}}, "evaluate.models: is"),
    "own, report": ({"evaluate": {"out": "x"}}, "evaluate.out: is"),
    "too small to judge": ({"prepare": {"patch_size": 8}}, "train.a: d_x: needs patches of"),
    "too small to compare": (
        {"prepare": {"patch_size": 16}, "train": {"a": {"preset": "code_2022"}}},
        "needs patches of",
    ),
    "devices": ({"train": {"a": {"devices": 3}}}, "batch_size 16 cannot be dealt out evenly"),
    "held out": ({"prepare": {"cases": 2, "held_out": 2}}, "held_out: expected less than"),
    "no scans": ({"prepare": {"clinical": []}}, "clinical: expected phantom, a path"),
    "baseline with the loss": (
        {"train": {"a": {"system": "UNIT", "settings": {"mmsr": {"up": 0.1}}}}},
        "mmsr.up: UNIT has no MMSR terms (R14), got 0.1",
    ),
    "a reading of none": ({"train": {"a": {"baseline": "same_size"}}}, "train.a: baseline: "),
}


@pytest.mark.parametrize("where", PLANS)
def test_what_cannot_work_is_refused_before_it_starts(tmp_path: Path, where: str) -> None:
    changes, words = PLANS[where]
    plan = {"train": {"a": {}}, **changes}
    with pytest.raises(SettingsError, match=re.escape(words)) as e:
        check_plan(plan, tmp_path)
    assert "\n" not in str(e.value)


def test_paths_of_weights_begin_in_the_folder_of_results(tmp_path: Path) -> None:
    (tmp_path / "mine.safetensors").write_text("weights")
    for name in ("../mine.safetensors", str(tmp_path / "mine.safetensors"), "bundled"):
        check_plan({"weights": {"given": name}}, tmp_path / "results")
    check_plan(
        {"train": {"a": {"system": "CycleGAN", "baseline": "same_size", "settings": {"mmsr": {}}}}}
    )


def test_hints_come_from_the_network_that_was_chosen() -> None:
    def refusal(settings: dict[str, Any]) -> str:
        with pytest.raises(SettingsError) as e:
            method_settings(TrainSettings(prepared="p", run="r", settings=settings))
        return str(e.value)

    assert "did you mean blocks?" in refusal({"g1": {"kind": "resnet", "blokcs": 1}})
    assert "octaves" not in refusal({"g1": {"octave": 3}})  # of the other kind
    assert "did you mean" not in refusal({"g2": {"noise": True}})  # of the other generator
    assert "did you mean" not in refusal({"octaves": 3})  # of a network, not of the run


@pytest.mark.slow
def test_what_snakemake_itself_refuses_is_told(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / ".snakemake").write_text("a file where a folder is needed")
    with pytest.raises(SystemExit) as stopped:
        cli.main(["plan", str(TINY), "--out", str(tmp_path)])
    (line,) = capfd.readouterr().err.splitlines()
    assert stopped.value.code == 2
    assert line.startswith("mmsr: ")
    assert "File exists" in line


@pytest.mark.nightly
@pytest.mark.slow
def test_another_seed_leaves_no_case_behind(own_chain: Path) -> None:
    """The patients held out by an earlier run are in training now: nobody may be judged on them."""
    prepared = own_chain / "prepare"
    assert [case.name for case in prepared_cases(prepared)] == ["patient-1"]
    names = ["patient-0", "patient-1"]
    seed = next(n for n in range(1, 20) if split_cases(names, seed=n)[1] == names[:1])
    values = {**yaml.safe_load(TINY.read_text())["prepare"], "out": str(prepared), "seed": seed}
    run_experiment("prepare", prepared / "n.ipynb", values)
    assert [case.name for case in prepared_cases(prepared)] == ["patient-0"]
    assert [p.name for p in (prepared / "cases").iterdir()] == ["patient-0"]
    assert [case.name for case in open_bank(prepared / "clinical").info.cases] == ["patient-1"]
    shutil.rmtree(prepared / "cases" / "patient-0")
    with pytest.raises(FileError, match="patient-0: is not a prepared case"):
        prepared_cases(prepared)


@pytest.mark.slow
@pytest.mark.parametrize("content", ["{}", "[]", "null", "5", "{", '{"data": 5}'])
def test_what_prepare_did_not_write_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "prepared.json").write_text(content)
    chosen = TrainSettings(prepared=str(tmp_path), run=str(tmp_path / "run"))
    for call in (lambda: read_prepared(tmp_path), lambda: train(chosen)):
        with pytest.raises(FileError, match=r"prepared\.json") as e:
            call()
        assert "\n" not in str(e.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_changed_bank_is_not_trained_on(own_chain: Path, tmp_path: Path) -> None:
    patches = own_chain / "prepare" / "micro" / "patches.npy"
    content = bytearray(patches.read_bytes())
    content[-1] ^= 1
    patches.write_bytes(content)
    chosen = TrainSettings(
        prepared=str(own_chain / "prepare"),
        run=str(tmp_path / "run"),
        device="cpu",
        settings=small_system("SR-CycleGAN"),
    )
    with pytest.raises(FileError, match="fingerprint differs") as e:
        train(chosen)
    assert "\n" not in str(e.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "kind"), [(errno.ENOSPC, ResourceError), (errno.EACCES, FileError)]
)
@pytest.mark.parametrize("call", ["papermill.execute_notebook", "pathlib.Path.replace"])
def test_a_disk_that_fails_costs_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, kind: type[MMSRError], call: str
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("papermill.execute_notebook", lambda *_, **__: None)
    monkeypatch.setattr(call, fail)
    with pytest.raises(kind, match=r"n\.ipynb: not written") as e:
        run_experiment("train", tmp_path / "n.ipynb", {})
    assert "\n" not in str(e.value)


@pytest.mark.slow
def test_unknown_parameter_and_experiment(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="sizes: unknown parameter of prepare") as e:
        run_experiment("prepare", tmp_path / "n.ipynb", {"sizes": 3})
    assert "\n" not in str(e.value)
    with pytest.raises(SettingsError, match="no such experiment; known are evaluate, figure_1"):
        run_experiment("nonesuch", tmp_path / "n.ipynb", {})
    assert list(tmp_path.iterdir()) == []


def one_cell(path: Path, source: str) -> str:
    """Write a notebook of one cell."""
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    cells = [nbformat.v4.new_code_cell(source)]
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel}), path)
    return str(path)


@pytest.mark.slow
@pytest.mark.parametrize("deaths", [1, 2])
def test_a_kernel_that_dies_at_its_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, deaths: int
) -> None:
    """As one does whose port was taken meanwhile: real kernels, each ended by its first import."""
    (tmp_path / "sitecustomize.py").write_text(
        "import os, sys\nfrom pathlib import Path\n"
        f"starts = Path({str(tmp_path)!r}, 'starts')\n"
        "if 'ipykernel_launcher' in sys.orig_argv:\n"
        "    before = len(starts.read_text()) if starts.exists() else 0\n"
        "    starts.write_text('x' * (before + 1))\n"
        f"    if before < {deaths}:\n        os.write(2, b'no port')\n        os._exit(1)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    notebook, output = one_cell(tmp_path / "a.ipynb", "2 + 2"), tmp_path / "runs" / "n.ipynb"
    if deaths == 1:
        run_experiment(notebook, output, {})
        assert [p.name for p in output.parent.iterdir()] == ["n.ipynb"]
    else:
        with pytest.raises(
            ResourceError, match=r"a: its process died .* twice; .*n\.running\.log"
        ) as e:
            run_experiment(notebook, output, {})
        assert "\n" not in str(e.value)
        assert "no port" in output.with_name("n.running.log").read_text()
        assert not output.exists()
    assert (tmp_path / "starts").read_text() == "xx"


@pytest.mark.slow
def test_errors_of_training_keep_their_kind(tmp_path: Path) -> None:
    """In a process that has not loaded the module they come from."""
    source = "class HealthError(ValueError): ...\nraise HealthError('step 3: the loss is NaN')"
    notebook = one_cell(tmp_path / "a.ipynb", source)
    code = (
        "import sys\nfrom mmsr.core import MMSRError\n"
        "from mmsr.app.run_notebook import run_experiment\n"
        "assert 'mmsr.training.run' not in sys.modules\n"
        "try:\n    run_experiment(sys.argv[1], sys.argv[2], {})\n"
        "except MMSRError as e:\n    print(type(e).__name__, e)"
    )
    command = [sys.executable, "-c", code, notebook, str(tmp_path / "n.ipynb")]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout == "HealthError step 3: the loss is NaN\n"


@pytest.mark.slow
def test_plain_runs_make_the_same_without_jupyter(chain: Path, tmp_path: Path) -> None:
    """`mmsr run NAME --plain` on a node that has neither papermill nor a kernel."""
    code = (
        "import sys\n"
        "for name in ('papermill', 'nbclient', 'ipykernel', 'IPython', 'jupyter_client'):\n"
        "    sys.modules[name] = None\n"
        "from mmsr.app.cli import main\nmain(sys.argv[1:])"
    )

    def plain(name: str, values: dict[str, Any]) -> str:
        command = [sys.executable, "-c", code, "run", name, "--plain", "--json", json.dumps(values)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
        assert done.returncode == 0, done.stderr
        return done.stdout

    plan = yaml.safe_load(TINY.read_text())
    said = plain("prepare", {**plan["prepare"], "out": str(tmp_path / "prepare")})
    assert "evaluating on patient-1" in said
    for name in ("clinical/patches.npy", "micro/patches.npy", "prepared.json"):
        one, other = (folder / "prepare" / name for folder in (chain, tmp_path))
        assert one.read_bytes() == other.read_bytes(), name
    run = {"prepared": str(tmp_path / "prepare"), "run": str(tmp_path / "run"), "threads": 1}
    said = plain("train", {**plan["train"]["with-mmsr"], **run, "device": "cpu"})
    assert "step 6, finished" in said
    one, other = chain / "train" / "with-mmsr" / "history.csv", tmp_path / "run" / "history.csv"
    assert one.read_text() == other.read_text()


@pytest.mark.slow
def test_refusal_inside_a_notebook_keeps_its_kind(chain: Path, tmp_path: Path) -> None:
    values = {"prepared": str(tmp_path), "models": {}, "out": str(tmp_path / "out")}
    with pytest.raises(MMSRError, match="run the experiment `prepare` first") as e:
        run_experiment("evaluate", tmp_path / "n.ipynb", values)
    assert type(e.value).__name__ == "FileError"
    assert "\n" not in str(e.value)
    assert not (tmp_path / "n.ipynb").exists()
    assert not (tmp_path / "out").exists()


def kernel_of(process: int) -> int:
    """Find the notebook's kernel among the children of a process."""
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(status.read_text().rpartition(")")[2].split()[1])
            command = (status.parent / "cmdline").read_text()
        except OSError:
            continue  # ended meanwhile
        if parent == process and "ipykernel" in command:
            return int(status.parent.name)
    raise AssertionError("no kernel")


def rows_of(history: Path) -> int:
    """Count the lines of a history."""
    return history.read_text().count("\n") if history.is_file() else 0


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="processes are found in /proc")
def test_killed_training_goes_on(chain: Path, tmp_path: Path) -> None:
    """SIGKILL to the kernel, as a machine short of memory sends it; then the same again."""
    run = tmp_path / "run"
    settings = {**SMALL_NETWORKS, "steps": 150, "history_every": 1, "checkpoint_every": 7}
    values = {"prepared": str(chain / "prepare"), "run": str(run), "settings": settings}
    values |= {"threads": 1, "device": "cpu"}
    arguments = ["run", "train", "--out", str(run / "n.ipynb"), "--json", json.dumps(values)]
    job = subprocess.Popen(
        [sys.executable, "-m", "mmsr", *arguments], stderr=subprocess.PIPE, text=True
    )
    try:
        end = time.monotonic() + 120
        while rows_of(run / "history.csv") < 12:
            assert job.poll() is None, job.communicate()[1]
            assert time.monotonic() < end
            time.sleep(0.01)
        os.kill(kernel_of(job.pid), signal.SIGKILL)
        err = job.communicate(timeout=60)[1]
    finally:
        job.kill()
        job.wait()
    assert not (run / "weights.safetensors").exists()
    assert not (run / "n.ipynb").exists()
    last = max(read_history(run / "history.csv")["step"])
    assert last < 150

    run_experiment("train", run / "n.ipynb", values)
    assert read_history(run / "history.csv")["step"] == list(range(1, 151))
    assert load_generator(run / "weights.safetensors")[1].training["steps"] == 150
    assert sorted(p.name for p in run.glob("*.running*")) == []
    assert sorted(p.name for p in run.glob(".*")) == []

    assert job.returncode == 2, err
    assert err.count("mmsr: ") == 1, err
    assert "run again" in err.splitlines()[-1]
    assert "Traceback" not in err


SYSTEMS = {
    "SR-UNIT": {},
    "CycleGAN a": {"system": "CycleGAN", "baseline": "sr_networks"},
    "CycleGAN b": {"system": "CycleGAN", "baseline": "same_size"},
    "UNIT a": {"system": "UNIT", "baseline": "sr_networks"},
    "UNIT b": {"system": "UNIT", "baseline": "same_size"},
    "paper": {"system": "SR-CycleGAN", "preset": "paper"},
    "paper SR-UNIT": {"system": "SR-UNIT", "preset": "paper"},
    "code_2022": {"system": "SR-CycleGAN", "preset": "code_2022"},
}


def small_system(system: str, steps: int = 2) -> dict[str, Any]:
    """Cut any system's networks down to a few channels."""
    judges = {"d_x": {"channels": 4, "layers": 1, "scales": 1}, "d_y": {"channels": 4, "layers": 1}}
    run = {"steps": steps, "batch_size": 2, "history_every": 1, "previews_every": 0}
    if "UNIT" in system:
        return {**judges, **run, "unit": {"latent": 16, "blocks": 1}}
    small = {"channels": 8, "blocks": 1}
    window = {"mmsr": {"ssim_window": (5, 1.0)}} if system == "code_2022" else {}
    return {**judges, **run, **window, "g1": small, "g2": small, "pool_size": 4}


@pytest.mark.slow
@pytest.mark.parametrize("system", SYSTEMS)
def test_every_system_trains_and_is_saved(chain: Path, tmp_path: Path, system: str) -> None:
    chosen = TrainSettings.read(
        {
            "prepared": str(chain / "prepare"),
            "run": str(tmp_path / "run"),
            "system": system,
            "device": "cpu",
            "settings": small_system(system),
            **SYSTEMS[system],
        }
    )
    done = train(chosen)
    assert done.finished
    g1, record = load_generator(done.weights)
    assert record.method.startswith(chosen.system)
    assert g1.settings.scale == 8
    history = read_history(tmp_path / "run" / "history.csv")
    assert history["step"] == [1, 2]
    assert all(math.isfinite(v) for column in history.values() for v in column)


@pytest.mark.nightly
@pytest.mark.slow
def test_another_scale_and_system_through_all_notebooks(tmp_path: Path) -> None:
    """Scale 4, µCT averaged to fit it, windows of the user's, and SR-UNIT."""
    prepared, run, sr = (tmp_path / name for name in ("prepare", "run", "sr"))
    values: dict[str, Any] = yaml.safe_load(TINY.read_text())["prepare"]
    values |= {"scale": 4, "micro_resample_um": 156.25, "clinical_window": [-1000, 100]}
    run_experiment("prepare", prepared / "n.ipynb", {**values, "out": str(prepared)})
    facts = read_json(prepared / "prepared.json")
    assert facts["windows"]["clinical"]["tissue"] == 100
    assert facts["pixels_mm"] == {"clinical": 0.625, "sr": 0.15625, "micro": 0.15625}
    case = open_case(prepared / "cases" / "patient-1")
    assert case.truth is not None
    assert (case.scale, case.truth.array.shape) == (4, (1, 192, 192))

    chosen: dict[str, Any] = {"prepared": str(prepared), "run": str(run), "device": "cpu"}
    with pytest.raises(ShapeError, match=r"scale 8 .*got 32"):
        train(TrainSettings(**chosen, settings=small_system("SR-CycleGAN")))
    settings = merge(small_system("SR-UNIT"), {"unit": {"halvings_y": 2}})
    train(TrainSettings(**chosen, system="SR-UNIT", settings=settings))

    values = {
        "out": str(sr),
        "prepared": str(prepared),
        "weights": str(run / "weights.safetensors"),
    }
    run_experiment("super_resolve", sr / "n.ipynb", values)
    values = {"out": str(tmp_path), "prepared": str(prepared), "models": {"unit": str(sr)}}
    values |= {"histories": {"unit": str(run / "history.csv")}, "crop_mm": 8.0}
    run_experiment("evaluate", tmp_path / "n.ipynb", values)
    rows = {row["method"]: row for row in read_json(tmp_path / "metrics.json")["rows"]}
    assert list(rows) == ["nearest", "bicubic", "unit", "truth"]
    assert math.isfinite(rows["unit"]["corr_bronchi"])
    assert rows["truth"]["ssim"] == pytest.approx(1)
    page = (tmp_path / "report.html").read_text(encoding="utf8")
    assert "SR-UNIT" in page
    assert "unit, 16 x 1" in page


@pytest.mark.slow
def test_a_scale_without_truth() -> None:
    """Scale 16 goes beyond the phantom's truth; the columns that need one stay empty."""
    settings = PrepareSettings(out="unused", cases=1, held_out=0, slices=1, size=384, scale=16)
    (case,) = clinical_cases(settings)
    assert (case.scale, case.truth, dict(case.regions)) == (16, None, {})
    sr = enlarge_bicubic(case.volume.array[0], 16)[None]
    model = Model("same", {case.name: sr}, {"cases": {case.name: {"tile": None}}})
    measured = measure_case(case, [model])
    assert [row.structure for row in measured] == [None] * 3
    rows = {row.measures.method: row.measures for row in measured}
    assert list(rows) == ["nearest", "bicubic", "same"]
    assert rows["same"].corr_clinical == rows["bicubic"].corr_clinical > 0.9
    assert math.isnan(rows["bicubic"].ssim)
    assert columns_of(case, [model])["bicubic"].shape == (1, 768, 768)


@pytest.mark.nightly
@pytest.mark.slow
def test_two_processes_train_together(chain: Path, tmp_path: Path) -> None:
    """`devices = 2` starts torchrun from the notebook; what it refuses comes back in one line."""
    settings = small_system("SR-CycleGAN", steps=3)
    values = {"prepared": str(chain / "prepare"), "run": str(tmp_path / "run"), "device": "cpu"}
    values |= {"devices": 2, "settings": settings, "threads": 1}
    run_experiment("train", tmp_path / "run" / "n.ipynb", values)
    training = load_generator(tmp_path / "run" / "weights.safetensors")[1].training
    assert (training["steps"], training["device"]) == (3, "2 x CPU")
    assert read_history(tmp_path / "run" / "history.csv")["step"] == [1, 2, 3]
    odd = {**values, "run": str(tmp_path / "odd"), "settings": {**settings, "batch_size": 3}}
    with pytest.raises(MMSRError, match="cannot be dealt out evenly") as e:
        launch_training(TrainSettings(**odd))
    assert "\n" not in str(e.value)
    torchrun = ("torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "mmsr")
    command = [sys.executable, "-m", *torchrun, "train", str(tmp_path / "odd" / "train.json")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode
    assert done.stderr.count("mmsr: ") == 1  # not once for each process


@pytest.mark.slow
def test_the_train_verb(
    chain: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "train.yaml"
    values: dict[str, Any] = {"prepared": str(chain / "prepare"), "run": str(tmp_path / "run")}
    values |= {"settings": small_system("SR-CycleGAN"), "device": "cpu"}
    file.write_text(yaml.safe_dump(values))

    def said(content: str | None, code: int) -> str:
        if content is not None:
            file.write_text(content)
        with pytest.raises(SystemExit) as stopped:
            cli.main(["train", str(file)])
        assert stopped.value.code == code
        printed = capfd.readouterr()
        return printed.err.splitlines()[-1] if code else printed.out

    assert "step 2, finished" in said(None, 0)
    assert "holds a run already" in said(yaml.safe_dump({**values, "resume": "never"}), 2)
    assert "was started with other settings" in said(
        yaml.safe_dump({**values, "settings": small_system("SR-CycleGAN", 3)}), 2
    )
    assert "sistem" in said(yaml.safe_dump({**values, "sistem": "UNIT"}), 2)
    assert "devices: 2 asked for" in said(yaml.safe_dump({**values, "devices": 2}), 2)
    assert "expected names and values" in said("- a", 2)
    assert "cannot be read" in said("a: [", 2)
    file.unlink()
    assert "No such file" in said(None, 2)


@pytest.mark.parametrize(
    "plan",
    sorted((Path(cli.__file__).parents[2] / "workflow" / "plans").glob("*.yaml")),
    ids=lambda p: p.stem,
)
def test_the_plans_that_come_along_are_valid(plan: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MMSR_EVIDENCE", str(plan.parents[2] / "nbs" / "results" / "evidence"))
    check_plan(yaml.safe_load(plan.read_text(encoding="utf8")))


def prepare_and_train(folder: Path, values: dict[str, Any], plain: bool) -> None:
    """Run the two experiments as a user would, with other paths and few patches."""
    values = {"held_out": 0, "patch_size": 8, "patches_per_case": 8, **values}
    values["out"] = str(folder / "prepare")
    run = {"prepared": values["out"], "run": str(folder / "run"), "threads": 1, "device": "cpu"}
    run |= {"settings": {**SMALL_NETWORKS, "steps": 3, "history_every": 1}}
    if plain:
        prepare(values)
        train(run)
    else:
        run_experiment("prepare", folder / "prepare" / "n.ipynb", values)
        run_experiment("train", folder / "run" / "n.ipynb", run)
    history = read_history(folder / "run" / "history.csv")
    assert history["step"] == [1, 2, 3]
    assert all(math.isfinite(v) for column in history.values() for v in column)


@pytest.mark.slow
@pytest.mark.skipif(not REAL, reason="MMSR_REAL_DATA is not set")
@pytest.mark.parametrize("micro", ["bone", pytest.param("phantom", marks=pytest.mark.nightly)])
def test_real_data_with_only_paths_changed(tmp_path: Path, micro: str) -> None:
    """Real clinical patches with phantom µCT; and with a real µCT of bone, averaged by two."""
    values: dict[str, Any] = {
        "clinical": "${MMSR_REAL_DATA}/nlst_chest_dicom",
        "clinical_slices": [60, 64],
    }
    if micro == "phantom":
        values |= {"cases": 1, "slices": 1, "size": 384}
    else:
        values |= {"micro": "${MMSR_REAL_DATA}/bone_microct_tiff", "micro_voxel_um": 19.5}
        values |= {"micro_slices": [80, 84], "micro_resample_um": 39}
    prepare_and_train(tmp_path, values, plain=micro == "bone")
    facts = read_json(tmp_path / "prepare" / "prepared.json")
    source = "phantom" if micro == "phantom" else "specimen data"
    assert facts["data"] == f"patient data (clinical), {source} (µCT)"
    x_bank, y_bank = (open_bank(tmp_path / "prepare" / name) for name in ("clinical", "micro"))
    assert x_bank.patches.shape == (8, 8, 8)
    assert y_bank.patches.shape == (8, 64, 64)
    np.testing.assert_allclose(x_bank.info.spacing_mm[1:], 0.54, rtol=0.01)
    fine = 0.078125 if micro == "phantom" else 0.039
    np.testing.assert_allclose(y_bank.info.spacing_mm[1:], fine, rtol=1e-6)
    case = open_case(tmp_path / "prepare" / "cases" / "patient-0")
    assert case.seen
    assert case.volume.array.shape == (4, 512, 512)
    record = load_generator(tmp_path / "run" / "weights.safetensors")[1]
    assert "patient data" in record.data
    assert str(REAL) not in record.model_dump_json()


@pytest.mark.slow
@pytest.mark.skipif(not REAL, reason="MMSR_REAL_DATA is not set")
def test_unset_variable_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("MMSR_REAL_DATA")
    clinical = "${MMSR_REAL_DATA}/nlst_chest_dicom"
    values = {"out": str(tmp_path / "p"), "clinical": clinical, "held_out": 0}
    with pytest.raises(SettingsError, match=r"MMSR_REAL_DATA.*export it"):
        run_experiment("prepare", tmp_path / "n.ipynb", values)
    assert not (tmp_path / "p" / "prepared.json").exists()
