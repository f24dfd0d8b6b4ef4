"""Entries of few bits: quantised once, and then only moved."""

import itertools
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kvpleat.cache import snapshot
from kvpleat.cache.entries import decode, encode
from kvpleat.cache.paged import PagedKVCache
from kvpleat.cache.pages import PagePool
from kvpleat.cache.pieces import readable, stream_pieces
from kvpleat.kernels import reference
from kvpleat.types import ENTRY_BITS, Decision, KVShape, Rotary

CPU = torch.device("cpu")
HEADS, DIM, COUNT = 3, 8, 37
FIELDS = ("position", "log_weight", "score")
BITS = pytest.mark.parametrize("bits", [*ENTRY_BITS, None])


def pool(bits: int | None, page_size: int = 16) -> PagePool:
    """A pool whose arrays start as NaN and 255, so that whatever is read without having been written shows."""
    pages = PagePool(KVShape(2, HEADS, 6, DIM, torch.float32, page_size, FIELDS, bits), CPU, max_pages=200)
    pages.free(torch.cat(pages.allocate([100], owner=10**9)))
    for array in pages.arrays.values():
        array.tensor[:100] = 255 if array.tensor.dtype in (torch.uint8, torch.int32) else math.nan
    return pages


def entries(count: int = COUNT, seed: int = 0) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(seed)
    keys, values = (torch.randn(HEADS, count, DIM, generator=random) for _ in range(2))
    return keys, values


def filled(pages: PagePool) -> PagedKVCache:
    """Two layers of COUNT entries, appended in two goes."""
    cache = PagedKVCache(pages, 1, rotary=Rotary(torch.tensor([0.5, 0.1])))
    for layer, (start, stop) in itertools.product(range(2), ((0, 20), (20, COUNT))):
        keys, values = entries(seed=layer)
        positions = torch.arange(start, stop, dtype=torch.int32)
        cache.append(layer, 0, keys[:, start:stop], values[:, start:stop], positions)
    return cache


def codes(cache: PagedKVCache, layer: int) -> dict[str, Tensor]:
    """What the pages hold of keys and values."""
    content, _ = cache.stored(layer, 0)
    return {name: tensor for name, tensor in content.items() if name not in FIELDS}


@BITS
def test_what_is_read_is_what_append_returned(bits: int | None) -> None:
    """append returns what every later reader sees, whether entries come at once or one by one."""
    cache, whole = PagedKVCache(pool(bits), 1), PagedKVCache(pool(bits), 1)
    keys, values = entries()
    returned = [
        cache.append(0, 0, keys[:, i : i + 1], values[:, i : i + 1], torch.tensor([i], dtype=torch.int32))
        for i in range(COUNT)
    ]
    whole.append(0, 0, keys, values, torch.arange(COUNT, dtype=torch.int32))
    read = cache.entries(0, 0)
    assert torch.equal(read.keys, torch.cat([k for k, _ in returned], dim=1))
    assert torch.equal(read.values, torch.cat([v for _, v in returned], dim=1))
    for name, tensor in codes(whole, 0).items():
        assert torch.equal(codes(cache, 0)[name], tensor)
    if bits is None:
        assert torch.equal(read.keys, keys)
    else:
        for found, x, width in zip((read.keys, read.values), (keys, values), ENTRY_BITS[bits], strict=True):
            assert torch.equal(found, reference.dequantize(reference.quantize(x, width), DIM, torch.float32))


@BITS
def test_evicting_and_compacting_moves_codes(bits: int | None) -> None:
    """Ten rounds of eviction: what is left is bit for bit what was appended."""
    cache = filled(pool(bits))
    before, left = codes(cache, 0), torch.arange(COUNT).expand(HEADS, -1)
    for round_ in range(10):
        keep = torch.ones(HEADS, COUNT - round_, dtype=torch.bool)
        keep[torch.arange(HEADS), torch.tensor([3, 0, 20]) % (COUNT - round_)] = False
        left = left[keep].view(HEADS, -1)
        cache.apply(0, 0, Decision(keep=keep))
    for name, tensor in codes(cache, 0).items():
        for head in range(HEADS):
            assert torch.equal(tensor[head], before[name][head, left[head]])
    assert cache.entries(0, 0).fields["position"].tolist() == left.tolist()


@BITS
def test_merging_quantises_what_it_changed_and_nothing_else(bits: int | None) -> None:
    """Entry 5 takes in 6 and 7 and is quantised again; all others keep their codes."""
    cache = filled(pool(bits))
    before, old = codes(cache, 0), cache.entries(0, 0)
    target = torch.arange(COUNT).repeat(HEADS, 1)
    target[:, 6:8] = 5
    keep = target == torch.arange(COUNT)
    share = torch.ones(HEADS, COUNT)
    cache.apply(0, 0, Decision(keep, target, share, log_weights=torch.zeros(HEADS, COUNT)))
    others = [i for i in range(COUNT) if i not in (5, 6, 7)]
    after = codes(cache, 0)
    for name, tensor in before.items():
        assert torch.equal(after[name][:, [i for i in range(COUNT - 2) if i != 5]], tensor[:, others])
    mean = old.values[:, 5:8].mean(1)
    expected = encode(old.keys[:, 5], mean, cache.shape)
    _, values = decode(expected, cache.shape)
    torch.testing.assert_close(cache.entries(0, 0).values[:, 5], values, atol=1e-2 if bits else 1e-6, rtol=0)


@BITS
def test_fork_pack_and_file_move_codes(bits: int | None, tmp_path: Path) -> None:
    """A fork, an unpacked copy in pages of another size, and a file hold the same bytes."""
    cache = filled(pool(bits))
    cache.apply(1, 0, Decision(keep=torch.arange(COUNT).expand(HEADS, -1) % 3 != 1))
    snapshot.write(tmp_path / "cache.safetensors", snapshot.pack(cache), {"bits": bits})
    read, _ = snapshot.read(tmp_path / "cache.safetensors")
    for copy_ in (snapshot.pack(cache), read):
        twin = PagedKVCache(pool(bits, 32), 1)
        snapshot.unpack(twin, copy_)
        for layer, other in itertools.product(range(2), (twin, cache.fork())):
            for name, tensor in codes(cache, layer).items():
                assert torch.equal(codes(other, layer)[name], tensor)


@pytest.mark.parametrize("bits", ENTRY_BITS)
def test_memory_is_counted_exactly(bits: int) -> None:
    """Allocated bytes are the pages' bytes as the arrays really hold them."""
    pages = pool(bits)
    cache = filled(pages)
    held = sum(array.tensor[0].nbytes for array in pages.arrays.values())
    keys, values = ENTRY_BITS[bits]
    assert held == 16 * (DIM * (keys + values) // 8 + 2 * 2 * 2 + 12)
    report = cache.memory(seen_tokens=COUNT)
    assert report.allocated_bytes == 2 * HEADS * 3 * held
    assert report.live_bytes == 2 * HEADS * COUNT * held // 16
    assert report.full_bytes == 2 * HEADS * COUNT * 2 * DIM * 4


@pytest.mark.parametrize("bits", ENTRY_BITS)
def test_pieces_of_codes(bits: int) -> None:
    """What decode reads, in place and gathered, stands for the entries of the stream."""
    pages = pool(bits)
    cache, between = PagedKVCache(pages, 1), PagedKVCache(pages, 1)
    keys, values = entries(200)
    for start in range(0, 200, 8):  # pages of another cache come in between
        part, positions = slice(start, start + 8), torch.arange(start, start + 8, dtype=torch.int32)
        for owner in (cache, between):
            owner.append(0, 0, keys[:, part], values[:, part], positions)
    whole = cache.entries(0, 0)
    for head in range(HEADS):
        found_keys, found_values, bias = stream_pieces(readable(cache), cache.pieces(0, 0, head), 200)
        assert len(found_keys) == 2
        assert bias is not None
        assert [len(b) for b in bias] == [k.codes.shape[0] for k in found_keys]  # type: ignore[union-attr]
        for found, expected in ((found_keys, whole.keys), (found_values, whole.values)):
            numbers = torch.cat([reference.dequantize(piece, DIM, torch.float32) for piece in found])  # type: ignore[arg-type]
            assert sorted(numbers.tolist()) == sorted(expected[head].tolist())
