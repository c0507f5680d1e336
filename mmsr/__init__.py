"""Super-resolution of clinical lung CT towards micro-CT: the names that people import.

`import mmsr` loads nothing heavy; each name below is fetched from its module when it is first used.
The parts are `mmsr.data`, `networks`, `losses`, `training`, `scans`, `inference`, `evaluation`, `app`.
"""

__version__ = "0.1.0"

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # for editors and type checkers; a test holds it equal to _HOMES
    from mmsr.app.prepare import PrepareSettings, prepare
    from mmsr.app.train import TrainSettings, train
    from mmsr.core import MMSRError, show_patches
    from mmsr.data.masks import lung_mask, specimen_mask
    from mmsr.data.phantom_scans import clinical_case, micro_case
    from mmsr.data.volume import Volume
    from mmsr.evaluation.figures import side_by_side, training_curves
    from mmsr.evaluation.protocols import measure
    from mmsr.inference.sr_slices import SROptions
    from mmsr.inference.super_resolve import super_resolve
    from mmsr.networks.weights import load_generator, save_generator
    from mmsr.scans.read import read_mask, read_volume
    from mmsr.scans.scan_summary import scan_info
    from mmsr.scans.write import write_volume

_HOMES = {
    "scans.read": ("read_volume", "read_mask"),
    "scans.write": ("write_volume",),
    "scans.scan_summary": ("scan_info",),
    "data.volume": ("Volume",),
    "data.masks": ("lung_mask", "specimen_mask"),
    "data.phantom_scans": ("clinical_case", "micro_case"),
    "app.prepare": ("prepare", "PrepareSettings"),
    "app.train": ("train", "TrainSettings"),
    "networks.weights": ("load_generator", "save_generator"),
    "inference.super_resolve": ("super_resolve",),
    "inference.sr_slices": ("SROptions",),
    "evaluation.protocols": ("measure",),
    "evaluation.figures": ("side_by_side", "training_curves"),
    "core": ("show_patches", "MMSRError"),
}
__all__ = [name for names in _HOMES.values() for name in names]


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            return globals().setdefault(name, getattr(import_module(f"mmsr.{home}"), name))
    raise AttributeError(f"module 'mmsr' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
