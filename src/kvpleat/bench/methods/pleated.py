"""kvpleat's own policies as methods, and one that is broken on purpose."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from kvpleat import Pleated, PleatedCache, attach
from kvpleat.bench.methods.base import Memory, Method, Session
from kvpleat.hf.models import LoadedModel
from kvpleat.policies import Policy
from kvpleat.policies.budget import allowed_pages, check_ratio, next_multiple
from kvpleat.types import Decision, KVShape, Phase, PolicyInput

LABELS = {
    "full": "Full",
    "window": "Window",
    "attention": "AttentionScore",
    "dms": "DMS",
    "fold": "Fold",
    "dmc": "DMC",
    "random": "random eviction (broken)",
}


class PleatedSession(Session):
    """A cache of an attached policy. The first session of an attachment detaches when it closes."""

    def __init__(self, pleated: Pleated, cache: PleatedCache, owns: bool) -> None:
        self.pleated = pleated
        self.cache = cache
        self._owns = owns

    def prefill(self, ids: Tensor) -> Tensor:
        return self.pleated.prefill(ids, cache=self.cache, chunk_size=self.chunk)

    def decode(self, ids: Tensor) -> Tensor:
        return self.pleated.continue_with(ids, cache=self.cache)

    def fork(self) -> "PleatedSession":
        return PleatedSession(self.pleated, self.cache.fork(), owns=False)

    def memory(self) -> Memory:
        report = self.cache.report()
        return Memory(
            full_bytes=report.full_bytes,
            allocated_bytes=report.allocated_bytes + report.overhead_bytes,
            claimed_bytes=report.allocated_bytes,
            kept=report.kept.tolist(),
        )

    def trim(self) -> None:
        self.cache.trim()

    def close(self) -> None:
        self.cache.release()
        if self._owns:
            self.pleated.detach()


class PleatedMethod(Method):
    """A policy of kvpleat."""

    family = "kvpleat"
    storage = "pages"

    def __init__(self, policy: Policy, spec: str) -> None:
        self.policy = policy
        self.spec = spec
        self.options = {k: v for k, v in policy.to_dict().items() if k != "name"}
        self.ratio = self.options.get("ratio")
        shown = [f"{self.ratio:g}x"] if self.ratio else []
        for option in filter(None, spec.partition(":")[2].split(",")):
            key, _, value = option.partition("=")
            if key != "ratio":
                shown.append(Path(value).name if key == "gates" else option)
        self.label = " ".join([LABELS.get(policy.name, policy.name), *shown])

    def open(self, loaded: LoadedModel) -> PleatedSession:
        pleated = attach(loaded.model, self.policy)
        return PleatedSession(pleated, pleated.new_cache(), owns=True)


@dataclass(frozen=True)
class RandomEviction(Policy):
    """Keep entries drawn at random, sinks and the latest 16 too often evicted with the rest.

    Broken on purpose: a judge that does not put it last cannot be trusted with the others. It is no policy of the
    library, and only the judge knows it.

    Args:
        ratio: compression ratio, reached at the end of each prompt and kept while decoding.
        seed: of the draw.
    """

    ratio: float = 4.0
    seed: int = 0

    name: ClassVar[str] = "random"
    summary: ClassVar[str] = "evicts at random"
    needs: ClassVar[str] = "nothing"
    guarantees: ClassVar[str] = "to be the worst"
    fields: ClassVar[tuple[str, ...]] = ("position",)
    uses_prompt_end: ClassVar[bool] = True
    interval: ClassVar[int] = 32

    def __post_init__(self) -> None:
        check_ratio(self.ratio)

    def moments(self, start: int, stop: int, phase: Phase, last: int, shape: KVShape) -> list[int]:
        if phase is Phase.PREFILL:
            return []
        return list(range(next_multiple(start, self.interval), stop + 1, self.interval))

    def decide(self, inputs: PolicyInput) -> Decision | None:
        reserve = next_multiple(inputs.position, self.interval) - inputs.position
        pages = allowed_pages(inputs.shape, inputs.position, self.ratio) // inputs.shape.num_streams
        room = max(1, pages * inputs.shape.page_size - reserve)
        generator = torch.Generator().manual_seed(1_000_003 * self.seed + 1009 * inputs.position + inputs.layer)
        noise = torch.rand(inputs.live.shape, generator=generator).to(inputs.live.device)
        ranks = torch.where(inputs.live, noise, -1.0).argsort(dim=1, descending=True).argsort(dim=1)
        return Decision(keep=inputs.live & (ranks < room), reserve=reserve)
