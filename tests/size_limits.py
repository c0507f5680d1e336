"""How long the package may be, and the exceptions, which only shrink."""

CODE = 11_091
DOCSTRINGS = 3_000
LONGEST = 400
MEDIAN = 150
LONG_PAGES = {}
LONG_CELLS = {}
