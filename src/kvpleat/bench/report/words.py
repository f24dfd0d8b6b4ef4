"""Names of tasks, forms and figures for people, and which figures are plotted."""

from collections.abc import Callable, Sequence

from kvpleat.bench.metrics import Interval
from kvpleat.bench.summary import Group, Row

TASKS = {
    "continuation": "Continuing a text",
    "passkey": "Pass key",
    "multikey": "One key of many",
    "vt": "Variable tracking",
    "cwe": "Common words",
    "fwe": "Frequent words",
    "qa": "Question answering",
    "multiturn": "Many turns",
    "drift": "Drift over turns",
    "generation": "Long generation",
}
FORMS = {"known": "asked before compressing", "after": "asked after compressing"}
# Tables of tasks that belong together; every other task has its place in the last one.
TABLES = {
    "Continuing a text": ("continuation",),
    "Retrieval": ("passkey", "multikey"),
    "Lists and chains (RULER)": ("vt", "cwe", "fwe"),
    "Questions and conversations": ("qa", "multiturn"),
    "Long generation and drift": ("generation", "drift"),
}
# Metrics that get a plot against memory; of other tasks the first one does.
PLOTS = {
    "continuation": ("perplexity", "kl"),
    "qa": ("f1",),
    "multiturn": ("f1",),
    "drift": ("kl",),
    "generation": ("kl", "repeated"),
}


def task_name(task: str) -> str:
    """A task for people; its own name where it is unknown."""
    return TASKS.get(task, task)


def task_place(task: str) -> int:
    """Where a task stands among all; unknown ones come last."""
    return list(TASKS).index(task) if task in TASKS else len(TASKS)


def group_name(group: Group) -> str:
    """The keys of a group for people: "asked after compressing", "length 4096"."""
    return ", ".join(FORMS.get(str(value), str(value)) if key == "form" else f"{key} {value}" for key, value in group)


def measure_name(row: Row) -> str:
    """Task, metric and group: "Pass key, accuracy, asked after compressing"."""
    return ", ".join(filter(None, (task_name(row.task), row.metric.label, group_name(row.group))))


def value_words(row: Row) -> tuple[str, str]:
    """A figure and its interval."""
    return row.metric.text(row.value.value), interval_words(row.metric.text, row.value, row.certain)


def difference_words(row: Row) -> str:
    """The paired difference to the reference with its interval, minus signs typeset; nothing where there is none."""
    if row.difference is None:
        return ""
    text = row.metric.difference_text
    change = f"{text(row.difference.value)} {interval_words(text, row.difference, row.certain)}"
    return change.replace("-", "\N{MINUS SIGN}")


def interval_words(text: Callable[[float], str], interval: Interval, certain: bool) -> str:
    """ "[low, high]", units said once; or that one item gives no interval."""
    if not certain:
        return "one item, no interval"
    low, high = text(interval.low), text(interval.high)
    for unit in (" pp", "%"):
        if low.endswith(unit):
            low = low.removesuffix(unit)
    return f"[{low}, {high}]"


def verdict(row: Row) -> str:
    """ "bad" or "good" where the paired interval lies on one side of 0, else nothing."""
    if row.difference is None or not row.certain:
        return ""
    if row.difference.low <= 0 <= row.difference.high:
        return ""
    worse = row.metric.worse_by(row.difference.value)
    return "bad" if worse > 0 else "good" if worse < 0 else ""


def tokens_name(count: float) -> str:
    """A number of tokens on an axis: 512, 2k, 1.5k."""
    return f"{count / 1024:g}k" if count >= 1024 and count % 512 == 0 else f"{count:g}"


def joined(names: Sequence[str]) -> str:
    """ "a", "a and b", "a, b and c"."""
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1]))) if names else ""
