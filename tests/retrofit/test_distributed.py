"""Two processes of one row each do what one process does with two rows."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from kvpleat import compress, policies
from kvpleat.errors import ModelError
from kvpleat.policies import Gates
from kvpleat.retrofit import checkpoint
from kvpleat.retrofit.distributed import Processes, part_of, whole
from tests import models
from tests.retrofit import ranks

ROOT = Path(__file__).parents[2]
CLOSE = 1e-5


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what two processes wrote, over gloo."""
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    found = subprocess.run(
        [sys.executable, "-m", "tests.retrofit.ranks", str(folder), port],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}"},
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
    )
    assert found.returncode == 0, found.stderr
    return folder


@pytest.mark.parametrize("way", ranks.RECIPES)
def test_two_processes_are_one(way: str, together: Path, tmp_path: Path) -> None:
    """Losses, shares, judgement, and everything that was trained, through a checkpoint half way."""
    figures, trained = ranks.results(way, tmp_path)
    found = json.loads((together / way / "figures.json").read_text())
    for mine, theirs in zip(found["steps"], figures["steps"], strict=True):
        assert mine == pytest.approx(theirs, abs=CLOSE)
    assert found["judged"] == pytest.approx(figures["judged"], rel=1e-4, abs=CLOSE)
    assert found["tokens"] == figures["tokens"]
    weights = load_file(together / way / "trained.safetensors")
    assert weights.keys() == trained.keys()
    start = ranks.run_of(way).trained()
    for name, tensor in trained.items():
        torch.testing.assert_close(weights[name], tensor, atol=CLOSE, rtol=0)
    moved = [
        name for name, tensor in trained.items() if float((tensor - start[name].detach()).abs().max()) > 20 * CLOSE
    ]
    assert len(moved) > len(trained) / 2


@pytest.mark.parametrize("way", ranks.RECIPES)
def test_their_files_are_whole(way: str, together: Path, tmp_path: Path) -> None:
    """Checkpoints and gate folders hold what one process writes, shards put together."""
    ranks.results(way, tmp_path)
    for name in ("checkpoint/state.safetensors", "gates/gates.safetensors"):
        mine, theirs = load_file(together / way / name), load_file(tmp_path / name)
        assert mine.keys() == theirs.keys()
        for key, tensor in theirs.items():
            assert mine[key].shape == tensor.shape
            torch.testing.assert_close(mine[key].double(), tensor.double(), atol=1e-3, rtol=0)  # 16 bits in places
    assert {p.name for p in (together / way / "gates").rglob("*")} == {p.name for p in (tmp_path / "gates").rglob("*")}
    state = json.loads((together / way / "checkpoint" / checkpoint.STATE_FILE).read_text())
    assert state["processes"] == 2
    with pytest.raises(ModelError, match=r"with (recipe|processes)"):
        checkpoint.load(ranks.run_of(way), together / way / "checkpoint")


def test_retrofit_from_end_to_end(together: Path, tmp_path: Path) -> None:
    """The whole loop: every process knows what was measured, one line a step is written, and gates compress."""
    wanted = ranks.through(tmp_path)
    for rank in range(2):
        measured = json.loads((together / f"measured-{rank}.json").read_text())
        assert measured["1.4x"] == pytest.approx(wanted["1.4x"], rel=1e-4, abs=CLOSE)
    out = together / "through"
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [*range(1, ranks.STEPS + 1), ranks.STEPS]
    assert len(list((out / "tensorboard").iterdir())) == 1
    assert {path.name for path in out.iterdir()} == {path.name for path in tmp_path.iterdir()}
    model: Any = models.tiny("llama")
    with compress(model, policies.DMS.from_pretrained(str(out / "1.4x"))), torch.no_grad():
        assert model(models.prompt(30)).logits.isfinite().all()
    assert Gates.from_pretrained(out / "1.4x").config.training["recipe"]["rows"] == 1


def test_one_process_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """No process group, nothing sharded, every question answered here."""
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    alone, x = Processes(torch.device("cpu")), torch.arange(3.0)
    assert (alone.rank, alone.size, alone.main) == (0, 1, True)
    layer = torch.nn.Linear(2, 2)
    alone.shard(layer, [])
    assert type(layer) is torch.nn.Linear
    assert alone.mean(x) is x
    assert alone.any(True)
    assert not alone.any(False)
    assert whole(x) is x
    assert part_of(x, x) is x
    alone.wait()
    assert not torch.distributed.is_initialized()
