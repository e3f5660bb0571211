"""The benchmarks are scripts: their modules lie beside them, in no package."""

import sys
from pathlib import Path

import router  # noqa: F401 - before benchmarks/router.py can be taken for it

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
