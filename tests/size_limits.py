"""How long the package may be, and the exceptions, which only shrink."""

CODE = 10_291
DOCSTRINGS = 2_900
LONGEST = 400
MEDIAN = 150
LONG_PAGES = {}
LONG_CELLS = {}
