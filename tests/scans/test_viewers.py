"""Outputs open in what their readers use: browsers, dcmtk, ome-zarr-py, napari.

`make viewers` installs the last two and the packages from npm into `.viewers/`, for these tests
alone; a system package brings Chromium or dcmtk. What is not there is skipped.
"""

import base64
import http.server
import json
import queue
import shutil
import subprocess
import tempfile
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_writing import enlarged, scan, turns

from mmsr.data.volume import Volume
from mmsr.scans.write import write_volume

VIEWERS = Path(__file__).parents[2] / ".viewers"
NIIVUE = VIEWERS / "node_modules/@niivue/niivue/dist/niivue.umd.js"
NIFTI_JS = VIEWERS / "node_modules/nifti-reader-js/dist/nifti.js"
PYTHON = VIEWERS / "bin/python"
INSTALLED = VIEWERS / ".ready"
CHROMIUM = (
    shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
)

pytestmark = pytest.mark.slow


def needs(*what: Any) -> pytest.MarkDecorator:
    """Skip a test where a program or one of the files is missing, and say which."""
    missing = [str(name) for name in what if not (shutil.which(name) or Path(name).is_file())]
    return pytest.mark.skipif(bool(missing), reason=f"not installed: {', '.join(missing)}")


def said(*command: Any, timeout: float = 60) -> str:
    """Run a program; return what it prints."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def agrees(found: dict[str, Any], volume: Volume) -> None:
    """Check the voxels that a reader of NIfTI found, and the affine (RAS)."""
    assert found["dims"][1:4] == list(volume.shape[::-1])
    assert np.array_equal(found["voxels"], volume.array.ravel())
    far = np.array(volume.shape) - 1
    for index in ((0, 0, 0), tuple(far)):
        ras = np.array(found["affine"]) @ [*index[::-1], 1]
        assert ras[:3] * (-1, -1, 1) == pytest.approx(volume.world_mm(index), abs=1e-3)


# ---------------------------------------------------------------- NIfTI

READ_NIFTI = """
import * as nifti from "%s";
import fs from "node:fs";
const file = fs.readFileSync(process.argv[2]);
let data = file.buffer.slice(file.byteOffset, file.byteOffset + file.length);
if (nifti.isCompressed(data)) data = nifti.decompress(data);
const header = nifti.readHeader(data);
const voxels = Array.from(new Int16Array(nifti.readImage(header, data)));
console.log(JSON.stringify({ dims: header.dims, affine: header.affine, voxels }));
"""


@needs("node", NIFTI_JS)
@pytest.mark.parametrize("turn", turns())
@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
def test_nifti_reader_js(tmp_path: Path, ending: str, turn: str) -> None:
    volume = enlarged(scan(turn))
    write_volume(tmp_path / f"v{ending}", volume)
    (tmp_path / "read.mjs").write_text(READ_NIFTI % NIFTI_JS)
    agrees(json.loads(said("node", tmp_path / "read.mjs", tmp_path / f"v{ending}")), volume)


PAGE = """<!doctype html><canvas id="gl"></canvas>
<script src="niivue.umd.js"></script><script>
(async () => {
  const found = [];
  for (const name of %s) try {
    const body = (await fetch(name)).body;
    const plain = name.endsWith("gz") ? body.pipeThrough(new DecompressionStream("gzip")) : body;
    const unpacked = (await new Response(plain).arrayBuffer()).byteLength;
    const viewer = new niivue.Niivue();
    await viewer.attachToCanvas(document.getElementById("gl"));
    await viewer.loadVolumes([{ url: name }]);
    const { hdr, img } = viewer.volumes[0];
    found.push({ unpacked, dims: hdr.dims, affine: hdr.affine, voxels: Array.from(img) });
  } catch (error) { found.push({ error: String(error) }); }
  await fetch("found", { method: "POST", body: JSON.stringify(found) });
})();
</script>"""


class Pages(http.server.SimpleHTTPRequestHandler):
    """Serve a folder, and take what a page of it has found."""

    found: queue.Queue[bytes]

    def do_POST(self) -> None:
        self.found.put(self.rfile.read(int(self.headers["Content-Length"])))
        self.send_response(204)
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""


def in_chromium(folder: Path, page: str) -> Any:
    """Open a page of a folder in a browser without a window; return what it has found."""

    class Here(Pages):
        found: queue.Queue[bytes] = queue.Queue()

        def __init__(self, *args: Any) -> None:
            super().__init__(*args, directory=str(folder))

    with (
        http.server.ThreadingHTTPServer(("127.0.0.1", 0), Here) as server,
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile,
    ):
        threading.Thread(target=server.serve_forever, daemon=True).start()
        switches = ["--headless", "--no-sandbox", "--no-first-run", "--enable-unsafe-swiftshader"]
        quiet = ["gpu", "quic", "background-networking", "component-update", "sync"]
        switches += [*(f"--disable-{what}" for what in quiet), f"--user-data-dir={profile}"]
        address = f"http://127.0.0.1:{server.server_port}/{page}"
        silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        browser = subprocess.Popen([str(CHROMIUM), *switches, address], **silent)
        try:
            return json.loads(Here.found.get(timeout=120))
        finally:
            browser.terminate()
            browser.wait(30)
            server.shutdown()


@needs(CHROMIUM or "chromium", NIIVUE)
def test_niivue_in_a_browser(tmp_path: Path) -> None:
    """NiiVue, and the browser's own unpacking, which takes one member and minds what follows."""
    shutil.copy(NIIVUE, tmp_path)
    volumes = {}
    for name, turn in (("a.nii", "upright"), ("b.nii.gz", "oblique, flipped")):
        volumes[name] = enlarged(scan(turn))
        write_volume(tmp_path / name, volumes[name])
    (tmp_path / "page.html").write_text(PAGE % json.dumps(list(volumes)))
    for found, volume in zip(in_chromium(tmp_path, "page.html"), volumes.values(), strict=True):
        assert "error" not in found, found
        assert found["unpacked"] == 352 + volume.array.nbytes
        agrees(found, volume)


# ---------------------------------------------------------------- OME-Zarr

READ_ZARR = """
import json, sys, warnings
warnings.simplefilter("ignore")
import numpy as np, zarr
from napari_ome_zarr import napari_get_reader
from ngff_zarr import from_ngff_zarr
from ome_zarr.io import parse_url
from ome_zarr.reader import Reader
from ome_zarr_models import open_ome_zarr
path, found = sys.argv[1], {}
node = next(iter(Reader(parse_url(path))()))
found["ome-zarr"] = [np.asarray(level).tolist() for level in node.data]
found["steps"] = node.metadata["coordinateTransformations"]
((data, how, _),) = napari_get_reader(path)(path)
found["napari"] = np.asarray(data[0] if isinstance(data, list) else data).tolist()
found["napari steps"] = how
image = from_ngff_zarr(path, validate=True).images[0]
found["ngff-zarr"] = np.asarray(image.data).tolist()
found["sides"] = {a: o.value for a, o in (image.axes_orientations or {}).items()}
open_ome_zarr(zarr.open_group(path, mode="r"))  # checks the metadata
print(json.dumps(found, default=lambda o: np.asarray(o).tolist()))
"""
FEET_FIRST = {
    "x": "left-to-right",
    "y": "anterior-to-posterior",
    "z": "superior-to-inferior",
}


@needs(INSTALLED)
@pytest.mark.parametrize("turn", ["feet first", "oblique, flipped"])
def test_readers_of_ome_zarr(tmp_path: Path, turn: str) -> None:
    """The pyramid, its place along its axes and, where the standard has words, their sides."""
    volume = enlarged(scan(shape=(2, 34, 20)))
    if turn == "feet first":
        volume = volume._replace(direction=(-1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, -1.0))
    write_volume(tmp_path / "v.ome.zarr", volume)
    lines = said(PYTHON, "-c", READ_ZARR, tmp_path / "v.ome.zarr", timeout=120).splitlines()
    found = json.loads(lines[-1])
    assert len(found["ome-zarr"]) == 2
    for name in ("napari", "ngff-zarr"):
        assert np.array_equal(found[name], volume.array), name
    assert np.array_equal(found["ome-zarr"][0], volume.array)
    scale, shift = (np.array(step[step["type"]]) for step in found["steps"][0])
    assert np.array_equal(scale, volume.spacing_mm)
    assert found["napari steps"]["scale"] == list(volume.spacing_mm)
    along = volume.world_mm((0, 0, 0)) @ np.reshape(volume.direction, (3, 3))
    assert shift[::-1] == pytest.approx(along, abs=1e-9)
    assert found["sides"] == (FEET_FIRST if turn == "feet first" else {})


# ---------------------------------------------------------------- DICOM


@needs("dcm2json")
def test_dcmtk(tmp_path: Path) -> None:
    """Voxels and places, as the toolkit of many viewers and archives finds them."""
    volume = enlarged(scan("twice"))
    write_volume(tmp_path / "v.dicom", volume)
    for z, file in enumerate(sorted((tmp_path / "v.dicom").iterdir())):
        tags = json.loads(said("dcm2json", file))
        voxels = np.frombuffer(base64.b64decode(tags["7FE00010"]["InlineBinary"]), "<i2")
        assert np.array_equal(voxels.reshape(volume.shape[1:]), volume.array[z])
        first, cosines, (down, right) = (
            np.array(tags[tag]["Value"], float) for tag in ("00200032", "00200037", "00280030")
        )
        far = first + cosines[:3] * right * (volume.shape[2] - 1)
        assert first == pytest.approx(volume.world_mm((z, 0, 0)), abs=1e-4)
        assert far == pytest.approx(volume.world_mm((z, 0, volume.shape[2] - 1)), abs=1e-4)
        low = first + cosines[3:] * down * (volume.shape[1] - 1)
        assert low == pytest.approx(volume.world_mm((z, volume.shape[1] - 1, 0)), abs=1e-4)
