"""Imported first by every script: without the extra that all of them need, one line says so."""

import sys
from pathlib import Path

from timm_mfd.extras import require

try:
    require("train", Path(sys.argv[0]).name)
except ModuleNotFoundError as error:
    sys.exit(f"{Path(sys.argv[0]).name}: error: {error}")
