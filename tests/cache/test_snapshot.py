"""A cache as tensors and as a file: what comes back is what went, and nothing else is believed."""

import itertools
import os
import stat
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kvpleat.cache import snapshot
from kvpleat.cache.paged import PagedKVCache
from kvpleat.cache.pages import PagePool
from kvpleat.errors import CacheFileError
from kvpleat.types import Decision, KVShape

CPU = torch.device("cpu")
FIELDS = ("position", "log_weight", "score")


def pool(page_size: int = 16, dtype: torch.dtype = torch.float32, fields: tuple[str, ...] = FIELDS) -> PagePool:
    return PagePool(KVShape(2, 3, 6, 8, dtype, page_size, fields), CPU, max_pages=1000)


def ragged(pages: PagePool) -> PagedKVCache:
    """Two rows whose streams all have lengths of their own, one of them empty."""
    random = torch.Generator().manual_seed(0)
    cache = PagedKVCache(pages, 2, observation_window=4)
    for row, layer in itertools.product(range(2), range(2)):
        count = 0 if (row, layer) == (1, 0) else 37 + 5 * row
        keys, values = (torch.randn(3, count, 8, generator=random).to(pages.shape.dtype) for _ in range(2))
        cache.append(layer, row, keys, values, torch.arange(count, dtype=torch.int32))
        cache.observed.observe(layer, row, torch.randn(6, 9, 8, generator=random).to(pages.shape.dtype), 0)
        if count:
            keep = torch.rand(3, count, generator=random) < torch.tensor([0.1, 0.5, 1.0])[:, None]
            keep[0] &= layer == 0  # an empty stream beside others
            scores = torch.rand(3, count, generator=random) if "score" in pages.shape.fields else None
            cache.apply(layer, row, Decision(keep=keep, scores=scores))
    return cache


def assert_same(one: PagedKVCache, other: PagedKVCache) -> None:
    assert torch.equal(one.lengths, other.lengths)
    assert torch.equal(one.observed.last, other.observed.last)
    for row, layer in itertools.product(range(2), range(2)):
        mine, theirs = one.entries(layer, row), other.entries(layer, row)
        assert torch.equal(mine.keys, theirs.keys)
        assert torch.equal(mine.values, theirs.values)
        for name in one.shape.fields:
            assert torch.equal(mine.fields[name].nan_to_num(-1.0), theirs.fields[name].nan_to_num(-1.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("fields", [(), ("position",), FIELDS], ids=len)
def test_pack_and_unpack(dtype: torch.dtype, fields: tuple[str, ...]) -> None:
    """Bit for bit, in every dtype, with and without side arrays, into pages of another size, in another pool."""
    source = pool(dtype=dtype, fields=fields)
    cache = ragged(source)
    for page_size in (16, 32):
        target = pool(page_size, dtype, fields)
        twin = PagedKVCache(target, 2, observation_window=4)
        snapshot.unpack(twin, snapshot.pack(cache))
        assert_same(cache, twin)
        twin.check_integrity()
        target.check_integrity({twin.owner: twin.owned_pages()})


def test_pack_holds_live_entries_only() -> None:
    """A file of a compressed cache is as small as what is live, not as its pages."""
    cache = ragged(pool())
    packed = snapshot.pack(cache)
    live = int(cache.lengths.sum())
    assert packed["key"].shape == packed["value"].shape == (live, 8)
    assert all(packed[name].shape == (live,) for name in FIELDS)


def test_pack_is_a_copy() -> None:
    """What happens to the cache afterwards does not reach what was packed."""
    cache = ragged(pool())
    packed = snapshot.pack(cache)
    before = {name: tensor.clone() for name, tensor in packed.items()}
    cache.apply(0, 0, Decision(keep=torch.zeros(3, int(cache.lengths[0, 0].max()), dtype=torch.bool)))
    cache.observed.observe(0, 0, torch.ones(6, 4, 8), 100)
    assert all(torch.equal(packed[name].nan_to_num(-1), before[name].nan_to_num(-1)) for name in packed)


def tensors() -> dict[str, Tensor]:
    return {"a": torch.arange(6, dtype=torch.float32).view(2, 3), "b": torch.zeros(0, 4), "c": torch.tensor(True)}


def test_write_and_read(tmp_path: Path) -> None:
    """Tensors, empty ones too, and header come back."""
    path, header = tmp_path / "file", {"policy": {"name": "full"}, "numbers": [1, 2.5, None, True]}
    snapshot.write(path, tensors(), header)
    found, found_header = snapshot.read(path)
    assert found_header == header
    assert set(found) == set(tensors())
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors().items())
    assert os.listdir(tmp_path) == ["file"]


def test_write_replaces(tmp_path: Path) -> None:
    """The second file, whole; nothing of the first."""
    path = tmp_path / "file"
    snapshot.write(path, tensors(), {"turn": 1})
    snapshot.write(path, {"d": torch.ones(2)}, {"turn": 2})
    found, header = snapshot.read(path)
    assert list(found) == ["d"]
    assert header == {"turn": 2}
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.skipif(os.name == "nt", reason="no umask")
def test_write_leaves_permissions_to_the_user(tmp_path: Path) -> None:
    """A saved file is as readable as any other file of this user."""
    (tmp_path / "other").touch()
    snapshot.write(tmp_path / "file", tensors(), {})
    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("file", "other")]
    assert modes[0] == modes[1]


def test_checksum_covers_everything() -> None:
    """Names, shapes, dtypes and bytes of tensors all change the digest; order and layout do not."""
    base = {"a": torch.arange(6, dtype=torch.float32).view(2, 3), "b": torch.zeros(2)}
    digest = snapshot._digest(base, "{}")
    assert snapshot._digest(dict(reversed(base.items())), "{}") == digest
    assert snapshot._digest({**base, "a": base["a"].t().contiguous().t()}, "{}") == digest
    for other in (
        {"a": base["a"]},
        {"x": base["a"], "b": base["b"]},
        {**base, "a": base["a"].view(3, 2)},
        {**base, "a": base["a"].view(torch.int32)},
        {**base, "b": torch.tensor([0.0, -0.0])},
    ):
        assert snapshot._digest(other, "{}") != digest


def test_a_changed_header_is_refused(tmp_path: Path) -> None:
    """The checksum speaks for the header too: positions and policy mean as much as keys."""
    path = tmp_path / "file"
    snapshot.write(path, tensors(), {"positions": [70]})
    content = path.read_bytes()
    assert content.count(b"[70]") == 1
    path.write_bytes(content.replace(b"[70]", b"[71]"))
    with pytest.raises(CacheFileError, match="checksum"):
        snapshot.read(path)
