"""The script that checks all kernels: what it says and returns. Times need a GPU."""

import json
import math
from pathlib import Path

import pytest
import torch

from kvpleat.bench import kernels
from kvpleat.bench.kernel_streams import as_kept, uneven
from kvpleat.bench.kernel_timing import ONCE, Cases, Checked, Machine

pytest.importorskip("triton")  # conftest.py has it interpreted where there is no GPU
CPU = torch.device("cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU it takes minutes, and is run by hand")
def test_checks_run_through_the_interpreter(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert kernels.main(["--quick", "--only", "decode", "--json", str(tmp_path / "figures.json")]) == 0
    figures = json.loads((tmp_path / "figures.json").read_text())
    checks = figures["kernels"]["decode"]["checks"]
    assert any("mass" in check["case"] for check in checks)
    assert all(0 <= check["error"] <= check["allowed"] for check in checks)
    assert capsys.readouterr().out.count("ok    ") == len(checks)


@pytest.mark.parametrize("error", [0.2, math.nan, math.inf])
def test_a_failed_check_fails_the_run(
    error: float, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    checks = [Checked("right", 0.1, 0.1), Checked("wrong", error, 0.1)]
    monkeypatch.setattr(kernels, "all_cases", lambda: [Cases("mine", lambda _: iter(checks), lambda _: iter([]))])
    assert kernels.main([]) == 1
    out = capsys.readouterr().out
    assert "FAILED mine" in out
    assert "1 of 2 checks failed, so no times" in out


def test_lengths_are_what_they_are_said_to_be() -> None:
    torch.manual_seed(0)
    lengths = uneven(4, 5, 8, 2048, CPU).float()
    assert lengths.mean().item() == pytest.approx(2048, rel=0.01)
    assert lengths.max() <= 8192
    assert 0.5 < lengths.mean(0).log().std() < 1.0
    kept = as_kept(12, 32, 8, CPU) / 8192
    assert kept.mean().item() == pytest.approx(0.25, rel=0.05)
    assert kept.min() > 0.03  # what waits is held by all
    assert (kept > 0.8).float().mean().item() == pytest.approx(0.1, abs=0.05)
    assert kept.median().item() < 0.15


def test_one_case_is_launched_and_not_timed() -> None:
    """For profilers: the first of the calls, three times; and other cases are not wanted."""
    called: list[str] = []
    here = Machine(torch.device("cpu"), quick=False, case="race, 64", once=True)
    assert math.isnan(here.seconds([lambda: called.append("first"), lambda: called.append("second")]))
    assert called == ["first"] * ONCE
    assert [here.wants(name) for name in ("race, 64 rows", "race, 1 row", "what stays, 64 rows")] == [
        True,
        False,
        False,
    ]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_once_needs_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    """It says so, and nothing is launched."""
    with pytest.raises(SystemExit):
        kernels.main(["--once", "--case", "race"])
    assert "GPU" in capsys.readouterr().err
