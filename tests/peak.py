"""Code for a measured child process: its own peak of memory.

On Linux `ru_maxrss` of a child begins with the peak of the process that started it; `VmHWM` does
not.
"""

PEAK_BYTES = """
import resource, sys
from pathlib import Path

def peak_bytes():
    status = Path("/proc/self/status")
    if status.exists():
        (line,) = [s for s in status.read_text().splitlines() if s.startswith("VmHWM")]
        return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
"""
