"""What all tests share: no hub, and nothing of what the user has downloaded. Set before transformers is imported."""

import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

_HF_HOME = tempfile.TemporaryDirectory(prefix="kvpleat-hf-")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HOME"] = _HF_HOME.name
sys.path.insert(0, str(Path(__file__).parent.parent))  # so that tests can import `tests.models` and `tests.reference`

import pytest  # noqa: E402
import torch  # noqa: E402

from tests import models  # noqa: E402

torch.set_num_threads(1)  # tiny models on busy cores: threads that wait for each other take a hundred times longer


@pytest.fixture(autouse=True)
def nothing_stays_attached() -> Iterator[None]:
    """After each test no tiny model of it carries anything of kvpleat: no implementation, no hook, no generate."""
    yield
    for model in models.made():
        name = type(model).__name__
        assert model.config._attn_implementation != "kvpleat", f"{name} kept the attention implementation"
        for module in model.modules():
            for hooks in (module._forward_hooks, module._forward_pre_hooks):
                owners = [getattr(hook, "__module__", "") or "" for hook in hooks.values()]
                assert not any(owner.startswith("kvpleat") for owner in owners), f"{name} kept a hook"
        assert "kvpleat" not in str(vars(model).get("generate", "")), f"{name} kept a generate"
