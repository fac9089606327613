"""The first import of matplotlib, which fails for reasons that concern no picture here."""

import os
import sys

from ..extras import require

require("figures", "timm_mfd.figures")
try:
    import matplotlib
except ValueError:  # MPLBACKEND names a backend of another environment; nothing here opens a window
    chosen = os.environ.pop("MPLBACKEND")
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        del sys.modules[name]  # the half that was imported
    import matplotlib  # noqa: F401

    os.environ["MPLBACKEND"] = chosen
