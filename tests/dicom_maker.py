"""Makes DICOM series, the same in every run, with names in them that must never show."""

import imagecodecs
import numpy as np
import pydicom
import pytest
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.pixels import get_encoder
from pydicom.uid import (
    CTImageStorage,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    HTJ2KLossless,
    JPEG2000Lossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    JPEGLSNearLossless,
    RLELossless,
    generate_uid,
)

from mmsr.core import MMSRError
from mmsr.scans.dicom_series import DICOM
from mmsr.scans.read import read_volume

PACKED = {
    JPEGLSLossless: imagecodecs.jpegls_encode,
    JPEGLSNearLossless: lambda a: imagecodecs.jpegls_encode(a, level=3),
    JPEG2000Lossless: lambda a: imagecodecs.jpeg2k_encode(a, reversible=True, codecformat="j2k"),
    HTJ2KLossless: lambda a: imagecodecs.htj2k_encode(a, reversible=True),
    JPEGLosslessSV1: imagecodecs.ljpeg_encode,
    RLELossless: lambda a: get_encoder(RLELossless).encode(
        a.tobytes(),
        rows=a.shape[0],
        columns=a.shape[1],
        samples_per_pixel=1,
        number_of_frames=1,
        bits_allocated=16,
        bits_stored=16,
        pixel_representation=0,
        photometric_interpretation="MONOCHROME2",
        encoding_plugin="pydicom",
    ),
}


def chest(n=6, h=40, w=48, seed=0):
    """Make int16 HU: noisy air around a block of tissue, different in each slice."""
    rng = np.random.default_rng(seed)
    hu = rng.normal(-900, 20, (n, h, w))
    inside = slice(None), slice(h // 4, 3 * h // 4), slice(w // 4, 3 * w // 4)
    hu[inside] = rng.normal(40, 20, hu[inside].shape)
    hu[:, 2, 2] = 100 * (np.arange(n) % 30)
    return np.clip(hu.round(), -1000, 3000).astype(np.int16)


def uid(*words):
    """Make an identifier from words: by chance, its digits may be those of a date or a number."""
    return generate_uid(entropy_srcs=[str(word) for word in words])


def blank(sop_class, syntax, instance, series):
    """Make an empty CT object."""
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = syntax
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = sop_class, instance
    little = syntax != ExplicitVRBigEndian
    d = FileDataset(None, {}, file_meta=meta, preamble=b"\0" * 128, is_little_endian=little)
    d.SOPClassUID, d.SOPInstanceUID, d.SeriesInstanceUID = sop_class, instance, series
    d.StudyInstanceUID, d.FrameOfReferenceUID = uid("study"), "1.2.3.4"
    d.Modality, d.SeriesNumber = "CT", 7
    d.PatientName, d.PatientID, d.SeriesDescription = "Secret^Name", "Secret number", "Secret knee"
    d.StudyDescription = d.InstitutionName = d.AccessionNumber = "Secret"
    d.SamplesPerPixel, d.PhotometricInterpretation = 1, "MONOCHROME2"
    d.BitsAllocated, d.BitsStored, d.HighBit, d.PixelRepresentation = 16, 16, 15, 0
    return d


def pixels(d, planes, syntax):
    """Set the pixel data of `d` to stored numbers, packed as `syntax` wants it."""
    cells = [np.ascontiguousarray(np.rint(a).astype(np.int64).astype("<u2")) for a in planes]
    if syntax in PACKED:
        d.PixelData = encapsulate([PACKED[syntax](a) for a in cells])
        d["PixelData"].is_undefined_length = True
    else:
        kind = ">u2" if syntax == ExplicitVRBigEndian else "<u2"
        d.PixelData = b"".join(a.astype(kind).tobytes() for a in cells)
    d["PixelData"].VR = "OW"


def series(
    folder,
    hu,
    *,
    step=(0.0, 0.0, 2.5),
    places=None,
    syntax=ExplicitVRLittleEndian,
    intercepts=(-1024,),
    **tags,
):
    """Write `hu` as single slices, in a shuffled order of names; a tag that is None is left out."""
    folder.mkdir(exist_ok=True, parents=True)
    names = np.random.default_rng(1).permutation(len(hu))
    slope = tags.get("RescaleSlope") or 1
    for k, plane in enumerate(hu):
        d = blank(CTImageStorage, syntax, uid(folder.name, k), uid(folder.name))
        d.Rows, d.Columns = plane.shape
        d.PixelSpacing, d.ImageOrientationPatient = [0.5, 0.6], [1, 0, 0, 0, 1, 0]
        place = [-10 + k * step[0], 20 + k * step[1], 30 + k * step[2]]
        d.ImagePositionPatient = [round(float(v), 6) for v in (places[k] if places else place)]
        d.SliceThickness, d.ConvolutionKernel = 2.5, "FC51"
        d.RescaleSlope, d.RescaleIntercept = 1, intercepts[k % len(intercepts)]
        if tags.get("RescaleIntercept") is not None:
            d.RescaleIntercept = tags["RescaleIntercept"]
        pixels(d, [(plane - float(d.RescaleIntercept)) / slope], syntax)
        for tag, value in tags.items():
            if value is None:
                delattr(d, tag)
            else:
                setattr(d, tag, value)
        d.save_as(folder / f"{names[k]:02d}.dcm", enforce_file_format=True)
    return folder


def in_order(folder):
    """Return the files of a series, sorted along z."""
    return sorted(folder.iterdir(), key=lambda p: float(pydicom.dcmread(p).ImagePositionPatient[2]))


def change(path, **tags):
    """Set tags of one file."""
    d = pydicom.dcmread(path)
    for tag, value in tags.items():
        setattr(d, tag, value)
    d.save_as(path)


def heads_of(folder):
    """Read what the files of a folder say."""
    return [head for path in sorted(folder.iterdir()) for head in DICOM.inspect(path)]


def refused(kind, path, *words, **options):
    """Read a scan, and check that it is refused in one good line."""
    with pytest.raises(MMSRError) as caught:
        read_volume(path, **options)
    line = str(caught.value)
    assert type(caught.value) is kind, line
    assert "\n" not in line
    names = [path.name, *(p.name for p in path.parent.rglob("*"))]
    assert any(name in line for name in names), line  # it names the file, or one beside or in it
    assert str(path.parent) not in line  # the file's name is enough; folders may name people
    assert "Secret" not in line
    for word in words:
        assert word in line, line
    return line
