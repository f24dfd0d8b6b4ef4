"""Time to the first token: requests are answered, and what they share is found from the third on."""

import pytest

from kvpleat.bench import prefix


def test_prints_what_was_found(capsys: pytest.CaptureFixture[str]) -> None:
    assert prefix.main(["--device", "cpu", "--tokens", "80", "--policies", "dms"]) == 0
    alone, shared = capsys.readouterr().out.splitlines()[1:]
    assert alone.split()[:2] == ["dms", "alone"]
    assert alone.count("(0)") == 4
    assert shared.split()[:2] == ["dms", "shared"]
    assert [part for part in shared.split() if part.startswith("(")] == ["(0)", "(0)", "(80)", "(80)"]
