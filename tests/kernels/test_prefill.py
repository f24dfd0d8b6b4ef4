"""Prefill over pages: the plain version and Triton (in its interpreter) against the definition, one query at a time,
and against `kernels.delayed`, which the models run on today."""

import importlib
import itertools
from collections.abc import Iterator
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from kvpleat.errors import OptionError, UnsupportedError
from kvpleat.kernels import delayed
from kvpleat.kernels.prefill import Leaving, Past, Recent, Rows, Rule, attend, attend_plain

pytest.importorskip("triton")  # conftest.py has it interpreted where there is no GPU
prefill_triton = importlib.import_module("kvpleat.kernels.prefill_triton")

PAGE = 16
NAN = float("nan")


class Case(NamedTuple):
    """new, young: tokens of each row. past: the longest stream of each row. kept: share that stays in each head."""

    new: tuple[int, ...]
    young: tuple[int, ...]
    past: tuple[int, ...]
    rule: str = "causal"
    delay: int = 0
    heads: int = 2
    group: int = 2
    channels: int = 16
    kept: tuple[float, ...] = (0.3, 0.8)
    weights: bool = False
    softcap: float | None = None


class Problem(NamedTuple):
    q: Tensor
    keys: Tensor
    values: Tensor
    rows: Rows
    past: Past | None
    rule: Rule
    scale: float
    softcap: float | None


CASES = {
    "full, nothing before": Case((37,), (0,), (0,)),
    "full, one token": Case((1,), (0,), (40,)),
    "full, ragged rows": Case((21, 0, 1, 40), (0, 0, 0, 0), (33, 16, 5, 0), heads=3, group=1, channels=32),
    "full, weights": Case((33, 5), (0, 0), (47, 20), weights=True, group=3),
    "full, soft cap": Case((19, 30), (0, 0), (30, 8), softcap=2.0),
    "full, odd channels": Case((25, 9), (0, 0), (21, 40), channels=24, group=5, weights=True),
    "window": Case((50, 9, 40), (0, 0, 0), (40, 25, 0), rule="window"),
    "dms, delay 1": Case((35, 6, 20), (1, 1, 0), (20, 0, 0), rule="dms", delay=1),
    "dms, delay 7": Case((40, 0, 3, 45), (7, 7, 7, 0), (30, 9, 16, 0), rule="dms", delay=7, group=3),
    "dms, delay 64": Case((75, 5, 20), (64, 20, 64), (17, 0, 60), rule="dms", delay=64),
    "dms, all or nothing": Case((70, 33), (5, 0), (12, 0), rule="dms", delay=5, kept=(0.0, 1.0)),
    "dms, no delay": Case((30, 12), (0, 0), (12, 7), rule="dms"),
    "dms, weights, soft cap": Case((30, 12), (3, 0), (12, 7), rule="dms", delay=3, weights=True, softcap=3.0),
    "fold, delay 7": Case((45, 2, 11), (7, 7, 0), (18, 33, 0), rule="fold", delay=7, weights=True),
    "fold, delay 64": Case((80, 20), (64, 30), (20, 0), rule="fold", delay=64, weights=True, heads=1, kept=(0.3,)),
    "fold, delay 1, all or nothing": Case(
        (40, 17), (1, 0), (9, 0), rule="fold", delay=1, weights=True, kept=(1.0, 0.0), group=1, channels=32
    ),
    "dmc": Case((40, 1, 23), (0, 0, 0), (31, 40, 0), rule="dmc", group=3),
    "dmc, all or nothing": Case((33, 40), (0, 0), (0, 11), rule="dmc", kept=(0.0, 1.0), channels=24),
}


def problem(case: Case, seed: int = 0, dtype: torch.dtype = torch.float32) -> Problem:
    """Random numbers, in what may be read, and NaN in all that may not."""
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    spans = [new + young for new, young in zip(case.new, case.young, strict=True)]
    starts = torch.tensor(list(itertools.accumulate(spans, initial=0)), dtype=torch.int32)
    rows = Rows(torch.tensor(list(itertools.accumulate(case.new, initial=0)), dtype=torch.int32), starts)
    num_keys = sum(spans)
    keys, values = (noise(case.heads, num_keys, case.channels) for _ in range(2))
    q = noise(case.heads * case.group, sum(case.new), case.channels) * 2
    first = torch.tensor([longest + 3 for longest in case.past], dtype=torch.int32)
    first = torch.where(torch.tensor(case.past) > 0, first, 0)
    share = torch.tensor([case.kept[head % len(case.kept)] for head in range(case.heads)])
    stays = torch.rand(case.heads, num_keys, generator=generator) < share[:, None]
    old = torch.zeros(num_keys, dtype=torch.bool)
    for begin, end in itertools.pairwise(starts.tolist()):
        old[begin : max(begin, end - case.delay)] = True
    rule: Rule = None
    if case.rule == "window":
        place = torch.cat([first[row] + torch.arange(new) for row, new in enumerate(case.new)])
        rule = Recent((place // 8 * 8 - 20).clamp(min=4).int(), first, 4)
    elif case.rule != "causal":
        groups = None
        if case.rule != "dms":
            groups = tuple(noise(case.heads, num_keys, case.channels).masked_fill(~old[:, None], NAN) for _ in range(2))
        log_size = noise(case.heads, num_keys).float() if case.rule == "fold" else None
        rule = Leaving(case.delay, stays & old, groups, log_size)
    past = paged(case, first, generator, noise) if any(case.past) else None
    return Problem(q, keys, values, rows, past, rule, 0.25, case.softcap)


def paged(case: Case, first: Tensor, generator: torch.Generator, noise) -> Past:  # type: ignore[no-untyped-def]
    """Streams of lengths of their own in shuffled pages, among pages and slots full of NaN."""
    most = -(-max(case.past) // PAGE)
    num_pages = 2 * len(case.past) * case.heads * most + 1
    free = torch.randperm(num_pages, generator=generator).int().tolist()
    pool = [torch.full((num_pages, PAGE, case.channels), NAN, dtype=noise(1).dtype) for _ in range(2)]
    log_weight, position = torch.full((num_pages, PAGE), NAN), torch.full((num_pages, PAGE), 2**30, dtype=torch.int32)
    table = torch.full((len(case.past), 2, case.heads, most), -1, dtype=torch.int32)[:, 1]  # one layer of two
    lengths = torch.zeros(len(case.past), 2, case.heads, dtype=torch.int32)[:, 1]
    for row, longest in enumerate(case.past):
        for head in range(case.heads):
            count = longest - (head * 7 if longest > head * 7 else longest)  # the last may be empty
            lengths[row, head] = count
            places = torch.randperm(int(first[row]), generator=generator)[:count]
            for i in range(count):
                if i % PAGE == 0:
                    table[row, head, i // PAGE] = free.pop()
                at = int(table[row, head, i // PAGE]), i % PAGE
                for x in pool:
                    x[at] = noise(case.channels)
                log_weight[at], position[at] = noise(1).float(), int(places[i])
    return Past(*pool, table, lengths, log_weight if case.weights else None, position)


def by_definition(case: Case, given: Problem) -> Tensor:
    """One query after the other, in float64."""
    out = torch.zeros_like(given.q, dtype=torch.float64)
    for row, head in itertools.product(range(len(case.new)), range(case.heads)):
        past = list(stream(given, row, head))
        begin, end = (int(x) for x in given.rows.keys[row : row + 2])
        for i in range(case.new[row]):
            query, me = int(given.rows.new[row]) + i, begin + case.young[row] + i
            seen = [(k, v, bias) for k, v, bias, place in past if reaches(given.rule, place, query)]
            for j in range(begin, end):
                seen += [x for x in (entry(given, row, head, j, me - j, query),) if x is not None]
            if not seen:
                continue
            k, v = (torch.stack(x).double() for x in list(zip(*seen, strict=True))[:2])
            bias = torch.tensor([float(x[2]) for x in seen], dtype=torch.float64)
            for member in range(case.group):
                at = head * case.group + member, query
                logits = k @ given.q[at].double() * given.scale
                if given.softcap is not None:
                    logits = given.softcap * torch.tanh(logits / given.softcap)
                out[at] = torch.softmax(logits + bias, 0) @ v
    return out


def stream(given: Problem, row: int, head: int) -> Iterator[tuple[Tensor, Tensor, float, int]]:
    """Keys, values, log-weights and positions of what pages hold."""
    past = given.past
    for i in range(0 if past is None else int(past.lengths[row, head])):
        at = int(past.page_table[row, head, i // PAGE]), i % PAGE
        weight = 0.0 if past.log_weight is None else float(past.log_weight[at])
        yield past.keys[at], past.values[at], weight, int(past.position[at])


def reaches(rule: Rule, place: int, query: int) -> bool:
    return not isinstance(rule, Recent) or place < rule.num_sinks or place >= int(rule.starts[query])


def entry(given: Problem, row: int, head: int, j: int, age: int, query: int) -> tuple[Tensor, Tensor, float] | None:
    """What a query sees of key j, `age` tokens before its own."""
    rule, own = given.rule, (given.keys[head, j], given.values[head, j], 0.0)
    if age < 0:
        return None
    if not isinstance(rule, Leaving):
        place = 0 if rule is None else int(rule.first[row] - given.rows.keys[row]) + j
        return own if reaches(rule, place, query) else None
    if age < rule.delay:
        return own
    if age > rule.delay and not bool(rule.stays[head, j]):
        return None
    if rule.groups is None:
        return own
    size = 0.0 if rule.log_size is None else float(rule.log_size[head, j])
    return rule.groups[0][head, j], rule.groups[1][head, j], size


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Memory that nobody wrote is full of NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def blocks(queries: int, entries: int, band: int, members: int) -> object:
    return prefill_triton.Blocks(queries, entries, band, members, 4, 1)


@pytest.mark.parametrize("name", CASES)
def test_plain_is_the_definition(name: str) -> None:
    given = problem(CASES[name])
    wanted = by_definition(CASES[name], given)
    torch.testing.assert_close(attend_plain(*given).double(), wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(attend(*given).double(), wanted, rtol=1e-5, atol=1e-5)  # what runs on a CPU


@pytest.mark.parametrize("name", CASES)
@pytest.mark.usefixtures("poisoned")
def test_triton_is_the_definition(name: str) -> None:
    """The query heads of a group share a block."""
    case, given = CASES[name], problem(CASES[name], seed=1)
    out = prefill_triton.attend(*given, blocks=blocks(32, 16, 32, case.group))
    torch.testing.assert_close(out.double(), by_definition(case, given), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["full, odd channels", "window", "dms, weights, soft cap", "fold, delay 7"])
@pytest.mark.usefixtures("poisoned")
def test_other_blocks(name: str) -> None:
    """Each query head in a block of its own, blocks of other sizes, other numbers."""
    case, given = CASES[name], problem(CASES[name], seed=2)
    out = prefill_triton.attend(*given, blocks=blocks(32, 32, 16, 1))
    torch.testing.assert_close(out.double(), by_definition(case, given), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("channels", [64, 80, 256])
@pytest.mark.usefixtures("poisoned")
def test_kinds_of_numbers(channels: int, dtype: torch.dtype) -> None:
    """Blocks as they are chosen. No bfloat16, which the interpreter cannot multiply: on a GPU `kvpleat.bench` checks
    it."""
    case = Case((70, 9), (3, 3), (20, 0), rule="fold", delay=3, heads=1, channels=channels, weights=True)
    given = problem(case, 3, dtype)._replace(scale=channels**-0.5)
    out = prefill_triton.attend(*given).double()
    wanted = by_definition(case, given)
    error = (out - wanted).norm() / wanted.norm()
    assert error < {torch.float16: 1e-3, torch.float32: 1e-6}[dtype]


LEARNED = [name for name, case in CASES.items() if case.rule in ("dms", "fold", "dmc")]


@pytest.mark.parametrize("name", LEARNED)
def test_plain_is_what_models_run_on(name: str) -> None:
    """`kernels.delayed`, a row at a time, its past with holes."""
    case, given = CASES[name], problem(CASES[name], seed=4)
    out, rule = attend_plain(*given), given.rule
    assert isinstance(rule, Leaving)
    for row, count in enumerate(case.new):
        if not count:
            continue
        of_row = slice(int(given.rows.keys[row]), int(given.rows.keys[row + 1]))
        n = max(0, count + case.young[row] - case.delay)
        past, live, weight = holes(given, row, case)
        seen = delayed.Seen(
            0,
            past,
            live,
            (given.keys[:, of_row], given.values[:, of_row]),
            None if rule.groups is None else tuple(x[:, of_row][:, :n] for x in rule.groups),
            rule.stays[:, of_row][:, :n],
            weight if case.weights else None,
            rule.log_size[:, of_row][:, :n] if rule.log_size is not None else None,
        )
        new = slice(int(given.rows.new[row]), int(given.rows.new[row + 1]))
        wanted = delayed.attend(given.q[:, new], seen, case.young[row], case.delay, given.scale, given.softcap)
        torch.testing.assert_close(out[:, new], wanted, rtol=1e-5, atol=1e-5)


def holes(given: Problem, row: int, case: Case) -> tuple[tuple[Tensor, Tensor], Tensor, Tensor]:
    """The past of one row as [H, N, D], each entry followed by a hole; which are live; log-weights."""
    streams = [list(stream(given, row, head)) for head in range(case.heads)]
    most = 2 * max(len(entries) for entries in streams)
    past = tuple(torch.zeros(case.heads, most, case.channels) for _ in range(2))
    live, weight = torch.zeros(case.heads, most, dtype=torch.bool), torch.zeros(case.heads, most)
    for head, entries in enumerate(streams):
        for i, (key, value, bias, _) in enumerate(entries):
            past[0][head, 2 * i], past[1][head, 2 * i] = key, value
            live[head, 2 * i], weight[head, 2 * i] = True, bias
    return past, live, weight


CUTS = (0, 1, 7, 8, 17, 38)


@pytest.mark.parametrize(
    "whole",
    [
        Case((39,), (0,), (0,)),
        Case((39,), (0,), (0,), rule="window"),
        Case((39,), (0,), (0,), rule="dms", delay=7),
        Case((39,), (0,), (0,), rule="dms", delay=64),
        Case((39,), (0,), (0,), rule="fold", delay=7, weights=True),
        Case((39,), (0,), (0,), rule="dmc"),
    ],
    ids=lambda case: f"{case.rule} {case.delay}",
)
@pytest.mark.usefixtures("poisoned")
def test_wherever_a_prompt_is_cut(whole: Case) -> None:
    """The same tokens in six rows, each cut elsewhere: the second piece comes out as if there were no cut."""
    given = problem(whole, seed=5)
    wanted, rule = by_definition(whole, given), given.rule
    firsts = [max(0, cut - whole.delay) if isinstance(rule, Leaving) else cut for cut in CUTS]  # keys from here on
    new, keys = (
        torch.tensor(list(itertools.accumulate((39 - begin for begin in begins), initial=0)), dtype=torch.int32)
        for begins in (CUTS, firsts)
    )

    def repeated(x: Tensor, begins: tuple[int, ...] | list[int]) -> Tensor:
        return torch.cat([x[:, begin:] for begin in begins], dim=1)

    cut_rule: Rule = None
    if isinstance(rule, Recent):
        cut_rule = Recent(repeated(rule.starts[None], CUTS)[0], torch.tensor(CUTS, dtype=torch.int32), rule.num_sinks)
    elif isinstance(rule, Leaving):
        groups = None if rule.groups is None else tuple(repeated(x, firsts) for x in rule.groups)
        size = None if rule.log_size is None else repeated(rule.log_size, firsts)
        cut_rule = Leaving(rule.delay, repeated(rule.stays, firsts), groups, size)
    arguments = (
        repeated(given.q, CUTS),
        *(repeated(x, firsts) for x in (given.keys, given.values)),
        Rows(new, keys),
        stored(given, whole, firsts),
        cut_rule,
        given.scale,
        given.softcap,
    )
    expected = repeated(wanted, CUTS)
    torch.testing.assert_close(attend_plain(*arguments).double(), expected, rtol=1e-5, atol=1e-5)
    out = prefill_triton.attend(*arguments, blocks=blocks(32, 16, 16, whole.group))
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)


def stored(given: Problem, case: Case, firsts: list[int]) -> Past:
    """What pages hold of tokens before `firsts`, of a row for each of these: under `Leaving` those that stay."""
    most, rule = -(-max(firsts) // PAGE), given.rule
    shape = len(firsts), case.heads, most
    table = torch.arange(len(firsts) * case.heads * most, dtype=torch.int32).flip(0).view(shape)
    lengths = torch.zeros(shape[:2], dtype=torch.int32)
    pool = [torch.full((table.numel(), PAGE, case.channels), NAN) for _ in range(2)]
    weight, position = torch.full(pool[0].shape[:2], NAN), torch.zeros(pool[0].shape[:2], dtype=torch.int32)
    source = (given.keys, given.values)
    if isinstance(rule, Leaving) and rule.groups is not None:
        source = rule.groups
    for row, head in itertools.product(range(len(firsts)), range(case.heads)):
        kept = [j for j in range(firsts[row]) if not isinstance(rule, Leaving) or bool(rule.stays[head, j])]
        lengths[row, head] = len(kept)
        for i, j in enumerate(kept):
            at = int(table[row, head, i // PAGE]), i % PAGE
            pool[0][at], pool[1][at], position[at] = source[0][head, j], source[1][head, j], j
            weight[at] = rule.log_size[head, j] if isinstance(rule, Leaving) and rule.log_size is not None else 0.0
    return Past(*pool, table, lengths, weight if case.weights else None, position)


@pytest.mark.usefixtures("poisoned")
def test_room_for_more_rows_and_tokens() -> None:
    """Fixed shapes, as a graph needs them: rows that are idle, tokens and keys behind the last row, wherever heads lie
    in memory."""
    case = CASES["dms, delay 7"]
    given = problem(case, seed=6)
    wanted, rule = by_definition(case, given), given.rule
    assert isinstance(rule, Leaving)
    assert given.past is not None
    q = torch.cat([given.q, torch.full_like(given.q[:, :50], NAN)], 1).transpose(0, 1).contiguous().transpose(0, 1)
    keys = torch.cat([given.keys, torch.full_like(given.keys[:, :70], NAN)], 1).transpose(0, 1).contiguous()
    values = torch.cat([given.values, torch.full_like(given.values[:, :70], NAN)], 1)
    stays = torch.cat([rule.stays, torch.ones_like(rule.stays[:, :70])], 1)
    rows = Rows(*(torch.cat([x, x[-1:].expand(5)]) for x in given.rows))
    past = given.past._replace(
        page_table=torch.cat([given.past.page_table, torch.full_like(given.past.page_table, -1)]).repeat(2, 1, 1),
        lengths=torch.cat([given.past.lengths, torch.full_like(given.past.lengths, 999)]).repeat(2, 1),
    )
    cut = blocks(32, 16, 16, 3)
    out = prefill_triton.attend(
        q, keys.transpose(0, 1), values, rows, past, Leaving(7, stays), given.scale, given.softcap, blocks=cut
    )
    torch.testing.assert_close(out[:, : given.q.shape[1]].double(), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("poisoned")
def test_what_stays_is_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where it is counted in several steps."""
    monkeypatch.setattr(prefill_triton, "COUNTED", 64)
    generator = torch.Generator().manual_seed(7)
    keys, values = (torch.randn(3, 150, 20, generator=generator) for _ in range(2))
    size = torch.randn(3, 150, generator=generator)
    stays = torch.rand(3, 150, generator=generator) < torch.tensor([0.0, 0.4, 1.0])[:, None]
    stays[:, 140:] = False  # so that keys may be fewer
    packed = prefill_triton.pack_kept(keys[:, :140].contiguous(), values[:, :140], stays, size)
    for head in range(3):
        count = int(packed.kept[head, -1])
        assert count == int(stays[head].sum())
        for mine, all_of_it in ((packed.keys, keys), (packed.values, values), (packed.log_size, size)):
            assert mine[head, :count].equal(all_of_it[head, stays[head]])
            assert mine[head, count:].isnan().all()


@pytest.mark.parametrize("name", ["full, weights", "window", "dms, delay 7", "fold, delay 7", "dmc"])
def test_launches_without_reading_anything(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Meta tensors have no numbers: whatever looks at one from the host fails."""
    launched = []

    class Launch:
        def __getitem__(self, grid: tuple[int, ...]):  # type: ignore[no-untyped-def]
            return lambda *args, **options: launched.append(grid)

    for kernel in ("forward", "count", "pack"):
        monkeypatch.setattr(prefill_triton.kernels, kernel, Launch())

    def without_numbers(x: object) -> object:
        if isinstance(x, Tensor):
            return x.to("meta")
        return type(x)(*map(without_numbers, x)) if isinstance(x, Rows | Past | Recent | Leaving) else x

    given = problem(CASES[name])
    rule = given.rule
    if isinstance(rule, Leaving) and rule.groups is not None:
        rule = rule._replace(groups=tuple(x.to("meta") for x in rule.groups))
    out = prefill_triton.attend(*map(without_numbers, given._replace(rule=rule)))
    assert out.shape == given.q.shape
    assert len(launched) == 1 + 2 * isinstance(rule, Leaving)


def test_what_does_not_fit_is_refused() -> None:
    given = problem(CASES["dms, delay 7"])
    assert isinstance(given.rule, Leaving)
    assert given.past is not None
    with pytest.raises(OptionError, match="one dtype"):
        attend(*given._replace(q=given.q.half()))
    with pytest.raises(OptionError, match="groups over 2 KV heads"):
        attend(*given._replace(q=given.q[:3]))
    with pytest.raises(OptionError, match="positive"):
        attend(*given._replace(scale=0.0))
    with pytest.raises(OptionError, match="one bool for each key"):
        attend(*given._replace(rule=given.rule._replace(stays=given.rule.stays[:, 1:])))
    with pytest.raises(OptionError, match="position"):
        attend(*problem(CASES["window"])._replace(past=given.past._replace(position=None)))
    wide = torch.zeros(2, 4, 300)
    with pytest.raises(UnsupportedError, match="300 channels"):
        attend(wide, wide, wide, Rows(torch.tensor([0, 4]), torch.tensor([0, 4])), None, None, 1.0)
