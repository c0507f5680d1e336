"""A seeded patient goes in; nothing of her comes out: in no volume, log, notebook or picture."""

import contextlib
import gzip
import io
import json
from pathlib import Path

import numpy as np
import pydicom
import pytest
from dicom_maker import series
from matplotlib.text import Text

from mmsr.app.cli import main
from mmsr.core import seeded
from mmsr.data.windows import CLINICAL_WINDOW
from mmsr.evaluation.figures import overview
from mmsr.inference.sr_slices import SROptions, super_resolve_slices
from mmsr.networks.generators import G1Settings
from mmsr.networks.weights import ModelCard, build_g1, load_generator, save_generator
from mmsr.scans.read import read_volume
from mmsr.scans.scan_summary import info_picture, scan_info

SECRETS = {
    "PatientName": "Quimby^Zebulonia",
    "PatientID": "PID-77421-X",
    "PatientBirthDate": "19390417",
    "OtherPatientIDs": "OLD-99183",
    "PatientAddress": "12 Larkspur Row",
    "InstitutionName": "Elsewhere Mercy",
    "InstitutionalDepartmentName": "Thorax Unit Seven",
    "StationName": "SCANNERELSE3",
    "AccessionNumber": "ACC550917",
    "ReferringPhysicianName": "Ferndale^Osric",
    "OperatorsName": "Pettibone^Una",
    "StudyDescription": "Thorax of Quimby",
    "SeriesDescription": "lung, Zebulonia Q.",
    "ProtocolName": "for Dr Ferndale",
    "StudyDate": "20190203",
    "StudyID": "ST-4471",
    "PatientComments": "prefers Larkspur",
    "ImageComments": "Quimby again",
}
WORDS = sorted(
    {w for value in SECRETS.values() for w in value.replace("^", " ").split() if len(w) > 4}
)
WORDS = [w for w in WORDS if w.lower() not in ("thorax", "again", "lung,", "prefers", "seven")]


def leaked(blob: bytes) -> list[str]:
    """Name the words of the patient that stand in some bytes, in any of three encodings."""
    low = blob.lower()
    return [
        w
        for w in WORDS
        if any(w.lower().encode(code) in low for code in ("ascii", "utf-16-le", "utf-16-be"))
    ]


def leaks(folder: Path) -> dict[str, list[str]]:
    """Look into every file, unpacked where it is packed, and at every name."""
    found = {}
    for path in folder.rglob("*"):
        words = leaked(str(path.relative_to(folder)).encode())
        if path.is_file():
            blob = path.read_bytes()
            words += leaked(blob)
            if blob[:2] == b"\x1f\x8b":
                words += leaked(gzip.decompress(blob))
        if words:
            found[str(path.relative_to(folder))] = words
    return found


@pytest.fixture(scope="module")
def patient(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("series")
    yy, xx = np.mgrid[:48, :48]
    body = np.where(np.hypot(yy - 24, xx - 24) < 20, 30, -1000)
    body[np.hypot(yy - 24, xx - 18) < 9] = -850
    hu = body + seeded(4, "privacy").normal(0, 20, (3, 48, 48))
    tags = {"PixelSpacing": [0.7, 0.7], "SliceThickness": 2.0, **SECRETS}
    for path in series(folder, hu, step=(0, 0, 2.0), intercepts=(-2000,), **tags).iterdir():
        d = pydicom.dcmread(path)
        d.add_new(0x00091001, "LO", "Quimby, private")
        d.save_as(path)
    assert leaks(folder)  # the search finds her where she is
    return folder


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    g1 = build_g1(G1Settings(channels=16, blocks=1, norm="none", skip=True))
    record = ModelCard(
        g1=g1.settings,
        clinical_window=CLINICAL_WINDOW.to_dict(),
        micro_window={},
        method="untrained",
        data="none",
        training={"steps": 0},
    )
    save_generator(path, g1, record)
    return path


def mmsr(*arguments: object, code: int = 0) -> str:
    """Call the command line in this process; return all that it says."""
    said = io.StringIO()
    with (
        contextlib.redirect_stdout(said),
        contextlib.redirect_stderr(said),
        pytest.raises(SystemExit) as ended,
    ):
        main([str(a) for a in arguments])
    assert (ended.value.code or 0) == code, said.getvalue()
    return said.getvalue()


@pytest.mark.slow
@pytest.mark.parametrize(
    "ending",
    [
        ".ome.zarr",
        ".dicom",
        *(pytest.param(e, marks=pytest.mark.nightly) for e in (".mha", ".nrrd", ".nii", ".nii.gz")),
    ],
)
def test_volumes_maps_pictures_and_logs(
    patient: Path, weights: Path, tmp_path: Path, ending: str
) -> None:
    maps = ("--consistency", tmp_path / "apart.mha", "--uncertainty", tmp_path / f"spread{ending}")
    arguments = ("super-resolve", patient, tmp_path / f"sr{ending}", "--weights", weights, *maps)
    said = mmsr(*arguments, "--part", "1/2")
    assert leaks(tmp_path) == {}  # nor in the work that is not finished
    said += mmsr(*arguments)
    assert leaked(said.encode()) == []
    assert (tmp_path / f"sr{ending}").exists()
    assert leaks(tmp_path) == {}


@pytest.mark.slow
def test_derived_dicom_keeps_no_old_identifier_of_study_or_series(
    patient: Path, weights: Path, tmp_path: Path
) -> None:
    out = tmp_path / "sr.dicom"
    mmsr("super-resolve", patient, out, "--weights", weights)
    source = pydicom.dcmread(patient / "01.dcm")
    derived = [pydicom.dcmread(p) for p in sorted(out.iterdir())]
    assert len(derived) == 3
    for d in derived:
        assert d.PatientName == ""
        assert d.PatientID == ""
        assert d.StudyInstanceUID != source.StudyInstanceUID
        assert d.SeriesInstanceUID != source.SeriesInstanceUID
    sources = {d.SourceImageSequence[0].ReferencedSOPInstanceUID for d in derived}
    assert source.SOPInstanceUID in sources
    assert len(sources) == 3


def test_information_and_its_picture(patient: Path, tmp_path: Path) -> None:
    said = mmsr("info", patient, "--picture", tmp_path / "info.png")
    assert "48" in said
    assert leaked(said.encode()) == []
    assert leaks(tmp_path) == {}
    texts = [t.get_text() for t in info_picture(scan_info(patient)).findobj(Text)]
    assert leaked("\n".join(texts).encode()) == []


def test_the_picture_of_a_result(patient: Path, weights: Path) -> None:
    g1, record = load_generator(weights)
    volume = read_volume(patient, lazy=True)
    one = next(super_resolve_slices(volume, [1], g1, record, SROptions()))
    texts = [t.get_text() for t in overview(volume, one).findobj(Text)]
    assert any("patient data" in t for t in texts)
    assert leaked("\n".join(texts).encode()) == []
    assert leaked(repr(volume).encode()) == []


@pytest.mark.slow
def test_an_executed_notebook(patient: Path, weights: Path, tmp_path: Path) -> None:
    values = {"out": str(tmp_path / "sr"), "scan": str(patient), "weights": str(weights)}
    out = tmp_path / "notebook.ipynb"
    said = mmsr("run", "super_resolve", "--out", out, "--json", json.dumps(values))
    assert leaked(said.encode()) == []
    assert leaks(tmp_path) == {}


def test_refusals_do_not_quote_the_header(patient: Path, tmp_path: Path) -> None:
    spoilt = tmp_path / "spoilt"
    spoilt.mkdir()
    for path in patient.iterdir():
        d = pydicom.dcmread(path)
        d.Modality = "MR"
        d.save_as(spoilt / path.name)
    said = mmsr("super-resolve", spoilt, tmp_path / "x.mha", code=2)
    assert "MR" in said
    assert leaked(said.encode()) == []
