"""The benchmark of the engine: that its parts run, and that floors, ratios and rates are what they are said to be."""

import gc
import json
import math
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from kvpleat.bench import engine, engine_host, engine_peers, engine_serve, engine_state, floor
from kvpleat.bench.engine_models import Profile, calibrate, policy_for, profile, random_model, scaled, spread
from kvpleat.bench.engine_report import Bench, OutOfTime, limit
from kvpleat.engine.core import EngineCore
from kvpleat.kernels.device_pool import check_integrity
from kvpleat.policies import DMC, DMS, Full

CPU = torch.device("cpu")
LAYERS, HEADS, CHANNELS, HIDDEN, VOCAB = 3, 2, 8, 48, 97  # of the tiny model


@pytest.fixture(autouse=True)
def small_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(floor, "COPIED", 2**20)


@pytest.fixture
def model() -> Any:
    return random_model("llama-3-8b", CPU, tiny=True)


@pytest.fixture
def bench() -> Bench:
    return Bench(CPU, tiny=True, bandwidth=1e9)


def ran(part: str, folder: Path) -> list[dict[str, Any]]:
    """The records of a part, from the file that it wrote."""
    file = folder / "figures.json"
    assert engine.main(["--tiny", "--only", part, "--json", str(file)]) == 0
    figures = json.loads(file.read_text())
    assert figures["environment"]["copy_bandwidth"] > 0
    records: list[dict[str, Any]] = figures["records"]
    assert all(record["part"] == part for record in records)
    return records


def test_what_a_step_costs_the_host(tmp_path: Path) -> None:
    (record,) = ran("host", tmp_path)
    assert record["rows"] == 3
    parts = sum(record[f"{name}_seconds"] for name in ("plan", "launch", "rest"))
    assert record["step_seconds"] == pytest.approx(parts)
    assert 0 < record["plan_seconds"] < record["step_seconds"] <= record["most_seconds"]


def test_a_step_makes_no_objects_for_each_row(bench: Bench) -> None:
    """Or Python looks for garbage among all that a process has, again and again."""
    model = random_model("gpt2-124m", CPU, tiny=True)
    core = engine_state.new_core(bench, model, Full(), 2**28, 128, 128, max_num_batched_tokens=engine_state.BATCHED)
    try:
        engine_host.without_device(core)
        for number in range(128):
            core.add(engine_state.random_request(number, 16, 64, VOCAB))
        for _ in range(3):
            core.step()
        gc.collect()
        gc.disable()
        before = gc.get_count()[0]
        gained = core.step()
        made = gc.get_count()[0] - before
    finally:
        gc.enable()
        core.close()
    assert len(gained) == 128
    assert {news.request_id for news in gained} == {str(number) for number in range(128)}
    assert all(news == (news.request_id, [engine_host.TOKEN], None, None, 0) for news in gained)
    assert made < 64


@pytest.mark.parametrize("part", ["step", "long"])
def test_steps_beside_their_floor(part: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    records = ran(part, tmp_path)
    bandwidth = json.loads((tmp_path / "figures.json").read_text())["environment"]["copy_bandwidth"]
    attention = HIDDEN * HIDDEN * 2 + HIDDEN * HEADS * CHANNELS * 2
    weights = (
        LAYERS * (attention + 3 * HIDDEN * 64 + 2 * HIDDEN) + HIDDEN + HIDDEN * VOCAB
    )  # the embedding is looked up in
    for record in records:
        read = weights * 4 + record["entries"] * 2 * CHANNELS * 4
        assert record["floor_seconds"] == pytest.approx(read / bandwidth)
        assert record["graph_of_floor"] == pytest.approx(record["graph_seconds"] / record["floor_seconds"])
        assert record["floor_tokens_per_s"] == pytest.approx(record["rows"] / record["floor_seconds"])
        seen = record["rows"] * record["tokens"] * LAYERS * HEADS
        assert record["ratio"] == pytest.approx(seen / record["entries"], rel=0.1)  # a few tokens later
        assert record["ratio"] == pytest.approx(record["ratio_wanted"], rel=0.1)
        assert 0.7 * record["ratio"] < record["allocated_ratio"] < record["ratio"]
        assert record["preemptions"] == 0
    assert {record["rows"] for record in records} == {3 if part == "step" else 1}
    assert records[0]["speedup"] == 1.0
    assert f"{records[0]['graph_of_floor']:.3f}" in capsys.readouterr().out


def test_one_memory_holds_more_rows_at_a_higher_ratio(tmp_path: Path) -> None:
    records = ran("throughput", tmp_path)
    llama = [record for record in records if record["case"].startswith("llama-3-8b")]
    assert [record["ratio_wanted"] for record in llama] == [1, 2.6, 4, 8]
    rows = [record["rows"] for record in llama]
    assert rows == sorted(rows)
    assert 3 < rows[2] / rows[0] < 4.5
    assert all(800_000 < record["pool_bytes"] <= 0.95 * 2**20 for record in llama)
    assert all(
        record["speedup"] == pytest.approx(record["tokens_per_s"] / llama[0]["tokens_per_s"]) for record in llama
    )
    assert any(record["case"].startswith("gpt2") for record in records)  # served or said to be not


def test_the_engine_and_its_peers_on_the_same_prompts(tmp_path: Path) -> None:
    records = ran("compare", tmp_path)
    assert {(record["rows"], record["tokens"]) for record in records} == {(1, 24), (3, 40)}
    names = {record["case"] for record in records}
    assert names == {"kvpleat, ratio 1", "kvpleat, ratio 4", *(f"transformers, {name}" for name in engine_peers.PEERS)}
    ours = {r["rows"]: r["seconds"] for r in records if r["case"] == "kvpleat, ratio 1"}
    for record in records:
        assert record["speedup"] == pytest.approx(record["seconds"] / ours[record["rows"]])
        assert record["tokens_per_s"] == pytest.approx(record["rows"] * engine_peers.TINY_ANSWER / record["seconds"])


def test_first_tokens(tmp_path: Path) -> None:
    records = ran("prefill", tmp_path)
    assert [record["tokens"] for record in records] == [96] * 4 + [160] * 4
    for record in records:
        first = next(r for r in records if r["tokens"] == record["tokens"])
        assert record["of_sdpa"] == pytest.approx(record["seconds"] / first["seconds"])
        assert record["ratio"] > (2 if "ratio 4" in record["case"] else 0.9)


def test_what_scores_cost(tmp_path: Path) -> None:
    window, scored = ran("scores", tmp_path)
    assert window["rows"] == scored["rows"] == 3
    assert all(3 < record["ratio"] < 5 for record in (window, scored))
    assert scored["share_of_scores"] == pytest.approx(1 - window["step_seconds"] / scored["step_seconds"])


def test_requests_that_come_as_they_like(tmp_path: Path) -> None:
    records = ran("serve", tmp_path)
    assert [record["ratio_wanted"] for record in records] == [1, 2.6, 4, 8]
    for record in records:
        assert record["answered"] == record["requests"] == 12
        assert 0 < record["ttft_p50"] <= record["ttft_p99"]
        assert 0 < record["most_bytes"] <= record["kv_memory"]
    assert [record["speedup"] for record in records] == [
        r["tokens_per_s"] / records[0]["tokens_per_s"] for r in records
    ]


# ---- what rows hold


@pytest.mark.parametrize(("ratio", "tokens"), [(2.6, 8192), (4, 8192), (8, 8192), (8, 131_072), (4, 768)])
def test_profiles_have_the_ratio_they_are_asked_for(ratio: float, tokens: int) -> None:
    for skewed in (True, False):
        stays = profile(ratio, tokens, 32, 8, skewed)
        held = stays.lengths(torch.full((7,), tokens), torch.arange(7)).double()
        assert tokens / held.mean() == pytest.approx(ratio, rel=0.01)
        assert held.max() <= tokens
        assert held.min() >= stays.delay + 1
        assert bool((held.mean(0).flatten().std() > 100) if skewed and tokens > 768 else True)
        assert skewed or stays.keep.unique().numel() == 1


def test_streams_of_a_profile_by_hand() -> None:
    stays = profile(1.0, 100, 2, 3)
    assert stays.lengths(torch.tensor([5, 100]), torch.tensor([0, 9])).tolist() == [[[5] * 3] * 2, [[100] * 3] * 2]
    merging = profile(4.0, 100, 2, 3, skewed=False, merges=True)
    assert merging.delay == 0
    assert merging.keep.mean() == pytest.approx((100 / 4 - 1) / 99)
    assert merging.lengths(torch.tensor([1, 100]), torch.tensor([0, 0]))[:, 0, 0].tolist() == [1, 25]


def test_shares_are_spread_by_quantiles_within_the_layer_at_the_same_depth() -> None:
    keep = torch.tensor([[[0.3, 0.1], [0.8, 0.4]]])
    assert spread(keep, 2, 2).flatten().tolist() == pytest.approx([0.1, 0.3, 0.4, 0.8])
    assert spread(keep, 4, 2)[0, :, 0].tolist() == pytest.approx([0.1, 0.1, 0.4, 0.4])
    four = spread(keep, 2, 4)[0, 0].tolist()
    assert four == pytest.approx([0.1, 0.15, 0.25, 0.3])
    assert scaled(torch.tensor([0.0, 0.2, 0.4, 1.0]), 0.3).tolist() == pytest.approx([0, 0.04, 0.16, 1.0], abs=2e-4)
    assert scaled(torch.tensor([0.01, 0.01, 1.0, 1.0]), 0.55).tolist() == pytest.approx([0.1, 0.1, 1.0, 1.0], abs=1e-4)


@pytest.mark.parametrize("method", [DMS, DMC])
def test_gates_keep_in_each_head_what_the_profile_says(method: Any, model: Any) -> None:
    """The engine itself, on real prompts of random tokens."""
    stays = profile(4.0, 480, LAYERS, HEADS, merges=method is DMC)
    core = EngineCore(model, policy_for(model, stays, method), kv_memory="4MiB", max_num_seqs=4, max_model_len=500)
    for number in range(4):
        core.add(engine_state.random_request(number, 480, 1, VOCAB))
    while core.unfinished:
        core.step()
    mean = Profile(stays.delay, stays.keep.mean(0, keepdim=True))
    wanted = mean.lengths(torch.tensor([480]), torch.tensor([0]))[0].float()
    held = core.runner.pool.lengths[:4].float().mean(0)
    assert held.mean() == pytest.approx(wanted.mean().item(), rel=0.15)
    torch.testing.assert_close(held, wanted, rtol=0.25, atol=20)
    core.close()


def test_calibration_marks_the_share_that_was_asked_for(model: Any) -> None:
    policy: Any = policy_for(model, profile(4.0, 480, LAYERS, HEADS, skewed=False))
    keep = torch.tensor([[0.0, 1.0], [0.5, 0.25], [0.1, 0.9]])
    calibrate(model, policy.gates, keep)
    tokens = torch.randint(3, VOCAB, (16, 256))
    marked: dict[int, torch.Tensor] = {}
    hooks = [
        layer.self_attn.register_forward_pre_hook(
            lambda module, args, kwargs: marked.update(
                {module.layer_idx: policy.marks(module.layer_idx, kwargs["hidden_states"]).marked.float().mean((0, 2))}
            ),
            with_kwargs=True,
        )
        for layer in model.model.layers
    ]
    model(tokens, use_cache=False)
    for hook in hooks:
        hook.remove()
    torch.testing.assert_close(1 - torch.stack([marked[i] for i in range(LAYERS)]), keep, atol=0.06, rtol=0)


@pytest.mark.parametrize("ratio", [1.0, 4.0])
def test_an_engine_that_was_filled_goes_on_as_ever(ratio: float, model: Any, bench: Bench) -> None:
    tokens, stays = 192, profile(ratio, 192, LAYERS, HEADS)
    core = engine_state.new_core(
        bench, model, policy_for(model, stays), 2**20, 5, tokens + engine_state.ANSWER, max_num_batched_tokens=2**20
    )
    engine_state.fill(core, 9, tokens, stays)
    pool, running = core.runner.pool, core.scheduler.running
    assert len(running) == 5
    assert not core.scheduler.waiting
    for _ in range(3):
        assert len(core.step()) == 5
        check_integrity(pool)
    fed = torch.zeros(5, dtype=torch.long)
    for row in running:
        fed[row.seat] = row.fed
    wanted = stays.lengths(fed, torch.arange(5)).float()
    torch.testing.assert_close(pool.lengths.float(), wanted, atol=8, rtol=0)
    assert int(pool.free_count) + sum(int(pool.num_pages[row.seat].sum()) for row in running) == pool.holders.numel()
    core.close()


# ---- small parts


def test_tokens_count_while_all_rows_decode() -> None:
    assert engine_peers.together([[1.0, 2.0, 3.0, 4.0], [2.0, 3.0, 4.0, 5.0]]) == pytest.approx(4 / 2)
    assert engine_peers.together([[1.0, 2.0], [3.0, 4.0]]) is None


def test_quantiles() -> None:
    values = [float(x) for x in range(100, 0, -1)]
    assert (engine_serve.quantile(values, 0.5), engine_serve.quantile(values, 0.99)) == (50, 99)
    assert engine_serve.quantile([7.0], 0.99) == 7


def test_a_workload_is_the_same_at_any_rate() -> None:
    slow, fast, now = (engine_serve.workload(400, VOCAB, rate, (4, 64), (2, 8)) for rate in (1.0, 10.0, None))
    assert slow.requests == fast.requests == now.requests
    assert set(now.arrivals) == {0.0}
    assert slow.arrivals == pytest.approx([10 * x for x in fast.arrivals])
    assert slow.arrivals[-1] == pytest.approx(400, rel=0.2)
    sizes = [len(request.prompt) for request in slow.requests]
    assert 4 <= min(sizes) < 6
    assert 58 < max(sizes) <= 64
    assert math.log(sum(sizes) / 400) == pytest.approx(math.log((64 - 4) / math.log(16)), abs=0.1)


def test_bookkeeping_is_the_sum_of_its_kernels() -> None:
    assert engine_state.bookkeeping({"step": 2.0, "settle": 1.0, "attend": 5.0, "void step<int>": 7.0}) == 3.0
    assert engine_state.bookkeeping({}) is None


def test_a_case_that_comes_to_nothing_is_said_and_kept(
    bench: Bench, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bench.file = tmp_path / "figures.json"

    def breaks() -> dict[str, Any]:
        raise IndexError("no such thing")

    assert bench.case("part", "slow", [], lambda: time.sleep(10) or {}, most=0.1) is None  # type: ignore[func-returns-value]
    assert not bench.failed
    assert bench.case("part", "mine", [("a", "x", "6.1f", 10)], lambda: {"x": 2.0}) == {
        "part": "part",
        "case": "mine",
        "x": 2.0,
    }
    assert bench.case("part", "big", [], lambda: torch.empty(2**60) and {}) is None
    assert not bench.failed
    assert bench.case("part", "broken", [], breaks) is None
    assert bench.failed
    bench.seconds = 0
    assert bench.case("part", "late", [], breaks) is None
    slow, mine, big, broken, late = json.loads(bench.file.read_text())["records"]
    assert slow["skipped"].startswith("skipped: OutOfTime: not done within")
    assert mine["x"] == 2
    assert big["skipped"].startswith("skipped: RuntimeError")
    assert broken["failed"] == "FAILED: IndexError: no such thing"
    assert late["skipped"] == "skipped: OutOfTime: there is none left"
    assert "mine" + " " * 36 + "  20.0" in capsys.readouterr().out


def test_a_limit_is_lifted_again() -> None:
    with limit(0.05):
        pass
    time.sleep(0.1)
    with pytest.raises(OutOfTime), limit(0.05):
        time.sleep(10)


def test_only_parts_that_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--tiny", "--only", "step,nothing"], [] if not torch.cuda.is_available() else ["--only", "x"]):
        with pytest.raises(SystemExit):
            engine.main(arguments)
    assert "there are host, step, throughput" in capsys.readouterr().err
