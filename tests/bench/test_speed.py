"""Speed: definitions by hand, the floor by hand, and speeds that are refused."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from rich.progress import Progress
from torch import Tensor
from typer.testing import CliRunner

from kvpleat.bench import floor, metrics, rehearsal, speed
from kvpleat.bench.methods import Memory, Method, parse, parse_list
from kvpleat.bench.methods.pleated import PleatedMethod, PleatedSession, RandomEviction
from kvpleat.bench.records import ResultFile
from kvpleat.bench.speed import Pace, measure, share_weights
from kvpleat.cli import app
from kvpleat.errors import JudgeError, PeerError
from kvpleat.hf.models import LoadedModel
from kvpleat.types import Decision, KVShape, PolicyInput
from tests.models import prompt, tiny

IDS = prompt(140, rows=2)
PACE = Pace(steps=37, warmup=3, repeats=2)  # a moment of compression falls into every 32 steps
SHORT = Pace(steps=34, warmup=0, repeats=1)


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> LoadedModel:
    """A tiny model, with no process started to measure its memory."""
    monkeypatch.setattr(speed, "can_measure", lambda device: False)
    return LoadedModel("tiny", tiny("llama", dtype=torch.float32), None, "random")


def records_of(loaded: LoadedModel, chosen: list[Method], pace: Pace = PACE) -> dict[str, dict[str, Any]]:
    with Progress(disable=True) as progress:
        records = measure(loaded, chosen, IDS, pace, 1e9, progress)
    json.dumps(records, allow_nan=False)
    return {record["method"]: record for record in records}


# ---- definitions


def test_speed_metrics_by_hand() -> None:
    intervals = [0.1, 0.1, 0.1, 0.5]
    assert metrics.time_per_output_token(intervals) == pytest.approx(0.2)
    assert metrics.output_throughput(3, 1.2, intervals) == pytest.approx(3 * 5 / 2.0)
    assert metrics.percentile([1.0, 2.0, 3.0, 4.0, 10.0], 50) == 3.0
    assert metrics.percentile([1.0, 2.0, 3.0, 4.0, 10.0], 90) == pytest.approx(4 + 0.6 * 6)
    assert metrics.percentile([7.0], 99) == 7.0


def test_live_bytes_by_hand() -> None:
    """2 rows, 10 tokens, entries of 2 * 4 * 4 bytes; heads kept 10, 4, 7.5 and 0 of 10: 21.5 of 40 in each row."""
    shape = KVShape(2, 2, 4, 4, torch.float32)
    full = 2 * 10 * 4 * 32
    kept = [[10.0, 4.0], [7.5, 0.0]]
    assert floor.live_bytes(Memory(full, 1234, 9999, kept), shape, rows=2, tokens=10) == 2 * 21.5 * 32
    assert floor.live_bytes(Memory(full, 1234, 9999), shape, rows=2, tokens=10) == 1234
    with_sliding = floor.live_bytes(Memory(full + 500, 1234, 9999, kept), shape, rows=2, tokens=10)
    assert with_sliding == 2 * 21.5 * 32 + 500
    fewer_bits = floor.live_bytes(Memory(full, 1234, 400, kept), shape, rows=2, tokens=10)
    assert fewer_bits == 400


def test_weights_that_a_step_reads() -> None:
    """All of a tied model's; an embedding of its own is only looked up in."""
    tied, untied = (tiny("llama", dtype=torch.float32, tie_word_embeddings=tie) for tie in (True, False))
    everything = sum(p.numel() * 4 for p in tied.parameters())
    assert floor.weights_read(tied) == everything
    assert floor.weights_read(untied) == everything


def test_copy_bandwidth_counts_both_directions(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 2.0, 10.0, 11.0])
    monkeypatch.setattr(floor, "COPIED", 400)
    monkeypatch.setattr(floor, "TRIES", 2)
    monkeypatch.setattr(floor, "now", lambda device: next(clock))
    assert floor.copy_bandwidth(torch.device("cpu")) == 800.0


def test_twins_share_weights_and_nothing_else(loaded: LoadedModel) -> None:
    twin = share_weights(loaded)
    for ours, theirs in zip(loaded.model.parameters(), twin.model.parameters(), strict=True):
        assert ours.data_ptr() == theirs.data_ptr()
    assert twin.model.config is not loaded.model.config
    assert torch.equal(twin.model(IDS).logits, loaded.model(IDS).logits)


# ---- records


def test_a_record_by_its_own_times(loaded: LoadedModel) -> None:
    got = records_of(loaded, parse_list("dynamic,full,attention:ratio=4"))
    for record in got.values():
        assert record["refused"] is None
        assert (record["batch"], record["context"]) == (2, 140)
        assert [len(steps) for steps in record["step_s"]] == [37, 37]
        assert len(record["ttft_s"]) == len(record["prefill_s"]) == 2
        tpots = [sum(steps) / 37 for steps in record["step_s"]]
        assert record["tpot_s"] == pytest.approx(sum(tpots) / 2)
        assert record["tokens_per_s"] == pytest.approx(2 / record["tpot_s"])
        assert record["floor_share"] == pytest.approx(record["floor_step_s"] / record["tpot_s"])
        assert record["itl_s"]["p50"] <= record["itl_s"]["p90"] <= record["itl_s"]["p99"]
        assert [tokens for tokens, _ in record["trace"]] == list(range(100, 141))
        assert record["trace"][-1][1] == record["memory"]["allocated_bytes"]
    assert got["dynamic"]["check"] is None
    assert got["dynamic"]["speedup"] == {"median": 1.0, "min": 1.0, "max": 1.0}
    entry, weights = 2 * 16 * 4, floor.weights_read(loaded.model)
    full = (weights + 2 * 140 * 3 * 2 * entry) / 1e9
    assert got["dynamic"]["floor_step_s"] == got["full"]["floor_step_s"] == pytest.approx(full)
    assert weights / 1e9 < got["attention:ratio=4"]["floor_step_s"] < full
    for spec in ("full", "attention:ratio=4"):
        assert got[spec]["check"]["passed"]
        assert got[spec]["check"]["pages"]["passed"]


# ---- refusals


@dataclass(frozen=True)
class Moody(RandomEviction):
    """Evicts something else every time it is asked: the tokens alone do not decide, so it is no function."""

    calls: ClassVar[list[int]] = []

    def decide(self, inputs: PolicyInput) -> Decision | None:
        self.calls.append(0)
        return RandomEviction(self.ratio, seed=len(self.calls)).decide(inputs)


class Spoiled(PleatedMethod):
    """A method whose sessions are wrapped by `session`."""

    session: type[PleatedSession] = PleatedSession

    def open(self, loaded: LoadedModel) -> PleatedSession:
        made = super().open(loaded)
        made.__class__ = self.session
        return made


class ShiftedSession(PleatedSession):
    """Answers single tokens with the logits of other tokens."""

    def decode(self, ids: Tensor) -> Tensor:
        logits = super().decode(ids)
        return logits.roll(1, dims=-1) if ids.shape[1] == 1 else logits

    def fork(self) -> PleatedSession:
        return PleatedSession(self.pleated, self.cache.fork(), owns=False)


class NotANumberSession(ShiftedSession):
    """Answers NaN."""

    def decode(self, ids: Tensor) -> Tensor:
        return PleatedSession.decode(self, ids) * float("nan")


def spoiled(session: type[PleatedSession], spec: str = "attention:ratio=2") -> Method:
    good = parse(spec)
    assert isinstance(good, PleatedMethod)
    method = Spoiled(good.policy, spec)
    method.session = session
    return method


@pytest.mark.parametrize("session", [ShiftedSession, NotANumberSession])
def test_a_wrong_method_gets_no_speed(loaded: LoadedModel, session: type[PleatedSession]) -> None:
    got = records_of(loaded, [parse("dynamic"), spoiled(session), parse("attention:ratio=4")], SHORT)
    wrong = got["attention:ratio=2"]
    assert "in one go" in wrong["refused"]
    assert wrong["check"]["passed"] is False
    assert wrong["tokens_per_s"] is wrong["tpot_s"] is wrong["floor_share"] is None
    assert wrong["step_s"] == wrong["ttft_s"] == []
    assert got["dynamic"]["tokens_per_s"] > 0
    assert got["attention:ratio=4"]["tokens_per_s"] > 0


def test_a_policy_that_is_no_function_gets_no_speed(loaded: LoadedModel) -> None:
    got = records_of(
        loaded, [parse("dynamic"), PleatedMethod(Moody(ratio=4.0), "moody"), parse("random:ratio=4")], SHORT
    )
    assert "in one go" in got["moody"]["refused"]
    assert got["random:ratio=4"]["refused"] is None  # bad, but one function


def test_wrong_pages_refuse_every_method_of_kvpleat(loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if `full` lost entries: a window stands in for it."""
    monkeypatch.setattr(rehearsal, "parse", lambda spec: parse("window:ratio=4" if spec == "full" else spec))
    got = records_of(loaded, parse_list("dynamic,full,attention:ratio=4"), SHORT)
    assert got["dynamic"]["tokens_per_s"] > 0
    for spec in ("full", "attention:ratio=4"):
        assert "DynamicCache" in got[spec]["refused"]
        assert got[spec]["check"]["passed"] is False
        assert got[spec]["tokens_per_s"] is None


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (MemoryError(), "MemoryError"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried 2 GiB"), "Tried 2 GiB"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 bytes"), "can't allocate"),
        (PeerError("The worker ended"), "ended"),
    ],
)
def test_what_stops_one_method_does_not_stop_the_rest(loaded: LoadedModel, error: Exception, words: str) -> None:
    class Broken(PleatedSession):
        def prefill(self, ids: Tensor) -> Tensor:
            raise error

    got = records_of(loaded, [parse("dynamic"), spoiled(Broken)], Pace(4, 0, 1))
    assert words in got["attention:ratio=2"]["refused"]
    assert got["dynamic"]["tokens_per_s"] > 0


def test_a_mistake_is_no_refusal(loaded: LoadedModel) -> None:
    class Mistaken(PleatedSession):
        def prefill(self, ids: Tensor) -> Tensor:
            raise RuntimeError("shapes do not fit")

    with pytest.raises(RuntimeError, match="shapes"):
        records_of(loaded, [parse("dynamic"), spoiled(Mistaken)], Pace(4, 0, 1))


def test_caches_that_do_not_fit_side_by_side(loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """100 and 30 bytes held, 7 more at a peak: 207 are needed, since the check holds two full caches."""
    taken = {"dynamic": (100, 105), "attention:ratio=4": (30, 37)}

    def process_memory(model: str, spec: str, *_: Any, **__: Any) -> dict[str, int]:
        held, peak = taken[spec]
        return {"process_bytes": held, "peak_bytes": peak, "full_bytes": 100}

    monkeypatch.setattr(speed, "can_measure", lambda device: True)
    monkeypatch.setattr(speed, "process_memory", process_memory)
    monkeypatch.setattr(speed, "available_bytes", lambda device: 206)
    got = records_of(loaded, parse_list("dynamic,attention:ratio=4"), Pace(4, 0, 1))
    assert all("207 B" in record["refused"] and "206 B" in record["refused"] for record in got.values())
    assert got["attention:ratio=4"]["peak_bytes"] == 37
    monkeypatch.setattr(speed, "available_bytes", lambda device: 207)
    got = records_of(loaded, parse_list("dynamic,attention:ratio=4"), Pace(4, 0, 1))
    assert all(record["refused"] is None for record in got.values())


def test_verdict_states_the_tolerance_of_the_dtype() -> None:
    record: dict[str, Any] = {}
    rehearsal.verdict([record], rehearsal.Gap(1e-3, 0.5), torch.bfloat16, "this against that")
    assert record["check"]["passed"]
    with pytest.raises(JudgeError, match="this against that"):
        rehearsal.verdict([record], rehearsal.Gap(1e-3, 0.5), torch.float32, "this against that")
    assert not record["check"]["passed"]


# ---- the command


def test_bench_command(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "text.jsonl").write_text(
        "\n".join(json.dumps({"source": "s", "text": " ".join(f"w{i * j % 58}" for i in range(3000))}) for j in (3, 7))
    )
    monkeypatch.setattr(floor, "COPIED", 2**22)
    monkeypatch.setattr(speed, "process_memory", lambda *_, **__: _figures())
    out = tmp_path / "bench.json"
    arguments = ["--model", str(tiny_folder), "--device", "cpu", "--data", str(tmp_path / "text.jsonl")]
    arguments += ["--policy", "window:ratio=2|4", "--batch", "1,2", "--context", "90,120", "--steps", "20"]
    result = CliRunner().invoke(app, ["bench", *arguments, "--repeats", "1", "--out", str(out)], catch_exceptions=False)
    assert result.exit_code == 0, result.stderr
    assert result.stdout.index("floor at 1 x 90") < result.stdout.index("window:rat")
    got = ResultFile.read(out)
    assert (got.kind, got.settings["repeats"], got.settings["batch"]) == ("bench", 1, [1, 2])
    assert got.settings["bandwidth_bytes_per_s"] > 0
    cells = [(r["context"], r["batch"], r["method"]) for r in got.records]
    specs = ("dynamic", "window:ratio=2", "window:ratio=4")
    assert cells == [(length, rows, spec) for length in (90, 120) for rows in (1, 2) for spec in specs]
    assert all(record["refused"] is None for record in got.records)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--batch", "0"), "--batch"),
        (("--context", "many"), "--context"),
        (("--context", "50"), "must lie between 69 and"),
        (("--context", "4096"), "must lie between 69 and"),
    ],
)
def test_bad_options_end_with_2(tiny_folder: Path, arguments: tuple[str, ...], words: str) -> None:
    result = CliRunner().invoke(app, ["bench", "--model", str(tiny_folder), "--device", "cpu", *arguments])
    assert result.exit_code == 2
    assert words in result.stderr


def _figures() -> dict[str, int]:
    names = ("process_bytes", "trimmed_bytes", "peak_bytes", "claimed_bytes", "allocated_bytes", "full_bytes")
    return dict.fromkeys([*names, "weights_bytes"], 1)
