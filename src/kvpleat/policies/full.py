"""No compression: transformers' own cache, in pages."""

from dataclasses import dataclass
from typing import ClassVar

from kvpleat.policies.base import Policy
from kvpleat.types import Decision, KVShape, Phase, PolicyInput


@dataclass(frozen=True)
class Full(Policy):
    """Keep every entry. The measure of all other policies, and with `bits` what quantising alone does."""

    name: ClassVar[str] = "full"
    summary: ClassVar[str] = "keeps every entry"
    needs: ClassVar[str] = "nothing"
    guarantees: ClassVar[str] = "the tokens of transformers' own cache, unless bits are given; every entry stays"

    def moments(self, start: int, stop: int, phase: Phase, last: int, shape: KVShape) -> list[int]:
        return []

    def decide(self, inputs: PolicyInput) -> Decision | None:
        return None
