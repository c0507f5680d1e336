"""Bundle a trained generator: `python workflow/bundle_weights.py runs/bundled default`.

Writes mmsr/weights/phantom.safetensors from train/<model> of a finished plan, with the measures of
its evaluation (held-out phantom cases, bicubic beside it) in the record.
"""

import sys
from pathlib import Path

from mmsr.core import read_json
from mmsr.evaluation.protocols import find_weights
from mmsr.networks.weights import load_generator, save_generator

run, model = Path(sys.argv[1]), sys.argv[2]
metrics = read_json(run / "metrics.json")
rows = {row["method"]: row for row in metrics["rows"]}
g1, record = load_generator(run / "train" / model / "weights.safetensors")
measures = {
    "on": f"{metrics['slices']} slices of held-out phantom cases: {', '.join(metrics['cases'])}",
    "this": rows[model],
    "bicubic": rows["bicubic"],
    "truth": rows["truth"],
}
target = find_weights("bundled")
save_generator(target, g1, record.model_copy(update={"measures": measures}))
print(f"{target.name}: {target.stat().st_size / 1e6:.2f} MB, {record.training['steps']} steps")
