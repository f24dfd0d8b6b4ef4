"""`decode.attend` in Triton: what is launched, and how torch.compile finds it. The kernels are in
decode_kernels_triton.py.

The pages of all streams of a layer, one after the other, are cut into shares of the same size, one for each program of
a grid that fills the GPU once (the idea of Stream-K, arXiv 2301.03598). A program walks over the borders of streams in
one loop, so that loads of the next stream are under way while the last one ends. A stream that lies within one share is
finished there. Of all others every program writes a part, and the program that comes last puts the parts together, in
their order: the same result every time.
"""

from typing import Any

import torch
import triton
from torch import Tensor

from kvpleat.kernels import decode_kernels_triton as kernels

PLAN_BLOCK = 1024  # streams that the plan adds up at a time
COMBINED = 8192  # numbers of parts that are put together at a time


@torch.library.custom_op("kvpleat::decode_plan", mutates_args=("starts", "tiles", "shares"))
def plan(
    lengths: Tensor,
    active: Tensor | None,
    seats: Tensor | None,
    starts: Tensor,
    tiles: Tensor,
    shares: Tensor,
    page_size: int,
    tile: int,
    ahead: int,
) -> None:
    """`decode.plan`: lengths [R, L, H]; starts, tiles [L, Z + 1] and shares [L, programs, 8] are written."""
    _, layers, heads = lengths.shape
    streams, programs = starts.shape[1] - 1, shares.shape[1]
    kernels.plan[(layers,)](
        lengths, active, seats, starts, tiles, shares, streams, ahead, streams.bit_length(), *lengths.stride(),
        starts.stride(0), programs, heads, page_size, tile // page_size, PLAN_BLOCK,
        triton.next_power_of_2(programs), num_warps=8,
    )  # fmt: skip


@torch.library.custom_op("kvpleat::decode_attention", mutates_args=())
def attend(
    q: Tensor,
    key_pages: Tensor,
    value_pages: Tensor,
    log_weight: Tensor | None,
    page_table: Tensor,
    lengths: Tensor,
    active: Tensor | None,
    seats: Tensor | None,
    starts: Tensor,
    shares: Tensor,
    arrivals: Tensor,
    scale: float,
    softcap: float | None,
    tile: int,
    warps: int,
    stages: int,
    early: bool,
    with_lse: bool,
) -> tuple[Tensor, Tensor]:
    """Output [R, Q, D] and, if asked for, log-sum-exps (base 2) [R, Q]. `arrivals` are zeros before and after, so that
    to the caller nothing is changed."""
    group, programs = q.shape[1] // page_table.shape[1], shares.shape[0]
    out, lse = _empty(q, with_lse)
    parts = q.new_empty((programs, 2, group, q.shape[2]), dtype=torch.float32)
    peaks = q.new_empty((programs, 2, group, 2), dtype=torch.float32)
    sizes, compiled_for = _sizes(q, key_pages, page_table, lengths, tile)
    pieces = COMBINED // (triton.next_power_of_2(group) * compiled_for["CHANNELS"])
    kernels.attend[(programs,)](
        q, key_pages, value_pages, log_weight, page_table, lengths, active, seats, starts, shares, arrivals, parts,
        peaks, out, lse if with_lse else None, scale, softcap, *sizes, **compiled_for, PIECES=min(max(pieces, 2), 8),
        EARLY=early, num_warps=warps, num_stages=stages, **({"launch_pdl": True} if early else {}),
    )  # fmt: skip
    return out, lse


@attend.register_fake
def _(q: Tensor, key_pages: Any, value_pages: Any, log_weight: Any, page_table: Any, lengths: Any, active: Any,
      seats: Any, starts: Any, shares: Any, arrivals: Any, scale: float, softcap: Any, tile: int, warps: int,
      stages: int, early: bool, with_lse: bool) -> tuple[Tensor, Tensor]:  # fmt: skip
    return _empty(q, with_lse)


@torch.library.custom_op("kvpleat::decode_mass", mutates_args=("mass",))
def mass_received(
    q: Tensor,
    key_pages: Tensor,
    log_weight: Tensor | None,
    page_table: Tensor,
    lengths: Tensor,
    active: Tensor | None,
    seats: Tensor | None,
    starts: Tensor,
    shares: Tensor,
    lse: Tensor,
    mass: Tensor,
    scale: float,
    softcap: float | None,
    tile: int,
    warps: int,
    stages: int,
) -> None:
    """Write to mass [P, S] what each entry received from the queries of its group: a second pass over the keys."""
    sizes, compiled_for = _sizes(q, key_pages, page_table, lengths, tile)
    kernels.mass_received[(shares.shape[0],)](
        q, key_pages, log_weight, page_table, lengths, active, seats, starts, shares, lse, mass, scale, softcap,
        *sizes, **compiled_for, num_warps=warps, num_stages=stages,
    )  # fmt: skip


def _empty(q: Tensor, with_lse: bool) -> tuple[Tensor, Tensor]:
    """Room for what `attend` returns."""
    return q.new_empty(q.shape), q.new_empty(q.shape[:2] if with_lse else (0,), dtype=torch.float32)


def _sizes(
    q: Tensor, key_pages: Tensor, page_table: Tensor, lengths: Tensor, tile: int
) -> tuple[tuple[int, ...], dict[str, Any]]:
    """Streams, pages of a table and strides; and what a kernel is compiled for. A product of matrices has at least 16
    rows; channels are a power of two."""
    heads, channels = page_table.shape[1], q.shape[2]
    group = q.shape[1] // heads
    strides = *q.stride()[:2], *page_table.stride()[:2], *lengths.stride()
    compiled_for = {
        "H": heads, "G": group, "D": channels, "S": key_pages.shape[1], "N": tile,
        "GROUP": max(16, triton.next_power_of_2(group)), "CHANNELS": max(16, triton.next_power_of_2(channels)),
        "PRECISION": "ieee" if q.dtype == torch.float32 else "tf32",
    }  # fmt: skip
    return (q.shape[0] * heads, page_table.shape[2], *strides), compiled_for
