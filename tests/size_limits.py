"""How long the package may be, and the exceptions, which only shrink."""

CODE = 9_300
DOCSTRINGS = 2_500
LONGEST = 400
MEDIAN = 150
LONG_PAGES = {
    "5_scans/06_volume_headers.ipynb": 253,
}
LONG_CELLS = {
    "5_scans/16_resumable_output.ipynb: ResumableOutput": 70,
}
