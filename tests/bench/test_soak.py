"""The soak, for twenty seconds; that it sees what is wrong; and what is said about answers being the same."""

import random
from typing import Any

import pytest
import torch

from kvpleat.bench import soak, soak_identical, soak_load
from kvpleat.engine.core import EngineCore

ONE = ["--device", "cpu", "--policy", "fold"]


@pytest.mark.slow
def test_twenty_seconds(capsys: pytest.CaptureFixture[str]) -> None:
    """Every policy for a few seconds, with preemptions; one line for each, and the verdict."""
    assert soak.main(["--device", "cpu", "--minutes", str(20 / 60)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[2:-1]] == list(soak_load.NAMES)
    assert all(line.endswith("MiB  ok") for line in lines[2:-1])
    assert lines[-1].startswith("ok after")


def test_a_lost_page_is_seen(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    finish, lost = EngineCore._finish, []

    def lose(core: EngineCore, row: Any, reason: str) -> None:
        if not lost and int(core.runner.pool.free_count):
            lost.append(core.runner.pool.free_count.sub_(1))
        finish(core, row, reason)

    monkeypatch.setattr(EngineCore, "_finish", lose)
    monkeypatch.setattr(soak, "check_integrity", lambda pool: None)  # it would say so earlier
    assert soak.main([*ONE, "--minutes", "0.03"]) == 1
    assert "pages are not free" in capsys.readouterr().out


def test_other_tokens_are_seen(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(soak, "COMPARED", 0.5)
    take = EngineCore._take

    def change(core: EngineCore, launched: Any, drawn: list[int]) -> Any:
        many = core.scheduler.limits.seats > 1  # only where others run beside it
        return take(core, launched, [(token + 1) % 90 if many and token >= 0 else token for token in drawn])

    monkeypatch.setattr(EngineCore, "_take", change)
    assert soak.main([*ONE, "--minutes", "0.1"]) == 1
    assert "are not as alone" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["full", "attention", "dms", "dmc-of-3"])
def test_identical(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What core.py says. The same request alone: the same bits. In a batch, or preempted: the same tokens in float32,
    log probabilities within 1e-5, and other bits."""
    monkeypatch.setattr(soak_identical, "COUNT", 7)
    monkeypatch.setattr(soak_identical, "ANSWER", 24)
    it = soak_load.served(None, torch.device("cpu"), torch.float32)
    found = soak_identical.compare(it, name)
    again, batch, preempted = found["alone again"], found["in a batch"], found["preempted"]
    assert again.largest == 0.0
    assert again.same == batch.same == preempted.same == again.tokens == 7 * 24
    assert 0.0 < batch.largest < 1e-5
    assert 0.0 < preempted.largest < 1e-5
    assert preempted.preemptions > batch.preemptions == 0


def test_identical_sees_differences(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(soak_identical, "COUNT", 5)
    monkeypatch.setattr(soak_identical, "ANSWER", 8)
    monkeypatch.setitem(soak_identical.ALLOWED, torch.float32, (1.0, 1e-9))
    assert soak.main(["--device", "cpu", "--policy", "full", "--only", "identical"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert "FAILED" not in lines[2]
    assert lines[3].endswith("FAILED"), "another batch gives other bits"


def test_arrivals() -> None:
    """Poisson: mean and variance are the same."""
    chance = random.Random(0)
    counts = torch.tensor([soak_load.arrivals(chance, 0.7) for _ in range(20000)], dtype=torch.float64)
    assert float(counts.mean()) == pytest.approx(0.7, abs=0.03)
    assert float(counts.var()) == pytest.approx(0.7, abs=0.05)
