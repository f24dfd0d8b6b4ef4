"""The page: what it holds, that it is one safe file, that its numbers are the summary's, and what is refused."""

import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from kvpleat.bench import report
from kvpleat.bench.records import Record, ResultFile
from kvpleat.bench.report import words
from kvpleat.bench.report.charts import nice_axis
from kvpleat.bench.report.html import Html, el
from kvpleat.bench.report.tables import Cell, Table
from kvpleat.bench.summary import summarize
from kvpleat.cli import app
from kvpleat.errors import OptionError
from tests.bench import synthetic

VOID = {"meta", "br"}
FEW = [m for m in synthetic.methods((4.0,)) if m["spec"].partition(":")[0] in ("dynamic", "attention", "h2o", "kvzip")]


class Tree(HTMLParser):
    """Reads a page strictly: every element is closed where it must be. Collects tables, headings and attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tables: dict[str, list[list[str]]] = {}
        self.headings: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self._caption = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self._caption = ""
        if tag == "tr":
            self.tables.setdefault(self._caption, []).append([])
        if tag in ("td", "th"):
            self.tables[self._caption][-1].append("")
        if tag == "h2":
            self.headings.append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "caption" in self.open:
            self._caption += data
        elif {"td", "th"} & set(self.open):
            self.tables[self._caption][-1][-1] += data + "\n"
        elif "h2" in self.open:
            self.headings[-1] += data


def read(page: str) -> Tree:
    """A page, parsed to the end."""
    tree = Tree()
    tree.feed(page)
    tree.close()
    assert tree.open == []
    return tree


def build(*files: ResultFile) -> str:
    """The page of some files."""
    return report.page(report.merge(files, [f"{i}.json" for i in range(len(files))]))


@pytest.fixture(scope="module")
def both() -> report.Results:
    """An evaluation with two kinds of weights and a benchmark."""
    files = [synthetic.eval_file(FEW, items=3, weights=("full", "int8")), synthetic.bench_file(FEW)]
    return report.merge(files, ["eval.json", "bench.json"])


@pytest.fixture(scope="module")
def page(both: report.Results) -> str:
    """The page of `both`."""
    return report.page(both)


def test_every_section_is_there_in_order(page: str) -> None:
    assert read(page).headings == [
        "Best at equal allocated bytes",
        "Quality against memory",
        "Figures",
        "Retrieval by depth and length",
        "What is kept, by layer and KV head",
        "Turn by turn",
        "Along a generation",
        "Memory over time",
        "Speed",
        "Weights and methods together",
        "How to read this",
        "How to reproduce it",
    ]


def test_one_file_that_fetches_nothing(page: str) -> None:
    tree = read(page)
    assert "http://" not in page
    assert "https://" not in page
    assert "@import" not in page
    assert "url(" not in page
    assert not {"link", "img", "iframe", "object"} & {tag for tag, _ in tree.tags}
    assert not {"src", "href", "onclick", "srcset"} & {name for _, attributes in tree.tags for name in attributes}


def test_drawings_are_well_formed(page: str) -> None:
    drawings = re.findall(r"<svg.*?</svg>", page, re.DOTALL)
    assert len(drawings) > 20
    for drawing in drawings:
        ET.fromstring(drawing)
        assert not re.search(r'="(-?nan|-?inf)', drawing)


def test_figures_of_the_tables_are_the_summarys(both: report.Results, page: str) -> None:
    tables = read(page).tables
    rows = [row for row in summarize(both.main_records) if row.task == "continuation"]
    assert len(rows) == 3 * len(FEW)
    names = {made["spec"]: made["label"] for made in FEW}
    for row in rows:
        (head, *body) = tables["Continuing a text"]
        column = [name.strip() for name in head].index(row.metric.label)
        (line,) = (line for line in body if line[0].split("\n")[0] == names[row.method])
        figure, interval, *change = line[column].strip().split("\n")
        assert figure == row.metric.text(row.value.value)
        assert interval.strip("[]").split(", ")[1] == row.metric.text(row.value.high)
        assert (change == []) == (row.difference is None)
        if row.difference is not None:
            text = row.metric.difference_text(row.difference.value).replace("-", "\N{MINUS SIGN}")
            assert change[0].startswith(text + " [")


def test_every_table_of_the_page_is_in_the_markdown(both: report.Results, page: str) -> None:
    text = report.markdown(both)
    titles = re.findall(r"^### (.*)$", text, re.MULTILINE)
    assert set(titles) == {title.replace("&", "&amp;") for title in read(page).tables}
    for block in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        lines = block.splitlines()
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in lines}) == 1
        assert re.fullmatch(r"\| --- (\| ---: )+\|", lines[1])
    assert "| **AttentionScore 4x** |" in text
    assert "KVzip 4x (mask only)" in text


def test_masks_are_drawn_hollow_at_what_they_allocate_and_marked(page: str) -> None:
    assert "mark hollow" in page
    assert "Hollow: the method masks only" in page
    assert "masks only: it claims" in page
    rows = read(page).tables["Memory"]
    (masked,) = (row for row in rows if row[0].startswith("KVzip"))
    assert masked[0].split("\n")[1] == "mask only"
    assert [cell.strip() for cell in masked[3:5]] == ["4.00x", "1.00x"]
    without = [made for made in FEW if made["storage"] != "mask only"]
    assert "Hollow" not in build(synthetic.eval_file(without, items=2))


def test_a_refused_speed_says_why_and_gives_none(page: str) -> None:
    rows = [row for row in read(page).tables["Speed"] if row[0].startswith("H2O") and row[2].strip() == "8,192"]
    assert len(rows) == 2
    for row in rows:
        assert len(row) == 4
        assert row[3].strip() == "refused: logits differ from DynamicCache by 0.4 (allowed 0.001)"


def test_hostile_names_stay_text() -> None:
    evil = '</title><script>alert("1")</script>&amp;\'|x|](y)`<b>'
    listed = [dict(made) for made in FEW]
    listed[1]["label"] = evil
    content = synthetic.eval_file(listed, items=2)
    bench = synthetic.bench_file(listed)
    for made in content, bench:
        made.model = synthetic.model(name=evil)
        made.command = made.environment["machine"] = evil
    bench.records[0]["refused"] = evil
    for entry in content.records:
        if entry.task == "qa":
            entry.task = entry.group["form"] = evil
    results = report.merge([content, bench], [evil, evil])
    page = report.page(results)
    tree = read(page)
    assert [tag for tag, _ in tree.tags].count("script") == 1
    assert evil not in page
    assert 'alert("' not in page
    assert "&lt;script&gt;alert(&quot;1&quot;)&lt;/script&gt;" in page
    text = report.markdown(results)
    assert "<script" not in text
    assert not re.search(r"\]\(", text)


def test_empty_and_partial_results() -> None:
    empty = read(build(synthetic.file("eval", [], FEW)))
    assert empty.headings == ["How to read this", "How to reproduce it"]
    assert read(build(synthetic.file("bench", [], FEW))).headings == empty.headings
    bench = read(build(synthetic.bench_file(FEW, batches=(1,), contexts=(2048,))))
    assert bench.headings[:2] == ["Memory over time", "Speed"]
    bare = {"method": "dynamic", "batch": 1, "context": 64}
    assert "Speed" in read(build(synthetic.file("bench", [bare], FEW))).headings


def test_one_method_alone() -> None:
    content = synthetic.eval_file(FEW[1:2], items=2)
    tree = read(build(content))
    assert FEW[1]["label"] in tree.tables["Retrieval"][1][0]
    reference = read(build(synthetic.eval_file(FEW[:1], items=1)))
    assert "Quality against memory" not in reference.headings
    assert (
        "one item, no interval" in "".join(reference.tables["Many turns"][1])
        if "Many turns" in reference.tables
        else True
    )


def test_missing_metrics_are_dashes_and_new_tasks_have_a_table() -> None:
    def made(method: str, item: str, scores: dict[str, float], task: str = "qa") -> Record:
        memory = {"full_bytes": 100, "allocated_bytes": 50, "claimed_bytes": 50}
        return Record(task, item, {}, method, scores, memory)

    records = [made("dynamic", "a", {"f1": 0.5, "exact": 1.0}), made("attention:ratio=4", "a", {"f1": 0.5})]
    records += [made("attention:ratio=4", "b", {"acc": 0.25}, "arc"), made("dynamic", "c", {}, "nothing")]
    tables = read(build(synthetic.file("eval", records, FEW))).tables
    (head, _, ours) = tables["Questions and conversations"]
    assert [name.strip() for name in head[3:]] == ["F1", "exact match"]
    assert ours[4].strip() == "\N{EN DASH}"
    assert [name.strip() for name in tables["Other tasks"][0][3:]] == ["arc, acc"]
    assert tables["Other tasks"][1][3].split("\n")[0] == "0.25"


def test_weights_are_compared_with_the_full_cache_at_full_weights(page: str, both: report.Results) -> None:
    rows = read(page).tables["Continuing a text, perplexity"]
    assert [name.strip() for name in rows[0]] == ["method", "full", "int8"]
    expected = summarize(both.records, reference_weights="full")
    (row,) = (
        row
        for row in expected
        if (row.task, row.weights, row.method, row.metric.name) == ("continuation", "int8", "dynamic", "perplexity")
    )
    assert row.difference is not None
    (line,) = (line for line in rows if line[0].startswith("DynamicCache"))
    assert words.difference_words(row) in line[2]
    assert "cache + 209.8 MiB weights" in line[2]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": synthetic.model(name="other")}, "model name 'other'"),
        ({"model": synthetic.model(dtype="bfloat16")}, "model dtype 'bfloat16'"),
        ({"methods": [dict(FEW[0], storage="pages"), *FEW[1:]]}, "dynamic has other options in b.json"),
        ({"methods": []}, "do not say what that is"),
        ({}, "is in a.json and again in b.json"),
    ],
)
def test_files_that_cannot_be_merged(change: dict[str, Any], message: str) -> None:
    entry = Record("qa", "qa/1", {}, "dynamic", {"f1": 1.0}, {})
    first = synthetic.file("eval", [] if change.get("methods") == [] else [entry], FEW)
    if change.get("methods") == []:
        first.methods = []
    with pytest.raises(OptionError, match=message):
        report.merge([first, synthetic.file("eval", [entry], FEW, **({"methods": FEW} | change))], ["a.json", "b.json"])
    with pytest.raises(OptionError, match="nothing to report"):
        report.merge([], [])


def test_elements_escape_text_and_attributes_and_keep_markup() -> None:
    assert el("p", "<&", Html("<b>x</b>"), title='"<', data_x=None, width=2.0) == (
        '<p title="&quot;&lt;" width="2">&lt;&amp;<b>x</b></p>'
    )
    assert el("circle", cx=0.0, cy=1.234, r=100) == '<circle cx="0" cy="1.23" r="100"></circle>'


def test_axes_have_round_ticks_around_the_values() -> None:
    axis = nice_axis("y", [0.013, 0.088], lambda value: f"{value:.3g}")
    assert [text for _, text in axis.ticks] == ["0", "0.02", "0.04", "0.06", "0.08", "0.1"]
    for values in ([], [0.0], [5.0, 5.0], [-3.0, 2.0], [1e-9, 2e-9]):
        axis = nice_axis("y", values, str)
        assert axis.low < axis.high
        assert all(axis.low <= value <= axis.high for value in values)
        assert 2 <= len(axis.ticks) <= 8


def test_markdown_cells_cannot_break_the_table() -> None:
    table = Table("a|b", ["m|", "x"], [("na*me\n|", "", False, [Cell("1|2", ["[0, 1]"])])])
    assert table.markdown().splitlines()[2:] == [r"| m\| | x |", "| --- | ---: |", r"| na\*me \| | 1\|2; [0, 1] |"]


def test_command(tmp_path: Path) -> None:
    paths = [tmp_path / "eval.json", tmp_path / "bench.json"]
    synthetic.eval_file(FEW, items=2).write(paths[0])
    synthetic.bench_file(FEW).write(paths[1])
    out, table = tmp_path / "page.html", tmp_path / "table.md"
    done = CliRunner().invoke(app, ["report", *map(str, paths), "--out", str(out), "--markdown", str(table)])
    assert done.exit_code == 0, done.stderr
    assert done.stdout.split() == [str(out), str(table)]
    assert read(out.read_text(encoding="utf-8")).headings
    assert table.read_text(encoding="utf-8").startswith("### Best method at equal allocated bytes")
    (tmp_path / "broken.json").write_text("{}")
    for bad in (
        [str(tmp_path / "broken.json"), "--out", str(out)],
        [str(paths[1]), "--out", str(tmp_path / "no" / "x")],
    ):
        done = CliRunner().invoke(app, ["report", *bad])
        assert done.exit_code == 2
        assert "error:" in done.stderr
