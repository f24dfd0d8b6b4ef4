"""From tokens to text while they come: never half a character, and nothing that may yet turn out to be a stop string.

What comes out depends on the tokens alone, not on how they were handed over: a stop string is found where it would be
if the text came character by character, wherever the borders of tokens are.
"""

from collections.abc import Sequence
from typing import Any

from kvpleat.engine.params import SamplingParams

_UNDECIDED = "\ufffd"  # what decoders put where bytes are no character, or not yet
_CONTEXT = 6  # tokens of the prompt that the first generated one is decoded with: a leading space depends on it
_WINDOW = 24  # tokens that are decoded again with each new one, at most, if characters come at all
_PATIENCE = 64  # tokens without a character after which bytes are taken for what they are: none


class Detokenizer:
    """Text of a growing sequence of tokens, each character as soon as it is certain.

    Tokens are decoded with a few of those before them, because decoders look at their neighbours: whether a space
    leads, which bytes make a character. What a decoder replaces at the end of a text is not certain and waits; what
    still waits when the sequence ends never comes.

    Args:
        tokenizer: of transformers.
        prompt: the tokens before the first one.
        skip_special_tokens: whether special tokens have no text.
    """

    def __init__(self, tokenizer: Any, prompt: Sequence[int], skip_special_tokens: bool = True) -> None:
        self._tokenizer, self._skip = tokenizer, skip_special_tokens
        # The first tokens may be the rest of a character and the last ones the beginning of one, of up to 3 bytes; for
        # some decoders no byte beside those is text then.
        for size in range(_CONTEXT, _CONTEXT + 4):
            self._ids = list(prompt[-size:])
            text = self._decode(self._ids)
            ends = [text, *(self._decode(self._ids[:-cut]) for cut in (1, 2, 3) if text.endswith(_UNDECIDED))]
            certain = max((end.rstrip(_UNDECIDED) for end in ends), key=len)
            if certain and not certain.startswith(_UNDECIDED):
                break
        self._given = len(certain)  # characters of what self._ids decode to that are out already
        self._certain = self._before = len(self._ids) if certain == text else 0
        self._waiting = 0  # tokens since the last character

    def add(self, token: int) -> str:
        """The characters that this token makes certain."""
        self._ids.append(token)
        text = self._decode(self._ids)
        certain = text.rstrip(_UNDECIDED)
        fresh = certain[self._given :]
        if not fresh:
            self._waiting += 1
            return self._give_up() if self._waiting > _PATIENCE else ""
        self._given, self._waiting = len(certain), 0
        if len(certain) == len(text):  # a border of characters as well as of tokens: decoding may start here later
            self._before, self._certain = self._certain, len(self._ids)
            if len(self._ids) > _WINDOW:
                self._ids = self._ids[self._before :]
                self._given = len(self._decode(self._ids))
                self._before, self._certain = 0, len(self._ids)
        return fresh

    def _give_up(self) -> str:
        """Bytes that are no characters, as the decoder writes them. The last three could still begin one."""
        fresh = self._decode(self._ids[:-3])[self._given :]
        self._ids = self._ids[-3:]
        self._given = self._before = self._certain = self._waiting = 0
        return fresh

    def _decode(self, ids: list[int]) -> str:
        return str(
            self._tokenizer.decode(ids, skip_special_tokens=self._skip, clean_up_tokenization_spaces=False)
            if ids
            else ""
        )


class OutputText:
    """The text of one sample: detokenised, searched for stop strings, handed out piece by piece.

    Args:
        tokenizer: of transformers; not used where `params.detokenize` is False.
        prompt: tokens before the first one.
        params: of the request.

    Attributes:
        stop: the stop string that was found, or None. Nothing is added after it.
    """

    def __init__(self, tokenizer: Any, prompt: Sequence[int], params: SamplingParams) -> None:
        self.stop: str | None = None
        self._decoder = Detokenizer(tokenizer, prompt, params.skip_special_tokens) if params.detokenize else None
        self._stops = params.stop_strings
        self._includes_stop = params.include_stop_str_in_output
        self._exempt_tokens = params.min_tokens  # in whose text no stop string may end
        self._exempt = 0  # characters of the held ones that are of these tokens
        self._held = ""  # what may be the beginning of a stop string
        self._taken: list[str] = []
        self._fresh: list[str] = []

    def add(self, token_ids: Sequence[int]) -> int:
        """Take new tokens.

        Returns:
            How many of them belong to the sample: all, or those up to the one that completed a stop string.
        """
        for count, token in enumerate(token_ids, start=1):
            self._held += self._decoder.add(token) if self._decoder is not None else ""
            self._exempt_tokens -= 1
            if self._exempt_tokens >= 0:
                self._exempt = len(self._held)
            elif found := self._find():
                start, end, self.stop = found
                self._release(end if self._includes_stop else start)
                self._held = ""
                return count
            self._release(len(self._held) - self._possible())
        return len(token_ids)

    def finish(self) -> None:
        """No token follows, so what was held back is no stop string."""
        self._release(len(self._held))

    def take(self) -> str:
        """The text that came since the last call."""
        fresh = "".join(self._fresh)
        self._taken.append(fresh)
        self._fresh = []
        return fresh

    @property
    def text(self) -> str:
        """All text so far, without what is held back."""
        self.take()
        self._taken = ["".join(self._taken)]
        return self._taken[0]

    def _release(self, count: int) -> None:
        if count:
            self._fresh.append(self._held[:count])
            self._held = self._held[count:]
            self._exempt = max(self._exempt - count, 0)

    def _find(self) -> tuple[int, int, str] | None:
        """Start, end and string of the stop string that is complete first; of several that end there, the longest.

        The held text holds all of it: its beginning could have become one ever since.
        """
        ends = []
        for stop in self._stops:
            start = self._held.find(stop, max(self._exempt - len(stop) + 1, 0))
            if start >= 0:
                ends.append((start + len(stop), start, stop))
        if not ends:
            return None
        end, start, stop = min(ends)
        return start, end, stop

    def _possible(self) -> int:
        """Characters at the end of the held text that could be the beginning of a stop string: the most of them."""
        longest = 0
        for stop in self._stops:
            for count in range(min(len(stop) - 1, len(self._held)), longest, -1):
                if self._held.endswith(stop[:count]):
                    longest = count
                    break
        return longest
