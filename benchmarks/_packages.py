"""Import this first where the package `router` is needed: the script router.py beside it would be taken for it."""

import sys

_folder = sys.path.pop(0)
import router  # noqa: E402, F401 - without this folder on the path

sys.path.insert(0, _folder)
