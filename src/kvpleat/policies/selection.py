"""Which entries stay when streams compete for pages: whole pages go to the streams whose next entries score highest."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Candidates:
    """The entries of some streams (s of them), padded to one width n.

    Args:
        scores: [s, n] float32. live: [s, n]. protected: [s, n] entries that stay whatever they score.
    """

    scores: Tensor
    live: Tensor
    protected: Tensor

    @staticmethod
    def stack(parts: "list[Candidates]") -> "Candidates":
        """All streams of several layers, padded to the widest."""
        width = max(part.live.shape[1] for part in parts)

        def padded(name: str) -> Tensor:
            tensors = [getattr(part, name) for part in parts]
            return torch.cat([F.pad(t, (0, width - t.shape[1])) for t in tensors])

        return Candidates(padded("scores"), padded("live"), padded("protected"))


@dataclass(frozen=True)
class Ranking:
    """Candidates that are not protected, best first: [s, n] scores (-1 past the end), [s, n] rank of each entry (n past
    the end), [s] how many."""

    scores: Tensor
    rank: Tensor
    count: Tensor


def rank(candidates: Candidates) -> Ranking:
    """Sort the unprotected entries of each stream by score; ties go to the earlier entry."""
    open_ = candidates.live & ~candidates.protected
    scores, order = torch.where(open_, candidates.scores, -1.0).sort(dim=1, descending=True, stable=True)
    place = torch.arange(order.shape[1], device=order.device).expand_as(order)
    ranks = torch.empty_like(order).scatter_(1, order, place)
    return Ranking(scores, torch.where(open_, ranks, order.shape[1]), open_.sum(1))


def share_pages(
    candidates: Candidates, ranking: Ranking, budget: int, floor: float, reserve: int, page_size: int, groups: int = 1
) -> Tensor:
    """Entries each stream may keep beside its protected ones, so that all streams together hold at most `budget` pages.

    Args:
        candidates, ranking: the streams. groups: of equally many streams that each have such a budget.
        budget: pages. Exceeded only where protected entries and floors alone need more.
        floor: share of an equal part of the budget that every stream gets.
        reserve: entries a stream will grow by before the next moment; its pages must hold them too.
        page_size: entries of a page.

    Returns:
        [s] int64.
    """
    protected = candidates.protected.sum(1)
    most = -(-(candidates.live.sum(1) + reserve) // page_size)
    base = -(-(protected + reserve) // page_size)
    base = torch.minimum(torch.clamp(base, min=int(floor * budget * groups / len(base))), most)
    room = base * page_size - reserve - protected  # open entries that the base pages hold
    # As many as the widest stream could use, so that nothing is read from a device; the others are worth less than 0.
    steps = torch.arange(-(-(candidates.live.shape[1] + reserve) // page_size) + 1, device=room.device)
    edges = room[:, None] + page_size * steps
    sums = F.pad(ranking.scores.clamp(min=0).double().cumsum(1), (1, 0))
    worth = sums.gather(1, edges.clamp(max=sums.shape[1] - 1)).diff(dim=1)  # of each further page
    worth = worth.masked_fill(edges[:, :-1] >= ranking.count[:, None], -1.0)
    order = worth.view(groups, -1).sort(dim=1, descending=True, stable=True).indices
    place = torch.arange(order.shape[1], device=room.device)
    free = budget - base.view(groups, -1).sum(1, keepdim=True)
    best = torch.zeros_like(order, dtype=torch.bool).scatter(1, order, place < free)
    return room + page_size * (best.view_as(worth) & (worth >= 0)).sum(1)


def cover(candidates: Candidates, ranking: Ranking, coverage: float, reserve: int, page_size: int) -> Tensor:
    """Entries each stream must keep beside its protected ones to carry a share of its scores, filled up to whole pages.

    Args:
        coverage: share of the sum of scores, protected entries included.
        candidates, ranking, reserve, page_size: as in `share_pages`.

    Returns:
        [s] int64.
    """
    protected = candidates.protected.sum(1)
    held = torch.where(candidates.protected, candidates.scores, 0.0).double().sum(1, keepdim=True)
    sums = held + F.pad(ranking.scores.clamp(min=0).double().cumsum(1), (1, 0))
    needed = (sums < coverage * sums[:, -1:]).sum(1)
    pages = -(-(protected + needed + reserve) // page_size)
    return pages * page_size - reserve - protected


def known_empty(counts: Tensor) -> bool:
    """Whether all of them are 0, where looking costs nothing: of a device it would be waiting for it."""
    return counts.device.type == "cpu" and not bool(counts.any())
