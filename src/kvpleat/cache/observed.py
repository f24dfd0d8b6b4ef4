"""Queries that policies want to look back at: the last ones of each row and layer, and a sample of a prompt's."""

import torch
from torch import Tensor

from kvpleat import accounting
from kvpleat.types import KVShape

MAX_SAMPLES = (
    1024  # of all tokens of a prompt since the last moment; half as many cost 0.4 points of perplexity at ratio 4
)


class ObservedQueries:
    """Remembered queries of some rows.

    Args:
        shape: of the model. num_rows: sequences (R). window: last queries to remember (W), 0 for none.
        device: where they live.
    """

    @torch.inference_mode(False)  # tensors made in that mode could not be written to outside it
    def __init__(self, shape: KVShape, num_rows: int, window: int, device: torch.device) -> None:
        self.window = window
        size = (num_rows, shape.num_layers, shape.num_q_heads, window, shape.head_dim)
        self.last = torch.zeros(
            size, dtype=shape.dtype, device=device
        )  # [R, L, Q, W, D]; slot of a query: position % W
        self.samples: dict[tuple[int, int], Tensor] = {}  # (row, layer) -> [Q, M, D], while a prompt is open

    def observe(self, layer: int, row: int, queries: Tensor, position: int) -> None:
        """Remember the last W of T queries: [Q, T, D], the first one at `position`."""
        kept = min(self.window, queries.shape[1])
        if kept:
            first = position + queries.shape[1] - kept
            slots = torch.arange(first, first + kept, device=queries.device) % self.window
            self.last[row, layer].index_copy_(1, slots, queries[:, -kept:])

    def recent(self, layer: int, row: int, position: int) -> tuple[Tensor, Tensor]:
        """The last min(W, position) queries before `position`: ([Q, w, D], [w] positions)."""
        positions = torch.arange(max(0, position - self.window), position, device=self.last.device)
        return self.last[row, layer][:, positions % self.window], positions

    def sample(self, layer: int, row: int, queries: Tensor, position: int, since: int) -> None:
        """Remember queries evenly spread over the tokens since the last moment, at most MAX_SAMPLES of them.

        Which ones follows from positions alone. With n tokens since `since` it is every s-th, s the smallest power of
        two that is at least n / MAX_SAMPLES. So chunks leave the same sample as the whole.

        Args:
            queries: [Q, T, D], the first one at `position`. since: position of the last moment.
        """
        before, after = position - since, position - since + queries.shape[1]
        stride = sample_stride(after)
        new = queries[:, -before % stride :: stride]
        old = self.samples.get((row, layer))
        if old is None:
            self.samples[row, layer] = new.clone()
        else:
            self.samples[row, layer] = torch.cat([old[:, :: stride // sample_stride(before)], new], dim=1)

    def take_samples(self, layer: int, row: int, position: int, since: int) -> tuple[Tensor, Tensor]:
        """The sampled queries of tokens [since, position) and their positions, which are forgotten; the last W queries
        where none were sampled: ([Q, M, D], [M])."""
        samples = self.samples.pop((row, layer), None)
        if samples is None:
            return self.recent(layer, row, position)
        index = torch.arange(samples.shape[1], device=samples.device)
        return samples, since + index * sample_stride(position - since)

    def copy_from(self, other: "ObservedQueries") -> None:
        """Take over what another one remembers."""
        self.last.copy_(other.last)
        self.samples = {key: samples.clone() for key, samples in other.samples.items()}

    @property
    def num_bytes(self) -> int:
        """Bytes of all that is remembered."""
        return accounting.tensor_bytes(self.last, *self.samples.values())


def sample_stride(tokens: int) -> int:
    """Distance between sampled queries after `tokens` tokens: a power of two."""
    stride = 1
    while stride * MAX_SAMPLES < tokens:
        stride *= 2
    return stride
