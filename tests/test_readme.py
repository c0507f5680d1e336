"""What a newcomer reads first is true: each command of the README runs, and each line of Python."""

import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import nbformat
import pytest
import yaml

import mmsr
from mmsr.app import cli
from mmsr.app.training_cases import PrepareSettings

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf8")
DATA = (ROOT / "data/README.md").read_text(encoding="utf8")
SHELL = [
    line.partition(" #")[0].strip()
    for block in re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
    for line in block.splitlines()
]
NAMED = sorted(set(re.findall(r"`mmsr ([a-z-]+)", README + DATA)))  # commands in the text


def says(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Run `mmsr` with these arguments; give what it said."""
    with pytest.raises(SystemExit) as stopped:
        cli.main(list(arguments))
    said = capsys.readouterr()
    assert stopped.value.code == 0, said.err
    return said.out


@pytest.fixture(scope="module")
def scan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small phantom's scan of two slices, in a file."""
    path = tmp_path_factory.mktemp("scan") / "scan.nii.gz"
    mmsr.write_volume(path, mmsr.clinical_case(11, n_slices=2, size=448, samples=1).clinical)
    return path


def test_the_readme_is_short() -> None:
    assert len(README.splitlines()) <= 100
    assert len(SHELL) == 4
    assert {"demo", "plan", "status", "node"} <= set(NAMED)
    assert "CC BY 4.0" in README
    assert "nbs/images/real_scan.png" in README


def test_where_to_clone_from() -> None:
    url = re.search(r"git clone (\S+)", SHELL[0])[1]
    settings = (ROOT / "settings.ini").read_text(encoding="utf8")
    user, repo = (re.search(rf"^{key} = (\S+)", settings, re.M)[1] for key in ("user", "repo"))
    assert url == f"https://github.com/{user}/{repo}"
    assert SHELL[0].endswith(f"cd {repo}")


def test_make_lab_opens_the_quickstart() -> None:
    (target,) = (line.split()[1] for line in SHELL if line.startswith("make "))
    command = ["make", "--dry-run", target]
    does = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    opened = re.search(r"jupyter lab .*default_url=/lab/tree/(\S+)", does)[1]
    assert (ROOT / opened).is_file()
    assert opened == "nbs/quickstart.ipynb"


@pytest.mark.slow
def test_commands_for_a_scan(
    scan: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The two commands as they stand, on a small scan; the second also says only what it takes."""
    monkeypatch.chdir(tmp_path)
    info, super_resolve = (line for line in SHELL if line.startswith(".venv/bin/mmsr "))
    for line in (info, f"{super_resolve} --plan", super_resolve):
        says(capsys, *shlex.split(line.replace("path/to/scan", str(scan)))[1:])
        if line.endswith("--plan"):
            assert sorted(p.name for p in tmp_path.iterdir()) == ["scan.png"]
    made = ["lung.ome.zarr", "lung.ome.zarr.png", "scan.png"]
    assert sorted(p.name for p in tmp_path.iterdir()) == made
    size = mmsr.read_volume(tmp_path / "lung.ome.zarr", lazy=True).shape
    assert size == (2, 448, 448)


@pytest.mark.parametrize("name", NAMED)
def test_named_commands_are_there(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    told = says(capsys, name, "--help")
    lines = re.findall(rf"`mmsr {name} ([^`]*)`", README + DATA)
    assert {part for line in lines for part in line.split() if part.startswith("--")} <= {
        *re.findall(r"--[a-z-]+", told)
    }


def test_parameters_of_the_data_page() -> None:
    """The line that prepares a training names parameters that there are, with values they take."""
    (line,) = re.findall(r"`mmsr run prepare ([^`]*)`", DATA)
    pairs = [part.split("=", 1) for part in shlex.split(line) if "=" in part]
    settings = PrepareSettings.read({name: yaml.safe_load(value) for name, value in pairs})
    assert settings.micro_voxel_um == 25.08
    assert len(settings.clinical) == 2


@pytest.mark.slow
def test_the_example_of_the_readme_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(example.splitlines()) <= 12
    monkeypatch.chdir(tmp_path)
    exec(compile(example, "README.md", "exec"), {})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["sr.nii.gz", "sr.png"]
    assert "f(SR)" in capsys.readouterr().out


@pytest.mark.slow
def test_quickstart_takes_a_scan_of_ones_own(scan: Path, tmp_path: Path) -> None:
    """All cells before the training, with a path and a slice in the one cell that asks for them."""
    cells = nbformat.read(ROOT / "nbs/quickstart.ipynb", 4).cells
    code = [cell.source for cell in cells if cell.cell_type == "code"]
    (asks,) = (source for source in code if source.startswith("scan_path = None"))
    own = {"scan_path": str(scan), "slice_number": 1, "save_as": str(tmp_path / "sr.nii.gz")}
    assert re.findall(r"^(\w+) = None", asks, re.MULTILINE) == list(own)
    before = code[: next(i for i, source in enumerate(code) if "mmsr.prepare" in source)]
    page: dict[str, Any] = {}
    for source in before:
        exec(compile(source, "quickstart.ipynb", "exec"), page)
        if source == asks:
            page |= own
    assert page["scan"].shape == (1, 56, 56)
    assert mmsr.read_volume(tmp_path / "sr.nii.gz").shape == (1, 448, 448)
    wanted = mmsr.read_volume(scan, slices=(1, 2)).array
    assert (page["scan"].array == wanted).all()
