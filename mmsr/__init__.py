"""Super-resolution of clinical lung CT towards micro-CT: the names that people import.

`import mmsr` loads nothing heavy; each name in `__init__.pyi` is fetched from its module when it is
first used. The parts are `mmsr.data`, `networks`, `losses`, `training`, `scans`, `inference`,
`evaluation`, `app`.
"""

__version__ = "0.1.0"

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
