"""How long the package may be, and the exceptions, which only shrink."""

CODE = 9_671
DOCSTRINGS = 2_650
LONGEST = 400
MEDIAN = 150
LONG_PAGES = {}
LONG_CELLS = {}
