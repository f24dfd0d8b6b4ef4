"""`kvpleat eval` from the outside: what it lists and refuses, and what lm-eval's tasks and weights leave in a file."""

import json
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from kvpleat.bench import methods, tasks
from kvpleat.cli import app
from tests.bench import byte_model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The byte model as save_pretrained writes it."""
    loaded = byte_model.load()
    loaded.model.save_pretrained(tmp_path / "bytes")
    loaded.tokenizer.save_pretrained(tmp_path / "bytes")
    return tmp_path / "bytes"


def invoke(*arguments: str) -> Result:
    """Run the command in this process."""
    result: Result = CliRunner().invoke(app, ["eval", *arguments])
    return result


def test_list_names_everything() -> None:
    """Without loading a model."""
    text = invoke("--list").stdout
    assert all(name in text for name in [*methods.known(), *tasks.registry()])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--tasks", "nothing"), "no such task"),
        (("--policy", "nothing"), "no such policy"),
        (("--shard", "4/4"), "pass i/n"),
        (("--shard", "one"), "pass i/n"),
        (("--lengths", "long"), "--lengths"),
        (("--lengths", "100"), "at least 512"),
        (("--forms", "before"), "form 'before'"),
        (("--weights", "int3"), "int3"),
    ],
)
def test_refusals(folder: Path, arguments: tuple[str, str], message: str) -> None:
    """Exit status 2 and one paragraph, before anything is measured."""
    result = invoke("--model", str(folder), *arguments)
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.split())


def test_weights_make_a_matrix(folder: Path, tmp_path: Path) -> None:
    """Each kind of weights with each method, differences to its own full cache, and the bytes of the weights."""
    out = tmp_path / "out.json"
    options = ("--tasks", "continuation", "--lengths", "1024", "--count", "2", "--policy", "window:ratio=4")
    result = invoke("--model", str(folder), *options, "--weights", "full,pruned50", "--out", str(out))
    assert result.exit_code == 0, result.stderr
    content = json.loads(out.read_text())
    cells = {(r["weights"], r["method"]) for r in content["records"]}
    assert cells == {(w, m) for w in ("full", "pruned50") for m in ("dynamic", "window:ratio=4")}
    assert content["model"]["weights_bytes"]["full"] == content["model"]["weights_bytes"]["pruned50"]  # zeros take room
    losses = {(r["weights"], r["method"], r["item"]): r["scores"]["nll"] for r in content["records"]}
    item = content["records"][0]["item"]
    assert losses["full", "dynamic", item] != losses["pruned50", "dynamic", item]


def test_lm_eval_tasks_become_records(folder: Path, tmp_path: Path) -> None:
    """A task of our own, offline: one record for each question and method, paired by its name."""
    pytest.importorskip("lm_eval")
    (tmp_path / "tasks").mkdir()
    rows = [{"question": f"{i} and one more is", "choices": [str(i + 1), "no"], "answer": 0} for i in range(5)]
    (tmp_path / "tasks" / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "tasks" / "sums.yaml").write_text(
        "task: sums\ndataset_path: json\ndataset_kwargs:\n  data_files:\n"
        f"    test: {tmp_path / 'tasks' / 'rows.jsonl'}\n"
        "test_split: test\noutput_type: multiple_choice\ndoc_to_text: question\ndoc_to_target: answer\n"
        "doc_to_choice: choices\nmetric_list:\n  - metric: acc\n"
    )
    out = tmp_path / "out.json"
    result = invoke(
        *("--model", str(folder), "--tasks", "continuation", "--lengths", "1024", "--count", "2"),
        *("--policy", "full,window:budget=64", "--lm-eval", "sums", "--lm-eval-path", str(tmp_path / "tasks")),
        *("--out", str(out)),
    )
    assert result.exit_code == 0, result.stderr
    records = [r for r in json.loads(out.read_text())["records"] if r["task"] == "lm-eval sums"]
    found = {(r["method"], r["item"]): r["scores"]["acc"] for r in records}
    assert len(found) == len(records) == 3 * 2  # --count items for each of three methods
    items = {item for _, item in found}
    assert {(m, i) for m in ("dynamic", "full", "window:budget=64") for i in items} == set(found)
    assert all(found["dynamic", item] == found["full", item] for item in items)
