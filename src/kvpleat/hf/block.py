"""What is put on a model inside a `with` block: the block's two ends, the same for all that is attached."""

from abc import ABC, abstractmethod
from types import TracebackType
from typing import Self

from kvpleat.errors import AttachError

SHARED_CONFIG = (
    "Another model with a policy attached shares this model's config object, so both would use the other's attention. "
    "Give each model its own config (copy.deepcopy) or detach the other first."
)


class Attachment(ABC):
    """Something that is attached to a model until `detach`."""

    _entered = False

    @property
    @abstractmethod
    def attached(self) -> bool:
        """Whether it acts on the model now."""

    @abstractmethod
    def attach(self) -> Self:
        """Put it on the model."""

    @abstractmethod
    def detach(self) -> None:
        """Take it off. Twice is no error."""

    def __enter__(self) -> Self:
        if self._entered:
            raise AttachError("This `with` block is open already; the inner one would detach it. Open one at a time.")
        if not self.attached:
            self.attach()
        self._entered = True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._entered = False
        self.detach()
