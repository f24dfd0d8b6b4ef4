"""When a policy decides about a row, for those that do so at moments: the end of its prompt, and token indices that the
policy names. Whole numbers on the host.

Moments follow from the length of the prompt and the policy alone. A chunk never goes past one, nor past the end of the
prompt, so that all of a step comes before the decision and all of the next one after it. A row that gave its pages up
feeds its prompt as a prompt again, and then what was generated in the phase of decoding, cut at the same moments: the
policy sees at each of them what it saw before.
"""

import functools
from bisect import bisect_right

import torch

from kvpleat.policies.base import Policy
from kvpleat.types import KVShape, Phase

FAR = 1 << 20  # tokens by which a policy that has moments names one


def decides(policy: Policy, shape: KVShape) -> bool:
    """Whether a policy looks at entries at moments. One whose moments only make room of what positions say already, is
    no such policy (see `engine.windows`)."""
    named = bool(policy.moments(0, FAR, Phase.DECODE, 0, shape))
    by_position = policy.visible_from(torch.zeros(1, dtype=torch.int32), shape) is not None
    return policy.uses_prompt_end or bool(policy.observation_window) or (named and not by_position)


class Calendar:
    """Moments of rows.

    Args:
        policy: one that decides at moments. shape: of the model.
    """

    def __init__(self, policy: Policy, shape: KVShape) -> None:
        self._policy, self._shape = policy, shape
        self._of_prompt = functools.lru_cache(4096)(self._in_prompt)

    def next(self, prompt: int, start: int, stop: int) -> int:
        """Where a chunk from `start` on, which may go to `stop`, has to end, in a row whose prompt has `prompt`
        tokens."""
        found = self._between(prompt, start, min(stop, prompt) if start < prompt else stop)
        return found[0] if found else min(stop, prompt) if start < prompt else stop

    def falls_on(self, prompt: int, position: int) -> bool:
        """Whether there is a moment once so many tokens were fed."""
        return bool(self._between(prompt, position - 1, position))

    def last(self, prompt: int, position: int) -> int:
        """The last moment up to `position`; 0: there was none."""
        if position > prompt:
            found = self._decoding(prompt, prompt, position)
            if found:
                return found[-1]
        earlier = self._of_prompt(prompt)
        number = bisect_right(earlier, position)
        return earlier[number - 1] if number else 0

    def _between(self, prompt: int, start: int, stop: int) -> list[int]:
        """Moments m with start < m <= stop, on one side of the prompt's end."""
        if start < prompt:
            return [moment for moment in self._of_prompt(prompt) if start < moment <= stop]
        return self._decoding(prompt, start, stop)

    def _decoding(self, prompt: int, start: int, stop: int) -> list[int]:
        return self._policy.moments(start, stop, Phase.DECODE, prompt, self._shape)

    def _in_prompt(self, prompt: int) -> list[int]:
        found = self._policy.moments(0, prompt, Phase.PREFILL, 0, self._shape)
        ends = self._policy.uses_prompt_end and prompt not in found
        return [*found, prompt] if ends else found
