"""How long the package may be, and the exceptions, which only shrink."""

CODE = 9_580
DOCSTRINGS = 2_600
LONGEST = 400
MEDIAN = 150
LONG_PAGES = {}
LONG_CELLS = {}
