"""Imported first by every script: without the extra that all of them need, one line says so."""

import os
import sys
from pathlib import Path

for _name, _mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
    if getattr(sys, _name) is None:  # closed, as by 2>&-: the next file would be opened in its place, and written to
        setattr(sys, _name, open(os.devnull, _mode))  # noqa: SIM115

try:
    from timm_mfd.extras import require

    require("train", Path(sys.argv[0]).name)
    import tqdm  # noqa: F401
    import tyro  # noqa: F401
except Exception as error:  # also of packages that do not fit each other, or the environment
    sys.exit(f"{Path(sys.argv[0]).name}: error: {' '.join(str(error).split()) or repr(error)}")
