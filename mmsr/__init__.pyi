# The door: what `import mmsr` offers, and where each name lives (read by editors and at run time).
from .app.comparison import compare as compare
from .app.monitor import monitor as monitor
from .app.prepare import prepare as prepare
from .app.scan_viewer import view as view
from .app.studios import loss_explorer as loss_explorer
from .app.studios import phantom_studio as phantom_studio
from .app.train import TrainSettings as TrainSettings
from .app.train import train as train
from .app.training_cases import PrepareSettings as PrepareSettings
from .core import MMSRError as MMSRError
from .core import show_patches as show_patches
from .data.masks import lung_mask as lung_mask
from .data.masks import specimen_mask as specimen_mask
from .data.phantom_scans import clinical_case as clinical_case
from .data.phantom_scans import micro_case as micro_case
from .data.volume import Volume as Volume
from .evaluation.figures import side_by_side as side_by_side
from .evaluation.figures import training_curves as training_curves
from .evaluation.protocols import measure as measure
from .inference.sr_slices import SROptions as SROptions
from .inference.super_resolve import super_resolve as super_resolve
from .networks.weights import load_generator as load_generator
from .networks.weights import save_generator as save_generator
from .scans.read import read_mask as read_mask
from .scans.read import read_volume as read_volume
from .scans.scan_summary import scan_info as scan_info
from .scans.write import write_volume as write_volume

__version__: str
