"""What gates say, for `bench.kernels`: what is checked and timed."""

import itertools
import math
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from kvpleat.bench.kernel_timing import Call, Cases, Checked, Machine, Timed, difference
from kvpleat.kernels import gate, gate_triton

Problem = tuple[Tensor, Tensor, Tensor, float, int]  # the arguments of `gate.logits`

SCALE = 10.0  # of the gates that come with kvpleat
ALLOWED = 1e-4  # of logits of size SCALE: each is a sum of up to 4096 products
MEMORY = 200 * 2**20  # bytes of tokens and gates that are asked in turn, more than a GPU's cache holds
SHAPES = {"dms, C 4096 H 8": (4096, 8, 1), "fold, C 4096 H 8": (4096, 8, 2), "dms, C 768 H 12": (768, 12, 1)}


def _problem(tokens: int, shape: tuple[int, int, int], device: torch.device, dtype: torch.dtype) -> Problem:
    """Tokens and a gate of shape (channels, heads, outputs): logits of size SCALE around 0."""
    channels, heads, outputs = shape
    hidden = torch.randn(1, tokens, channels, device=device).to(dtype)
    weight = torch.randn(outputs * heads, channels, device=device) / channels**0.5
    return hidden, weight, torch.randn(outputs * heads, device=device), SCALE, outputs


def _by_triton(hidden: Tensor, weight: Tensor, bias: Tensor, scale: float, outputs: int) -> Tensor:
    """`gate.logits`, but in the interpreter too: [outputs, T, H]."""
    said: Tensor = gate_triton.logits(hidden.flatten(0, 1), weight, bias, scale, outputs)
    return said


def check(here: Machine) -> Iterator[Checked]:
    """Against sums in float64 and against torch; a token alone and among others; a graph; torch.compile."""
    large = here.large
    shapes = [*SHAPES.values(), (576, 3, 1), (90, 5, 2), (5120, 48, 2)] if large else [(24, 3, 1), (10, 2, 2)]
    tokens = 2048 if large else 9
    for shape, dtype in itertools.product(shapes, (torch.bfloat16, torch.float16, torch.float32)):
        problem = _problem(tokens, shape, here.device, dtype)
        hidden, weight, bias, scale, outputs = problem
        name = "C {} H {} outputs {} ".format(*shape) + str(dtype)[6:]
        found = _by_triton(*problem)
        wanted = hidden[0].double() @ weight.double().T * scale + bias.double()
        yield Checked(f"{name}: float64", difference(found, _split(wanted, outputs)), ALLOWED)
        torchs = gate.by_torch(*problem)[:, 0].transpose(1, 2)
        clear = torchs.abs() > ALLOWED  # nearer to 0 rounding decides
        yield Checked(f"{name}: decisions that are not torch's", float(((found > 0) != (torchs > 0))[clear].sum()), 0.0)
        yield Checked(f"{name}: a token alone, among 64, all: other bits", _other_bits(problem, found), 0.0)
    if large:
        yield _captured(here.device)


def _split(said: Tensor, outputs: int) -> Tensor:
    """[T, outputs * H] -> [outputs, T, H]."""
    grouped: Tensor = said.unflatten(1, (outputs, -1))
    return grouped.movedim(1, 0)


def _other_bits(problem: Problem, found: Tensor) -> float:
    """Logits that differ where the same tokens stand elsewhere in another number of them; found [outputs, T, H]."""
    hidden, tokens, wrong = problem[0], problem[0].shape[1], 0
    parts = [(at, at + 1) for at in (0, 1, 2, 3, tokens // 2 + 3, tokens - 1)]
    for start, stop in [*parts, (0, 64), (1, 65), (tokens // 2 + 1, tokens)]:
        said = _by_triton(hidden[:, start:stop], *problem[1:])
        wrong += int((said != found[:, start:stop]).sum())
    wide = torch.cat([hidden, hidden], dim=2)[:, :, : hidden.shape[2]]  # rows that are not packed
    return float(wrong + int((_by_triton(wide, *problem[1:]) != found).sum()))


def _captured(device: torch.device) -> Checked:
    """A graph that is replayed on other tokens, and torch.compile: logits of other bits than the call's."""
    problem = _problem(7, (576, 3, 2), device, torch.bfloat16)
    ask: Callable[[], Tensor] = partial(gate.logits, *problem)
    ask()
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize(device)
    with torch.cuda.graph(graph):
        said = ask()
    problem[0].neg_()
    graph.replay()
    wrong = int((said != ask()).sum())
    compiled = torch.compile(gate.logits, fullgraph=True, backend="aot_eager")
    return Checked("a graph replayed, torch.compile: other bits", wrong + int((compiled(*problem) != said).sum()), 0.0)


def time(here: Machine) -> Iterator[Timed]:
    """Tokens of a decode step and of chunks of prompts, beside torch."""
    for (name, shape), tokens in itertools.product(SHAPES.items(), (64, 2048) if here.quick else _TOKENS):
        full = f"{name}, T {tokens}"
        if not here.wants(full):
            continue
        problems, read = _problems(here, shape, tokens)
        seconds, beside = here.seconds([partial(gate.logits, *x) for x in problems]), {}
        if not here.once:
            calls: list[Call] = [partial(gate.by_torch, *x) for x in problems]
            beside = {"torch's": f"{here.seconds(calls) * 1e6:.1f} us"}
        yield Timed(full, seconds, read, beside)


_TOKENS = (1, 64, 256, 2048, 8192)


def _problems(here: Machine, shape: tuple[int, int, int], tokens: int) -> tuple[list[Problem], int]:
    """Several of a kind, and bytes that one reads and writes."""
    first = _problem(tokens, shape, here.device, torch.bfloat16)
    read = sum(x.nbytes for x in first[:3]) + 4 * tokens * first[2].numel()
    count = 1 if here.once else min(512, math.ceil(MEMORY / read))
    return [first, *(_problem(tokens, shape, here.device, torch.bfloat16) for _ in range(count - 1))], read


def sweep(here: Machine) -> Iterator[str]:
    """Tokens, numbers and warps of a program."""
    names = "TOKENS", "NUMBERS", "WARPS"
    kept = tuple(getattr(gate_triton, name) for name in names)
    for (kind, shape), tokens in itertools.product(SHAPES.items(), (1, 64, 2048)):
        problems, _ = _problems(here, shape, tokens)
        calls: list[Call] = [partial(gate.logits, *x) for x in problems]
        found = {}
        for option in itertools.product((1, 2, 4), (4, 8), (4, 8, 16)):
            for name, value in zip(names, option, strict=True):
                setattr(gate_triton, name, value)
            found[option] = here.seconds(calls)
        best = sorted(found, key=lambda at: found[at])[:4]
        yield f"{kind}, T {tokens}: now {found[kept] * 1e6:.1f} us; " + ", ".join(
            f"{found[at] * 1e6:.1f} us with (tokens, numbers, warps) {at}" for at in best
        )
    for name, value in zip(names, kept, strict=True):
        setattr(gate_triton, name, value)


CASES = Cases("gate", check, time, sweep)
