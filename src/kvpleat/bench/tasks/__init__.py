"""Quality tasks by name. Add one by writing a Task and naming it here."""

from kvpleat.bench.tasks.base import FORMS, Item, Observation, Source, Task, Trial
from kvpleat.bench.tasks.continuation import Continuation
from kvpleat.bench.tasks.generation import Generation
from kvpleat.bench.tasks.memory import ProcessMemory
from kvpleat.bench.tasks.multiturn import Drift, MultiTurn
from kvpleat.bench.tasks.qa import QuestionAnswering
from kvpleat.bench.tasks.retrieval import MultiKey, PassKey
from kvpleat.bench.tasks.ruler import CommonWords, FrequentWords, VariableTracking
from kvpleat.errors import OptionError

__all__ = ["FORMS", "Item", "Observation", "Source", "Task", "Trial", "parse_list", "registry"]


def registry() -> dict[str, Task]:
    """All tasks by name, in the order of a report."""
    kinds = (
        Continuation,
        PassKey,
        MultiKey,
        VariableTracking,
        CommonWords,
        FrequentWords,
        QuestionAnswering,
        MultiTurn,
        Drift,
        Generation,
        ProcessMemory,
    )
    return {kind.name: kind() for kind in kinds}


def parse_list(text: str) -> list[Task]:
    """Tasks from "T,T,..."; "all" stands for every one."""
    known = registry()
    names = list(known) if text == "all" else [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in known:
            raise OptionError(f"--tasks {name}: there is no such task. Known: {', '.join(known)}; all.")
    if not names:
        raise OptionError(f"--tasks {text!r} names no task. Known: {', '.join(known)}; all.")
    return [known[name] for name in dict.fromkeys(names)]
