"""Memory: what a fresh process takes for a prompt, so that no method is believed about its own size."""

from typing import ClassVar

from kvpleat.bench.memory import process_memory
from kvpleat.bench.tasks.base import Item, Observation, Source, Task, Trial


class ProcessMemory(Task):
    """Bytes of a process of its own around one prompt of each length: see kvpleat.bench.memory."""

    name: ClassVar[str] = "memory"
    summary: ClassVar[str] = "bytes that a fresh process takes for one prompt, after compression and at the peak"
    any_weights: ClassVar[bool] = False

    def items(self, source: Source) -> list[Item]:
        items = []
        for length in source.lengths:
            ((_, tokens),) = source.windows(length - len(source.start), 1, salt=5)
            items.append(Item(f"{self.name}/{length}", {"length": length}, source.start + tokens))
        return items

    def measure(self, item: Item, trial: Trial) -> list[Observation]:
        model = trial.loaded.model
        dtype = str(model.dtype).removeprefix("torch.")
        figures = process_memory(
            trial.loaded.name,
            trial.method.spec,
            trial.tensor(item.content),
            dtype=dtype,
            device=str(model.device),
            chunk=None,
        )
        held = {name: figures[name] for name in ("full_bytes", "allocated_bytes", "claimed_bytes")}
        return [Observation({name: float(count) for name, count in figures.items()}, held)]
