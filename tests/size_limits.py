"""How long the package may be, and the exceptions, which only shrink."""

CODE = 9_300
DOCSTRINGS = 2_500
LONGEST = 400
MEDIAN = 150
LONG_PAGES = {
    "5_scans/02_dicom_file.ipynb": 334,
    "5_scans/16_scan_summary.ipynb": 284,
}
LONG_CELLS = {
    "5_scans/16_scan_summary.ipynb: ScanInfo": 61,
}
