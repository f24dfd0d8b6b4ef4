"""Attention of one token a row over entries in pages: every stream has its own pages and its own length.

On a GPU a Triton kernel (decode_triton.py), elsewhere the specification in this file. Streams differ much in length, so
the work of a layer is planned: all pages of all its streams are dealt out in equal shares. A plan is made on the device
from lengths that need not be exact, so one for all layers at the start of a step is enough: it costs one launch, where
planning in every layer would put one more launch in front of each attention. Nothing here reads a tensor on the host,
so all of it can be captured in a CUDA graph.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from kvpleat import accounting
from kvpleat.errors import OptionError
from kvpleat.kernels import reference
from kvpleat.types import KVShape

SHARE = 8


class Launch(NamedTuple):
    """How the kernel is launched.

    Args:
        tile: entries that a program reads at a time, a multiple of the page size, at least 16.
        warps: of a program.
        stages: tiles of a program that are computed or under way (Triton's num_stages).
        programs: for each multiprocessor. All of them should fit at a time, or the last ones start late.
        early: programs come in while the kernel before them ends, and wait there for its end (programmatic dependent
            launch; Hopper and newer).
    """

    tile: int
    warps: int
    stages: int
    programs: int
    early: bool = False


class Work(NamedTuple):
    """Who reads what: room made by `room`, filled by `plan`. With L in front for all layers, without for one.

    Args:
        launch: of the kernel that reads it.
        page_size: entries of a page (S).
        starts: [L, Z + 1] int32 pages of all streams before each of the Z = n * H of a layer, and of all of them.
        tiles: [L, Z + 1] int32 tiles before each stream; only `plan` reads it.
        shares: [L, programs, 8] int32, what each program of the grid reads: the stream its pages begin in, where that
            stream begins and stops, its first page and the one after its last, its tiles, pages of the layer, nothing.
        arrivals: [L, Z] int32 parts of each stream that are written; zeros before and after every call.
    """

    launch: Launch
    page_size: int
    starts: Tensor
    tiles: Tensor
    shares: Tensor
    arrivals: Tensor

    def layer(self, index: int) -> "Work":
        """The same for one layer."""
        return Work(self.launch, self.page_size, *(x[index] for x in self[2:]))


# By channels, rounded up: from `python -m kvpleat.bench.kernels --only decode --sweep`.
LAUNCHES = {
    32: Launch(tile=128, warps=4, stages=3, programs=2),
    64: Launch(tile=64, warps=2, stages=2, programs=6, early=True),
    128: Launch(tile=64, warps=4, stages=3, programs=2),
    256: Launch(tile=32, warps=4, stages=3, programs=2),
}


def launch_for(head_dim: int, dtype: torch.dtype, page_size: int) -> Launch:
    """How the kernel is launched."""
    channels = max(32, 1 << (head_dim - 1).bit_length())
    if dtype.itemsize > 2:  # no tensor cores: what is multiplied is held in registers
        return Launch(page_size, 4, 3 if page_size * channels <= 2**12 else 2, 2)
    launch = LAUNCHES[channels] if channels in LAUNCHES else LAUNCHES[256]._replace(tile=page_size, stages=2)
    return launch._replace(tile=max(page_size, launch.tile))


def room(
    lengths: Tensor,
    head_dim: int,
    dtype: torch.dtype,
    page_size: int,
    launch: Launch | None = None,
    programs: int | None = None,
    rows: int | None = None,
) -> Work:
    """Room for the work of all layers; made once, filled by `plan`.

    Args:
        lengths: [R, L, H] of the pool.
        head_dim, dtype: of the entries.
        page_size: entries of a page (S).
        launch: None: the one measured to be fast, `launch_for`.
        programs: of the grid; None: `launch.programs` for every multiprocessor.
        rows: of the batch (n), where `plan` is given seats; None: as many as the pool has.

    Raises:
        OptionError: a tile does not consist of whole pages.
    """
    launch = launch or launch_for(head_dim, dtype, page_size)
    if launch.tile % page_size or launch.tile < 16 or launch.tile & (launch.tile - 1):
        raise OptionError(
            f"A tile of {launch.tile} entries over pages of {page_size}: programs read whole pages, and a power of two "
            "of entries from 16 on. Pass 32, 64 or 128."
        )
    in_pool, layers, heads = lengths.shape
    streams = (in_pool if rows is None else rows) * heads
    programs = programs or _programs(launch, lengths.device)

    def numbers(*shape: int) -> Tensor:
        return torch.zeros(layers, *shape, dtype=torch.int32, device=lengths.device)

    starts, tiles = numbers(streams + 1), numbers(streams + 1)
    return Work(launch, page_size, starts, tiles, numbers(programs, SHARE), numbers(streams))


def room_bytes(rows: int, shape: KVShape, device: torch.device) -> int:
    """Bytes of the `room` for so many rows, exactly. device: that it will be on."""
    lengths = torch.empty(rows, shape.num_layers, shape.num_kv_heads, device="meta")
    programs = _programs(launch_for(shape.head_dim, shape.dtype, shape.page_size), device)
    work = room(lengths, shape.head_dim, shape.dtype, shape.page_size, programs=programs)
    return accounting.tensor_bytes(*work[2:])


def _programs(launch: Launch, device: torch.device) -> int:
    """Of a grid that fills a device."""
    on_gpu = device.type == "cuda"
    return launch.programs * (torch.cuda.get_device_properties(device).multi_processor_count if on_gpu else 1)


def plan(
    work: Work, lengths: Tensor, active: Tensor | None = None, ahead: int = 1, seats: Tensor | None = None
) -> None:
    """Deal out the pages of all layers, in one launch.

    Args:
        work: of `room`, all layers; filled in place.
        lengths: [R, L, H] int32 entries of each stream, any strides.
        active: [n] bool, rows that have a token; the others' entries are not read. None: all.
        ahead: entries that each stream may grow by before the next plan. `attend` takes any lengths up to lengths +
            ahead rounded up to pages; a longer stream gives NaN and is not cut short. Shorter ones cost balance only.
        seats: [n] int32 or int64, the row of the pool that each row of the batch is; of rows that are not active, any
            number. `work` was made for n rows. None: row i is row i.

    On a CPU nothing is done: the specification needs no plan.
    """
    if lengths.device.type == "cuda":
        plan_on_gpu(work, lengths, active, ahead, seats)


def plan_on_gpu(
    work: Work, lengths: Tensor, active: Tensor | None = None, ahead: int = 1, seats: Tensor | None = None
) -> None:
    """`plan` by the Triton kernel, whatever the device (Triton's interpreter runs it on a CPU)."""
    from kvpleat.kernels import decode_triton

    tile = work.launch.tile
    decode_triton.plan(lengths, active, seats, work.starts, work.tiles, work.shares, work.page_size, tile, ahead)


def attend(
    q: Tensor,
    key_pages: Tensor,
    value_pages: Tensor,
    page_table: Tensor,
    lengths: Tensor,
    work: Work,
    scale: float,
    log_weight: Tensor | None = None,
    softcap: float | None = None,
    mass: Tensor | None = None,
    active: Tensor | None = None,
    seats: Tensor | None = None,
) -> Tensor:
    """Attention of one token a row over the entries of one layer.

    Args:
        q: [n, Q, D] queries, rotated, channels side by side.
        key_pages, value_pages: [P, S, D], contiguous. What lies beyond a stream's length is not read and may be NaN.
        page_table: [R, H, M] int32 pages of each stream, at most M, any strides but 1 for the last.
        lengths: [R, H] int32 entries of each stream, any strides; they fill its pages without holes.
        work: of this layer (`Work.layer`), planned.
        scale: factor on q.k.
        log_weight: [P, S] float32 added to the logits after the soft cap, or None. An entry of -inf gets nothing, but
            its key and value must be numbers.
        softcap: c of c * tanh(logit / c), or None.
        mass: [P, S] float32 to write to what each entry received, summed over the queries of its group; other places
            are left as they are. None: not wanted. Wanted, keys are read a second time.
        active: [n] bool, as `plan` was given it: the other rows' results are zeros. None: all rows.
        seats: [n], as `plan` was given them. None: n = R, and row i is row i.

    Returns:
        [n, Q, D] in q's dtype; zeros where a stream has no entries.

    Raises:
        OptionError: `work` is of other streams or pages, or strides are others than said above.
    """
    streams = lengths.shape[1] * (lengths if seats is None else seats).shape[0]
    if work.starts.shape != (streams + 1,) or work.page_size != key_pages.shape[1]:
        raise OptionError(
            f"Work {list(work.starts.shape)} over pages of {work.page_size} for {streams} streams in pages of "
            f"{key_pages.shape[1]}: programs would read others' pages. Pass the work of one layer, work.layer(index), "
            "with room made for these rows and pages."
        )
    dense = [x for x in (key_pages, value_pages, log_weight, mass) if x is not None]
    if q.stride(2) != 1 or page_table.stride(2) != 1 or not all(x.is_contiguous() for x in dense):
        raise OptionError(
            f"Strides {q.stride()} of queries, {page_table.stride()} of a page table, {[x.stride() for x in dense]} of "
            "the pool: the kernel reads numbers that follow each other. Pass contiguous tensors; of queries and page "
            "tables only the last dimension need be so."
        )
    streams_of_layer, options = (q, key_pages, value_pages, page_table, lengths), (log_weight, softcap, mass)
    if q.device.type != "cuda":
        return by_definition(*streams_of_layer, scale, *options, active, seats)
    return on_gpu(*streams_of_layer, work, scale, *options, active, seats)


def on_gpu(
    q: Tensor,
    key_pages: Tensor,
    value_pages: Tensor,
    page_table: Tensor,
    lengths: Tensor,
    work: Work,
    scale: float,
    log_weight: Tensor | None = None,
    softcap: float | None = None,
    mass: Tensor | None = None,
    active: Tensor | None = None,
    seats: Tensor | None = None,
) -> Tensor:
    """`attend` by the Triton kernel, whatever the device (Triton's interpreter runs it on a CPU)."""
    from kvpleat.kernels import decode_triton

    launch, shares = work.launch[:3], (work.starts, work.shares)
    out: Tensor
    lse: Tensor
    out, lse = decode_triton.attend(
        q, key_pages, value_pages, log_weight, page_table, lengths, active, seats, *shares, work.arrivals, scale,
        softcap, *launch, work.launch.early, mass is not None,
    )  # fmt: skip
    if mass is not None:
        decode_triton.mass_received(
            q, key_pages, log_weight, page_table, lengths, active, seats, *shares, lse, mass, scale, softcap, *launch
        )
    return out


def by_definition(
    q: Tensor,
    key_pages: Tensor,
    value_pages: Tensor,
    page_table: Tensor,
    lengths: Tensor,
    scale: float,
    log_weight: Tensor | None = None,
    softcap: float | None = None,
    mass: Tensor | None = None,
    active: Tensor | None = None,
    seats: Tensor | None = None,
) -> Tensor:
    """The specification of `attend`: each stream gathered from its pages, then `reference.attend`."""
    if seats is not None:
        seats = seats if active is None else torch.where(active, seats, 0)
        page_table, lengths = page_table.index_select(0, seats), lengths.index_select(0, seats)
    (rows, heads, pages), size = page_table.shape, key_pages.shape[1]
    index = torch.arange(pages * size, device=q.device)
    if active is not None:
        lengths = torch.where(active[:, None], lengths, 0)
    visible = (index < lengths[..., None]).flatten(0, 1)  # [Z, N]
    slots = (page_table.long()[..., None] * size + index[:size]).view(rows * heads, -1)
    slots = torch.where(visible, slots, 0)  # beyond a stream's length the table may hold anything
    keys, values = (x.flatten(0, 1)[slots] for x in (key_pages, value_pages))
    bias = None if log_weight is None else log_weight.flatten()[slots]
    grouped = q.reshape(rows * heads, -1, 1, q.shape[2])
    if mass is not None:
        received = reference.attention_received(grouped, keys, bias, visible[:, None], scale, softcap).sum(dim=(1, 2))
        mass.view(-1)[slots[visible]] = received[visible]
    return reference.attend(grouped, keys, values, bias, visible[:, None], scale, softcap).view(q.shape)
