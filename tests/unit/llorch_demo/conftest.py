"""The trainer's modules are scripts in ``tools/``, not a package: tests import them from there."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "tools"))
