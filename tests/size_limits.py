"""How long the package may be, and the exceptions, which only shrink."""

CODE = 9_640
DOCSTRINGS = 2_700
LONGEST = 400
MEDIAN = 150
LONG_PAGES = {}
LONG_CELLS = {}
