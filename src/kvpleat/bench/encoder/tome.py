"""Token Merging (arXiv 2210.09461) on BERT-like models, as a peer to compare with.

As in the paper: between attention and MLP of each layer, tokens are parted into A (every second one) and B; each of A
finds the one of B whose key is most like its own (cosine of the mean over heads), the r most alike pairs merge,
weighted by how many tokens each stands for, and attention adds the log of that number to its logits (proportional
attention). r is the same in every layer. The first and the last token of a text (CLS and SEP) are never merged.

What the paper leaves open, because images have one size: r is a share of the tokens that a text began with, a batch is
padded again after each layer, and hidden states are spread out again at the end, every token getting that of the one it
was merged into.
"""

from types import TracebackType
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from kvpleat.errors import UnsupportedError


class ToMe:
    """ToMe on one model inside a `with` block; all of it is hooks.

    Args:
        model: a BertModel, RobertaModel or the like, without gradients.
        share: r over the tokens of a text, such as 0.08 of them in each layer.

    Raises:
        UnsupportedError: the model is built in another way.
    """

    def __init__(self, model: Any, share: float) -> None:
        layers = getattr(getattr(model, "encoder", None), "layer", None)
        if layers is None or not hasattr(layers[0], "attention") or not hasattr(layers[0].attention, "self"):
            raise UnsupportedError(
                f"ToMe is written here for models like BERT, and {type(model).__name__} is built in another way, so it "
                "cannot be compared. Leave tome out."
            )
        self.model, self.layers, self.share = model, layers, share
        self._handles: list[Any] = []

    def __enter__(self) -> Self:
        add = self._handles.append
        add(self.model.register_forward_pre_hook(self._begin, with_kwargs=True))
        add(self.model.encoder.register_forward_hook(self._end))
        for layer in self.layers:
            add(layer.attention.self.register_forward_pre_hook(self._attend, with_kwargs=True))
            add(layer.attention.self.key.register_forward_hook(self._listen))
            add(layer.attention.register_forward_hook(self._merge))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    # ---- hooks, in the order they are called

    def _begin(self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids = args[0] if args else kwargs["input_ids"]
        mask = kwargs.get("attention_mask")
        rows, columns = ids.shape
        self.lengths = [columns] * rows if mask is None else [int(n) for n in mask.sum(1).tolist()]
        self.counts = torch.tensor([round(self.share * n) for n in self.lengths], device=ids.device)
        self.sizes = (
            torch.ones(rows, columns, device=ids.device) if mask is None else mask.float()
        )  # [R, T]; 0: padding
        self.place = torch.arange(columns, device=ids.device).expand(rows, columns)  # [R, T]: where each token is now
        self.places: list[Tensor] = []  # [R, T] of each layer, for pictures
        self.bias: Tensor | None = None if mask is None or bool(mask.all()) else self._log_sizes()

    def _log_sizes(self) -> Tensor:
        return self.sizes.log().to(self.model.dtype)[:, None, None]

    def _attend(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, kwargs | {"attention_mask": self.bias}

    def _listen(self, module: Any, args: tuple[Any, ...], output: Tensor) -> None:
        self.keys = output

    def _merge(self, module: Any, args: tuple[Any, ...], output: Any) -> Any:
        """Merge what attention gave, [R, T, C], before the MLP sees it."""
        hidden, *others = output
        heads = module.self.num_attention_heads
        counts = [min(r, (n - 2) // 2) for r, n in zip(self.counts.tolist(), self.lengths, strict=True)]
        if max(counts) < 1:
            self.places.append(self.place)
            return output
        metric = self.keys.unflatten(-1, (heads, -1)).mean(2)
        target = match(metric, self.sizes > 0, torch.tensor(counts, device=hidden.device))
        self.lengths = [n - r for n, r in zip(self.lengths, counts, strict=True)]
        hidden, self.sizes, new = merge(hidden, self.sizes, target, max(self.lengths))
        self.place = new.gather(1, self.place)
        self.places.append(self.place)
        self.bias = self._log_sizes()
        return (hidden, *others)

    def _end(self, module: Any, args: tuple[Any, ...], output: Any) -> Any:
        hidden = output.last_hidden_state
        index = self.place[:, :, None].expand(-1, -1, hidden.shape[2])
        output.last_hidden_state = hidden.gather(1, index)
        return output


def match(metric: Tensor, valid: Tensor, counts: Tensor) -> Tensor:
    """Bipartite soft matching.

    Args:
        metric: [R, T, D] keys. valid: [R, T], the tokens first, padding after them. counts: [R] pairs to merge.

    Returns:
        [R, T] where each token goes: to itself, or to one of B.
    """
    rows, columns, _ = metric.shape
    unit = F.normalize(metric, dim=-1)
    places = torch.arange(columns, device=metric.device).expand(rows, columns)
    free = valid & (places > 0) & (places < valid.sum(1, keepdim=True) - 1)
    scores = unit[:, ::2] @ unit[:, 1::2].transpose(1, 2)  # [R, A, B]
    scores = scores.masked_fill(~(free[:, ::2, None] & free[:, None, 1::2]), -torch.inf)
    best, partner = scores.max(-1)
    rank = best.argsort(-1, descending=True).argsort(-1)
    target = places.clone()
    target[:, ::2] = torch.where(rank < counts[:, None], 2 * partner + 1, target[:, ::2])
    return target


def merge(hidden: Tensor, sizes: Tensor, target: Tensor, length: int) -> tuple[Tensor, Tensor, Tensor]:
    """Means of the tokens that go to one place, weighted by their sizes, in the order of those that stay.

    Args:
        hidden: [R, T, C]. sizes: [R, T], 0 for padding. target: [R, T] of `match`. length: tokens of the longest row
            afterwards.

    Returns:
        hidden [R, length, C], sizes [R, length], and [R, T] where each token is now.
    """
    rows, columns, channels = hidden.shape
    stays = (target == torch.arange(columns, device=target.device)) & (sizes > 0)
    new = (stays.cumsum(1) - 1).gather(1, target).clamp(max=length - 1)
    flat = (new + length * torch.arange(rows, device=new.device)[:, None]).flatten()
    weighted = hidden * sizes[:, :, None].to(hidden.dtype)
    sums = hidden.new_zeros(rows * length, channels).index_add_(0, flat, weighted.flatten(0, 1))
    total = sizes.new_zeros(rows * length).index_add_(0, flat, sizes.flatten())
    mean = sums / total.clamp(min=1)[:, None].to(sums.dtype)
    return mean.view(rows, length, channels), total.view(rows, length), new
