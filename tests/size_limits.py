"""How long the package may be, and the exceptions, which only shrink."""

CODE = 8_900
DOCSTRINGS = 2_500
LONGEST = 400
MEDIAN = 150
LONG_PAGES = {}
LONG_CELLS = {}
