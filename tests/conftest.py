"""What all tests share: no hub, and nothing of what the user has downloaded. Set before transformers is imported."""

import os
import tempfile

_HF_HOME = tempfile.TemporaryDirectory(prefix="kvpleat-hf-")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HOME"] = _HF_HOME.name
