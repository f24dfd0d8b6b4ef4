"""Decode attention over pages: the torch specification and the Triton kernels (interpreted where there is no GPU)
against plain softmax over the entries of one stream after the other, in float64."""

import importlib
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from kvpleat.errors import OptionError
from kvpleat.kernels import decode
from kvpleat.kernels.decode import Launch, Work

pytest.importorskip("triton")  # conftest.py has it interpreted where there is no GPU
decode_triton = importlib.import_module("kvpleat.kernels.decode_triton")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


class Problem:
    """A pool full of NaN, and in it, on scattered pages, streams of the given lengths [R, L, H]."""

    def __init__(self, lengths: list[list[list[int]]], group: int, channels: int, page_size: int, seed: int,
                 dtype: torch.dtype = torch.float32, weighs: bool = False) -> None:  # fmt: skip
        make = torch.Generator().manual_seed(seed)
        self.lengths = torch.tensor(lengths, dtype=torch.int32)
        rows, layers, heads = self.lengths.shape
        most = max(1, -(-int(self.lengths.max()) // page_size)) + 2
        count = int((-(-self.lengths // page_size)).sum()) + 3
        free = torch.randperm(count, generator=make).tolist()
        self.table = torch.full((rows, layers, heads, most), -(2**30), dtype=torch.int32)
        shape = count, page_size, channels
        self.keys, self.values = torch.full(shape, math.nan), torch.full(shape, math.nan)
        self.log_weight = torch.full(shape[:2], math.nan) if weighs else None
        for r, layer, h in torch.cartesian_prod(*(torch.arange(n) for n in self.lengths.shape)).tolist():
            for start in range(0, lengths[r][layer][h], page_size):
                page, used = free.pop(), min(page_size, lengths[r][layer][h] - start)
                self.table[r, layer, h, start // page_size] = page
                self.keys[page, :used] = torch.randn(used, channels, generator=make)
                self.values[page, :used] = torch.randn(used, channels, generator=make)
                if self.log_weight is not None:
                    self.log_weight[page, :used] = torch.randn(used, generator=make)
        self.q = torch.randn(rows, heads * group, channels, generator=make)
        self.keys, self.values, self.q = (x.to(DEVICE, dtype) for x in (self.keys, self.values, self.q))
        self.table, self.lengths = self.table.to(DEVICE), self.lengths.to(DEVICE)
        self.log_weight = None if self.log_weight is None else self.log_weight.to(DEVICE)
        self.scale = channels**-0.5

    def work(self, launch: Launch, programs: int, ahead: int = 0, active: Tensor | None = None) -> Work:
        room = decode.room(self.lengths, self.q.shape[2], self.q.dtype, self.keys.shape[1], launch, programs)
        decode.plan_on_gpu(room, self.lengths, active, ahead)
        return room

    def arguments(self, layer: int) -> tuple[Any, ...]:
        return self.q, self.keys, self.values, self.table[:, layer], self.lengths[:, layer]


def stream_by_stream(problem: Problem, layer: int, softcap: float | None = None) -> tuple[Tensor, Tensor]:
    """Output and mass (-7 where nobody looks), in float64."""
    q, keys, values = (x.double().cpu() for x in (problem.q, problem.keys, problem.values))
    out, mass = torch.zeros_like(q), torch.full(keys.shape[:2], -7.0, dtype=torch.float64)
    rows, _, heads = problem.lengths.shape
    group, size = q.shape[1] // heads, keys.shape[1]
    for r in range(rows):
        for h in range(heads):
            entries = range(int(problem.lengths[r, layer, h]))
            if not entries:
                continue
            pages = [int(problem.table[r, layer, h, i // size]) for i in entries]
            slots = [i % size for i in entries]
            queries = slice(h * group, (h + 1) * group)
            logits = q[r, queries] @ keys[pages, slots].T * problem.scale
            if softcap is not None:
                logits = softcap * torch.tanh(logits / softcap)
            if problem.log_weight is not None:
                logits = logits + problem.log_weight.double().cpu()[pages, slots]
            probability = torch.softmax(logits, dim=1)
            out[r, queries] = probability @ values[pages, slots]
            mass[pages, slots] = probability.sum(dim=0)
    return out, mass


def lengths(seed: int, rows: int, layers: int, heads: int, longest: int) -> list[list[list[int]]]:
    """Uneven ones: many short streams, few long ones, some empty."""
    make = torch.Generator().manual_seed(seed)
    drawn = longest * torch.rand(rows, layers, heads, generator=make) ** 3
    drawn[torch.rand(rows, layers, heads, generator=make) < 0.15] = 0
    return drawn.long().tolist()


CASES = [  # group, channels, page size, tile, programs, rows, heads, longest, log-weights, soft cap
    (4, 16, 16, 32, 7, 3, 2, 300, False, None),
    (1, 32, 32, 32, 5, 2, 4, 200, True, None),
    (3, 24, 16, 64, 4, 2, 3, 333, False, 5.0),
    (8, 16, 16, 16, 3, 1, 2, 150, True, 5.0),
    (4, 16, 32, 64, 40, 2, 2, 260, True, None),  # more programs than pages
    (2, 80, 16, 32, 6, 2, 2, 120, False, None),
    (17, 16, 16, 32, 1, 1, 2, 90, True, None),
]


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_outputs_and_mass(case: tuple[Any, ...], seed: int) -> None:
    """Both layers of a problem, from one plan: outputs, and what each entry received."""
    group, channels, page_size, tile, programs, rows, heads, longest, weighs, softcap = case
    problem = Problem(lengths(seed, rows, 2, heads, longest), group, channels, page_size, seed, weighs=weighs)
    work = problem.work(Launch(tile, 4, 2, 1), programs)
    for layer in range(2):
        wanted, wanted_mass = stream_by_stream(problem, layer, softcap)
        for run in (decode.on_gpu, decode.by_definition):
            mass = torch.full(problem.keys.shape[:2], -7.0, device=DEVICE)
            planned = (work.layer(layer),) if run is decode.on_gpu else ()
            out = run(*problem.arguments(layer), *planned, problem.scale, problem.log_weight, softcap, mass)
            torch.testing.assert_close(out.double().cpu(), wanted, rtol=2e-5, atol=2e-5)
            torch.testing.assert_close(mass.double().cpu(), wanted_mass, rtol=2e-5, atol=2e-5)
        assert not work.arrivals.any()


@pytest.mark.parametrize(("dtype", "close"), [(torch.float16, 2e-3), (torch.bfloat16, 2e-2)], ids=str)
def test_half_precision(dtype: torch.dtype, close: float) -> None:
    if dtype == torch.bfloat16 and DEVICE.type == "cpu":
        pytest.skip("the interpreter multiplies bfloat16 as if it were integers; bench.kernels checks it on a GPU")
    problem = Problem(lengths(2, 2, 1, 2, 400), 4, 32, 16, 2, dtype)
    out = decode.on_gpu(*problem.arguments(0), problem.work(Launch(32, 4, 2, 1), 5).layer(0), problem.scale)
    assert out.dtype == dtype
    torch.testing.assert_close(out.double().cpu(), stream_by_stream(problem, 0)[0], rtol=close, atol=close)


@pytest.mark.parametrize("programs", [1, 2, 5, 64, 300])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_plan(seed: int, programs: int) -> None:
    """Every page of every stream is in one share; shares differ by a page at most; tiles are counted right. Streams
    without a token have no pages, and take a step of the one who walks over them."""
    drawn = torch.tensor(lengths(seed, 5, 3, 3, 700), dtype=torch.int32, device=DEVICE)
    active = torch.tensor([True, True, False, True, True], device=DEVICE)
    work = decode.room(drawn, 16, torch.float32, 16, Launch(64, 4, 2, 1), programs)
    decode.plan_on_gpu(work, drawn, active, ahead=3)
    for layer in range(3):
        counts = [
            max(1, -(-(int(n) + 3) // 16)) if on else 0
            for row, on in zip(drawn[:, layer].tolist(), active, strict=True)
            for n in row
        ]
        stream_of = [z for z, count in enumerate(counts) for _ in range(count)]
        starts = [sum(counts[:z]) for z in range(len(counts) + 1)]
        assert work.starts[layer].tolist() == starts
        covered = 0
        for z, begin, stop, low, high, tiles, total, _ in work.shares[layer].tolist():
            assert total == len(stream_of)
            if low == high:
                assert tiles == 0
                continue
            mine = stream_of[low:high]
            assert (low, z, begin, stop) == (covered, mine[0], starts[z], starts[z + 1])
            assert tiles == sum(max(1, -(-mine.count(stream) // 4)) for stream in range(mine[0], mine[-1] + 1))
            assert len(stream_of) // programs <= high - low <= -(-len(stream_of) // programs)
            covered = high
        assert covered == len(stream_of)


def test_lengths_change_after_the_plan() -> None:
    """Streams grow within what was planned ahead, shrink and become empty. One that grew more is not cut short."""
    drawn = lengths(3, 2, 1, 3, 200)
    problem = Problem([[[n + 20 for n in row[0]]] for row in drawn], 2, 16, 16, 3)
    full = problem.lengths.clone()
    problem.lengths -= 20
    work = problem.work(Launch(32, 4, 2, 1), 4, ahead=20).layer(0)
    for change in (full, full - 7, full // 3, torch.where(full % 2 == 0, full, 0)):
        problem.lengths = change
        out = decode.on_gpu(*problem.arguments(0), work, problem.scale)
        torch.testing.assert_close(out.double().cpu(), stream_by_stream(problem, 0)[0], rtol=2e-5, atol=2e-5)
    problem.lengths = full - 20
    work = problem.work(Launch(32, 4, 2, 1), 4, ahead=0).layer(0)
    problem.lengths = full
    out = decode.on_gpu(*problem.arguments(0), work, problem.scale).view(2, 3, 2, 16)
    longer = -(-full[:, 0] // 16) > (-(-(full[:, 0] - 20) // 16)).clamp(min=1)
    assert longer.any()
    assert torch.equal(out.isnan().all(dim=(2, 3)), longer)


def test_rows_without_a_token() -> None:
    """Their entries are not read, though they have some: zeros."""
    problem = Problem(lengths(4, 3, 1, 2, 300), 2, 16, 16, 4)
    active = torch.tensor([True, False, True], device=DEVICE)
    assert problem.lengths[1].any()
    wanted = stream_by_stream(problem, 0)[0]
    wanted[1] = 0
    work = problem.work(Launch(32, 4, 2, 1), 5, active=active).layer(0)
    for run in (decode.on_gpu, decode.by_definition):
        planned = (work,) if run is decode.on_gpu else ()
        out = run(*problem.arguments(0), *planned, problem.scale, active=active)
        torch.testing.assert_close(out.double().cpu(), wanted, rtol=2e-5, atol=2e-5)


def test_default_launch_and_dispatch() -> None:
    problem = Problem(lengths(5, 2, 2, 2, 100), 2, 16, 16, 5)
    work = decode.room(problem.lengths, 16, torch.float32, 16)
    decode.plan(work, problem.lengths)
    out = decode.attend(*problem.arguments(1), work.layer(1), problem.scale)
    torch.testing.assert_close(out.double().cpu(), stream_by_stream(problem, 1)[0], rtol=2e-5, atol=2e-5)


def test_compiled_as_one_graph() -> None:
    """torch.compile takes a step as it is: a plan, and attention in two layers, one of them with mass."""
    problem = Problem(lengths(6, 2, 2, 2, 100), 2, 16, 16, 6)
    work = decode.room(problem.lengths, 16, torch.float32, 16, Launch(32, 4, 2, 1), 3)
    mass = torch.full(problem.keys.shape[:2], -7.0, device=DEVICE)

    def step() -> list[Tensor]:
        decode.plan_on_gpu(work, problem.lengths)
        first = decode.on_gpu(*problem.arguments(0), work.layer(0), problem.scale, mass=mass)
        return [first, decode.on_gpu(*problem.arguments(1), work.layer(1), problem.scale)]

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    for _ in range(2):
        for layer, out in enumerate(compiled()):
            wanted, wanted_mass = stream_by_stream(problem, layer)
            torch.testing.assert_close(out.double().cpu(), wanted, rtol=2e-5, atol=2e-5)
            if layer == 0:
                torch.testing.assert_close(mass.double().cpu(), wanted_mass, rtol=2e-5, atol=2e-5)
        problem.q.neg_()


def test_refused() -> None:
    problem = Problem([[[5, 9]]], 2, 16, 16, 6)
    work = decode.room(problem.lengths, 16, torch.float32, 16).layer(0)
    q, *streams = problem.arguments(0)
    with pytest.raises(OptionError, match="Pass contiguous tensors"):
        decode.attend(q.mT.contiguous().mT, *streams, work, problem.scale)
    with pytest.raises(OptionError, match="24 entries over pages of 16"):
        decode.room(problem.lengths, 16, torch.float32, 16, Launch(24, 4, 2, 1))
    with pytest.raises(OptionError, match="work of one layer"):
        decode.attend(*problem.arguments(0), decode.room(problem.lengths, 16, torch.float32, 16), problem.scale)
    with pytest.raises(OptionError, match="pages of 32 for 2 streams in pages of 16"):
        decode.attend(
            *problem.arguments(0), decode.room(problem.lengths, 16, torch.float32, 32).layer(0), problem.scale
        )
