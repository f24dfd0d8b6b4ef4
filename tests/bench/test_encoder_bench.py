"""The judge of encoders: ToMe beside a plain one, what is timed and asked, and that all of it runs."""

import importlib
import json
import re
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import GPT2Config, GPT2Model

from kvpleat.bench.encoder import __main__ as command
from kvpleat.bench.encoder import check, figures, methods, quality, speed, texts, turns
from kvpleat.bench.encoder.memory import peak_bytes
from kvpleat.bench.encoder.tome import ToMe
from kvpleat.bench.report import encoders as report
from kvpleat.bench.report.merged import draw
from kvpleat.cli import app
from kvpleat.errors import JudgeError, OptionError, UnsupportedError
from kvpleat.hf import embed
from kvpleat.hf.models import LoadedModel, load_encoder
from kvpleat.kernels import grouping, sized
from tests import encoders


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return encoders.save(tmp_path / "bert")


@pytest.fixture
def loaded(folder: Path) -> LoadedModel:
    return load_encoder(str(folder), device="cpu", progress=False)


def rows(*lengths: int, seed: int = 0) -> list[list[int]]:
    """Texts of random words between CLS and SEP."""
    generator = torch.Generator().manual_seed(seed)
    return [[2, *torch.randint(4, 64, (n - 2,), generator=generator).tolist(), 3] for n in lengths]


# ---- ToMe


def plain_tome(model: Any, ids: list[int], share: float) -> Tensor:
    """Last hidden states [T, C] of one text under ToMe, token by token and without hooks."""
    x = model.embeddings(input_ids=torch.tensor([ids]))[0]
    sizes, members = [1.0] * len(ids), [[i] for i in range(len(ids))]
    r = round(share * len(ids))
    for layer in model.encoder.layer:
        inner, heads = layer.attention.self, layer.attention.self.num_attention_heads
        q, k, v = (f(x).unflatten(-1, (heads, -1)).transpose(0, 1) for f in (inner.query, inner.key, inner.value))
        logits = q @ k.transpose(1, 2) / q.shape[-1] ** 0.5 + torch.tensor(sizes).log()
        x = layer.attention.output((logits.softmax(-1) @ v).transpose(0, 1).flatten(1), x)
        x, sizes, members = _merged(x, sizes, members, k.mean(0), min(r, (len(sizes) - 2) // 2))
        x = layer.feed_forward_chunk(x)
    out = torch.zeros(len(ids), x.shape[1])
    for place, tokens in enumerate(members):
        out[tokens] = x[place]
    return out


def _merged(
    x: Tensor, sizes: list[float], members: list[list[int]], keys: Tensor, r: int
) -> tuple[Tensor, list[float], list[list[int]]]:
    last = len(sizes) - 1
    pairs = []
    for a in range(2, last, 2):
        similar = [(float(F.cosine_similarity(keys[a], keys[b], dim=0)), b) for b in range(1, last, 2)]
        pairs.append((*max(similar), a))
    sums = [state * size for state, size in zip(x, sizes, strict=True)]
    sizes, members, gone = list(sizes), [list(m) for m in members], set()
    for _, b, a in sorted(pairs, reverse=True)[:r]:
        sums[b] = sums[b] + sums[a]
        sizes[b] += sizes[a]
        members[b] += members[a]
        gone.add(a)
    stay = [i for i in range(len(sizes)) if i not in gone]
    return torch.stack([sums[i] / sizes[i] for i in stay]), [sizes[i] for i in stay], [members[i] for i in stay]


@pytest.mark.parametrize("share", [0.05, 0.11, 0.25, 0.45])
@pytest.mark.parametrize("seed", [0, 1])
@torch.inference_mode()
def test_tome_is_the_plain_one_alone_and_padded(share: float, seed: int) -> None:
    model, given = encoders.bert(layers=4, seed=seed), rows(23, 40, 7, 3, 2, 12, seed=seed)
    batch = embed.batch_of(given, list(range(len(given))), 0, torch.device("cpu"))
    with ToMe(model, share):
        together = model(input_ids=batch.ids, attention_mask=batch.mask).last_hidden_state
        alone = [model(input_ids=torch.tensor([row])).last_hidden_state[0] for row in given]
    for row, ids in enumerate(given):
        wanted = plain_tome(model, ids, share)
        torch.testing.assert_close(alone[row], wanted, atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(together[row, : len(ids)], wanted, atol=2e-5, rtol=1e-4)


@torch.inference_mode()
def test_tome_leaves_nothing_behind_and_protects_both_ends() -> None:
    model, ids = encoders.bert(), torch.tensor(rows(20))
    before = model(input_ids=ids).last_hidden_state
    with ToMe(model, 0.4) as tome:
        assert not torch.equal(model(input_ids=ids).last_hidden_state, before)
        for place in tome.places:
            assert (place == place[0, 0]).sum() == (place == place[0, -1]).sum() == 1
        assert [len(place.unique()) for place in tome.places] == [12, 7, 5]  # 8 of 20, then half of what may merge
    assert torch.equal(model(input_ids=ids).last_hidden_state, before)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_tome_of_another_kind_of_model_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="GPT2Model is built in another way"):
        ToMe(GPT2Model(GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=9)), 0.1)


# ---- methods and turns


def test_methods_by_name() -> None:
    found = methods.parse_list("tome:share=0.1|0.2,truncate:tokens=9,full")
    assert [method.spec for method in found] == ["full", "tome:share=0.1", "tome:share=0.2", "truncate:tokens=9"]
    assert found[1].label == "ToMe share=0.1"
    assert methods.parse("merge:ratio=2,whole_keys=false,steps=2").options == {
        "ratio": 2.0,
        "whole_keys": False,
        "steps": 2,
    }
    assert found[3].cut([[1, 2, 3], list(range(20))]) == [[1, 2, 3], [*range(8), 19]]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("prune", "no such way"),
        ("tome", "tome takes share"),
        ("full:ratio=2", "full takes no option"),
        ("tome:share=0.6", "between 0 and 0.5"),
        ("truncate:tokens=1", "two at least"),
        ("truncate:tokens=1.5", "two at least"),
    ],
)
def test_methods_that_cannot_be(spec: str, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        methods.parse(spec)


def test_second_models_share_weights_and_nothing_else() -> None:
    model = encoders.bert()
    twin = methods.share_weights(model)
    for (name, mine), (_, theirs) in zip(model.state_dict().items(), twin.state_dict().items(), strict=True):
        assert mine.data_ptr() == theirs.data_ptr(), name
    assert twin.config is not model.config
    assert not {id(m) for m in model.modules()} & {id(m) for m in twin.modules()}


def test_turns_encode_what_embed_does(loaded: LoadedModel) -> None:
    given = rows(20, 31, 9, 5, 26)
    chosen = methods.parse_list("truncate:tokens=8,tome:share=0.2")
    with turns.entrants(loaded, chosen) as pair:
        found = turns.in_turns(loaded, pair, given, 2, passes=3)
    assert [len(one.seconds) for one in found] == [9, 9, 9]
    torch.testing.assert_close(found[0].vectors, embed.embed(loaded, given, normalize=True))
    torch.testing.assert_close(found[1].vectors, embed.embed(loaded, embed.cut(given, 8), normalize=True))
    with ToMe(loaded.model, 0.2):
        torch.testing.assert_close(found[2].vectors, embed.embed(loaded, given, normalize=True))


@pytest.mark.parametrize("tokens", [5, 23, 57])
def test_equal_time_is_found(loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch, tokens: int) -> None:
    """Time is the square of tokens here: truncation to as many as the target runs is what takes as long."""

    def counted(loaded: LoadedModel, pair: Any, given: Any, size: int) -> list[turns.Encoded]:
        fed = [[float(sum(map(len, entrant.method.cut(given)))) ** 2] for entrant in pair]
        return [turns.Encoded(torch.empty(0), seconds) for seconds in fed]

    monkeypatch.setattr(turns, "in_turns", counted)
    target = methods.parse(f"truncate:tokens={tokens}")
    found = turns.matched(
        loaded, target, lambda n: methods.parse(f"truncate:tokens={round(n)}"), (60, 2), rows(60, 50), 2
    )
    assert abs(found.options["tokens"] - tokens) <= 1


# ---- what is asked


def test_joined_texts_hold_every_paragraph_once(loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(texts, "LEAST", 20)
    lengths = [5, 3, 9, 4, 30, 58, 61, 2, 70, 1, 17, 1, 2]
    paragraphs = [" ".join(f"w{i % 60}" for i in range(n)) for n in lengths]
    groups = texts.join(loaded, paragraphs)
    assert [place for group in groups for place in group] == list(range(len(lengths)))
    assert groups == [[0, 1, 2, 3], [4], [5], [6], [7], [8], [9, 10], [11, 12]]


def test_retrieval_finds_the_text_that_holds_the_paragraph(loaded: LoadedModel, tmp_path: Path) -> None:
    content = {
        "paragraphs": [f"w{i} w{i} w{i}" for i in range(30)],
        "questions": [{"question": f"w{i}", "paragraph": i} for i in (3, 29, 11)],
    }
    file = tmp_path / "questions.json"
    file.write_text(json.dumps(content))
    for form in texts.FORMS:
        found = texts.retrieval(loaded, file, form)
        for question, right in zip(found.questions, found.right, strict=True):
            assert question[1] in found.texts[right]
    assert texts.retrieval(loaded, file, "joined").begins == [False, False, False]
    assert texts.retrieval(loaded, file, "paragraphs").begins == [True, True, True]
    assert len(texts.retrieval(loaded, file, "paragraphs").texts) == 30
    assert len(texts.retrieval(loaded, file, "paragraphs", limit=12).right) == 2
    with pytest.raises(OptionError, match="asks about none of its first 2"):
        texts.retrieval(loaded, file, "paragraphs", limit=2)
    file.write_text('{"paragraphs": []}')
    with pytest.raises(OptionError, match="cannot be read as questions"):
        texts.retrieval(loaded, file, "joined")


def test_ranks_count_what_is_closer() -> None:
    torch.manual_seed(1)
    q, t = F.normalize(torch.randn(13, 7), dim=1), F.normalize(torch.randn(29, 7), dim=1)
    right = torch.randint(29, (13,)).tolist()
    wanted = []
    for question, own in zip(q, right, strict=True):
        order = sorted(range(29), key=lambda i, question=question: -float(question @ t[i]))
        wanted.append(order.index(own) + 1)
    assert quality.ranks(q, t, right) == wanted


def test_the_probe_learns_what_can_be_learned() -> None:
    torch.manual_seed(0)
    labels = [("good", "bad", "neither")[i % 3] for i in range(600)]
    middle = F.one_hot(torch.arange(600) % 3, 12).float()
    assert sum(quality.probe(middle + 0.1 * torch.randn(600, 12), labels)) == 300
    assert 60 < sum(quality.probe(torch.randn(600, 12), labels)) < 140


def test_fidelity_of_the_full_model_and_of_half_a_text(loaded: LoadedModel) -> None:
    given = rows(20, 12)
    with turns.entrants(loaded, methods.parse_list("truncate:tokens=10")) as (full, half):
        assert quality.fidelity(loaded, full, full, given, 2) == [[1.0, 1.0, 1.0]] * 2
        (mean, low, _), _ = quality.fidelity(loaded, full, half, given, 1)
        with torch.no_grad():
            a, b = (
                loaded.model(input_ids=torch.tensor([x])).last_hidden_state[0]
                for x in (given[0], half.method.cut(given)[0])
            )
    assert mean == pytest.approx(float(F.cosine_similarity(a[:10], b, dim=1).sum()) / 20, abs=1e-5)
    assert low == 0.0


def test_figures_are_paired() -> None:
    full = {"method": "full", "label": "full model", "texts": 8, "seconds": [2.0, 4.0], "ranks": [1, 1, 2, 1],
            "ranks_full_questions": [1, 1, 2, 1], "begins": [True, False, False, False],
            "sentiment": [1, 0], "cosines": [[1.0, 1.0, 1.0]], "cosines_long": [],
            "peak_bytes": 1000}  # fmt: skip
    half = {**full, "method": "x", "label": "x", "seconds": [1.0, 2.0], "ranks": [1, 4, 11, 1], "peak_bytes": 400}
    a, b = figures.figures([half, full])
    assert (a.method, b.method) == ("full", "x")
    assert (b.texts_per_s, b.speed.value, b.speed.low, b.speed.high) == (8 / 3, 2.0, 2.0, 2.0)
    assert (b.recall.value, b.kept.value, b.change.value) == (0.5, pytest.approx(2 / 3), -0.25)
    assert (b.recall_top, b.mrr, b.memory) == (0.75, pytest.approx((1 + 1 / 4 + 1 / 11 + 1) / 4), 2.5)
    assert (b.cosine, b.cosine_long) == (1.0, None)
    assert (b.recall_begins, b.recall_later) == (1.0, pytest.approx(1 / 3))


# ---- all of it


def run(folder: Path, tmp_path: Path, *arguments: str) -> Path:
    """The file of a run on the small model with sets made for it."""
    generator = torch.Generator().manual_seed(3)

    def words(count: int) -> str:
        return " ".join(f"w{int(i)}" for i in torch.randint(60, (count,), generator=generator))

    paragraphs = [words(25) for _ in range(12)]
    asked = [{"question": " ".join(p.split()[:9]), "paragraph": i} for i, p in enumerate(paragraphs)]
    (tmp_path / "questions.json").write_text(json.dumps({"paragraphs": paragraphs, "questions": asked}))
    lines = [{"text": words(8), "label": "ab"[i % 2]} for i in range(40)]
    (tmp_path / "sentences.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (tmp_path / "texts.jsonl").write_text(json.dumps({"source": "a", "text": words(1500)}))
    given = {"retrieval": "questions.json", "sentiment": "sentences.jsonl", "data": "texts.jsonl"}
    files = [part for name, file in given.items() for part in (f"--{name}", str(tmp_path / file))]
    out = tmp_path / "out.json"
    fixed = ["--model", str(folder), "--device", "cpu", "--windows", "2", "--batch", "4", "--out", str(out)]
    assert command.main([*fixed, *files, *arguments]) == 0
    return out


def test_a_run_and_its_page(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = run(folder, tmp_path, "--policy", "tome:share=0.1,truncate:tokens=12", "--no-memory")
    shown = capsys.readouterr().out
    assert "6 texts of 52 tokens" in shown  # two paragraphs each
    assert all(label in shown for label in ("full model", "ToMe share=0.1", "truncation tokens=12"))
    file = json.loads(out.read_text())
    assert [record["method"] for record in file["records"]] == ["full", "tome:share=0.1", "truncate:tokens=12"]
    assert file["records"][1]["picture"]["layers"][-1][0] == 0
    from typer.testing import CliRunner

    page, tables = tmp_path / "page.html", tmp_path / "tables.md"
    done = CliRunner().invoke(app, ["report", str(out), "--out", str(page), "--markdown", str(tables)])
    assert done.exit_code == 0, done.output
    html = page.read_text()
    assert "what merging tokens keeps" in html
    assert "Encoders: quality against time" in html
    assert "http" not in html
    drawings = re.findall(r"<svg.*?</svg>", html, re.DOTALL)
    assert len(drawings) == 4  # retrieval, sentiment, tokens, and ToMe's picture; no memory was measured
    for drawing in drawings:
        ET.fromstring(drawing)
    assert "| ToMe share=0.1 |" in tables.read_text()
    heads = next(line for line in tables.read_text().splitlines() if line.startswith("| method |"))
    assert "probe" in heads
    assert "peak" not in heads  # as nothing of it was measured
    assert "compression ratio" not in html


def test_lines_of_the_page_fit_beside_their_names() -> None:
    """A LoRA's name does not stand at a line's end where there is one LoRA; with two, both do."""
    record = {"label": "full model", "texts": 2, "seconds": [2.0, 4.0], "ranks": [1, 2], "begins": [True, False],
              "ranks_full_questions": [1, 1], "sentiment": [], "cosines": [[1.0, 1.0, 1.0]], "cosines_long": [],
              "peak_bytes": None}  # fmt: skip
    records = [{**record, "method": "full"}]
    records += [{**record, "method": x, "label": f"EncoderMerge ratio=2 lora={x}"} for x in ("one", "other")]
    shown = []
    for count in (2, 3):
        file: Any = SimpleNamespace(records=records[:count])
        shown.append("".join(report.plots(file)))
    assert ">EncoderMerge, LoRA<" in shown[0]
    assert ">EncoderMerge lora=" not in shown[0]
    assert ", LoRA<" not in shown[1]


@pytest.mark.skipif(sys.platform != "linux", reason="read from /proc")
def test_peaks_are_those_of_tokens_that_run(loaded: LoadedModel) -> None:
    given = rows(*[60] * 800)
    full, cut = (peak_bytes(loaded, spec, given) for spec in ("full", "truncate:tokens=15"))
    hidden, inner = 800 * 60 * 32 * 4, 800 * 60 * 48 * 4  # bytes of one state, and of one inside an MLP
    assert hidden + 2 * inner < full < 6 * hidden + 2 * inner
    assert 3 * cut < full


def test_merged_encoders_take_part(folder: Path, tmp_path: Path) -> None:
    out = run(folder, tmp_path, "--policy", "merge:ratio=2,merge:coverage=0.5,merge:ratio=2,what=kv", "--no-memory")
    full, ratio, coverage, kv = json.loads(out.read_text())["records"]
    assert (full["picture"], kv["picture"]) == (None, None)
    for record in (ratio, coverage):
        tokens, layers = record["picture"]["tokens"], record["picture"]["layers"]
        assert tokens[0] == "[CLS]"
        assert all(len(groups) == len(tokens) for groups in layers)
        assert record["cosines"] != full["cosines"]
    assert kv["cosines"] != full["cosines"]


def test_equal_time_for_each_merge(folder: Path, tmp_path: Path) -> None:
    out = run(folder, tmp_path, "--policy", "merge:ratio=2", "--match", "--no-memory")
    names = [record["name"] for record in json.loads(out.read_text())["records"]]
    assert names == ["full", "merge", "tome", "truncate"]


def test_speed_runs_to_its_end(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(speed, "RATIOS", (1.0, 2.0, 3.8))
    out = tmp_path / "speed.json"
    assert command.main(["--speed", "--tiny", "--out", str(out)]) == 0
    file = json.loads(out.read_text())
    assert file["about"]["matmul_flops_per_s"] > 0
    assert len(file["records"]) == 6 + 4 + 2 * 6
    by_method = {r["method"]: r for r in file["records"] if r["shape"] == "bert-tiny" and "," not in r["method"]}
    floors = [by_method[f"EncoderMerge ratio={ratio}"]["flops"] for ratio in ("1", "2", "3.8")]
    assert floors[0] == by_method["full model"]["flops"]
    assert floors == sorted(floors, reverse=True)
    assert "ragged" in capsys.readouterr().out


def test_errors_are_one_line(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--model", str(folder), "--policy", "prune"]) == 2
    assert capsys.readouterr().err.startswith("error: 'prune': there is no such way")


# ---- the picture


def test_the_picture_has_a_box_for_each_run() -> None:
    layers = [[0, 1, 1, 2], [0, 1, 0, 2], [0, 1, 0, 2]]
    picture = ET.fromstring(draw(["a", "<b>", "c", "d"], layers, "title"))
    boxes = [e for e in picture.iter() if e.tag == "rect"]
    words = [e.text for e in picture.iter() if e.tag == "text"]
    assert [float(e.get("fill-opacity") or 0) > 0.5 for e in boxes] == [False, True, False, True, False, True, False]
    assert words == ["title", "a", "<b>", "c", "d", "layer 1", "1", "layers 2-3", "1", "1",
                     "4 tokens, 3 in layer 1, 3 in layers 2-3"]  # fmt: skip


def test_a_long_text_goes_on_below() -> None:
    count = 100
    picture = ET.fromstring(draw(["word"] * count, [list(range(count))], "title"))
    boxes = [e for e in picture.iter() if e.tag == "rect"]
    assert len(boxes) == count
    assert len({e.get("y") for e in boxes}) > 1
    assert max(float(e.get("x") or 0) + float(e.get("width") or 0) for e in boxes) < 1100  # as wide as the page


# ---- speed


def test_speed_counts_flops(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "methods", lambda config: [methods.parse("full"), methods.parse("truncate:tokens=4")])
    (case, _) = speed.cases(tiny=True)
    records = speed.run(case, torch.device("cpu"), rate=1e9)
    linear = 3 * (4 * 32 * 32 + 2 * 32 * 128) * 2 * 4 * 64 + 4 * 2 * 32 * 32  # layers, and the pooler
    attention = 3 * 4 * 64 * 64 * 32 * 4
    for record in records:
        assert record["flops"] in (linear, linear + attention)  # torch does not count attention on CPUs yet
        assert record["floor_ms"] == pytest.approx(1e3 * record["flops"] / 1e9)
    assert records[0]["x_full"] == 1.0
    assert "refused" not in records[1]


@pytest.fixture
def checked(monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Tensor]:
    """A model whose tokens merge in kernels where nothing is learned, and ids."""
    pytest.importorskip("triton")
    for module in (grouping, sized):
        monkeypatch.setattr(module, "runs_on_triton", lambda *x: not torch.is_grad_enabled())
    (case, _) = speed.cases(tiny=True)
    model = case.model(torch.device("cpu"))
    return model, torch.randint(100, (2, 26), generator=torch.Generator().manual_seed(0))


def test_kernels_are_checked(checked: tuple[Any, Tensor]) -> None:
    check.check(methods.parse("merge:ratio=3,floor=4"), *checked)


@pytest.mark.parametrize("name", ["unmerge", "costs"])
def test_wrong_kernels_have_no_speed(checked: tuple[Any, Tensor], name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that gives wrong states, and one that finds the worst partners."""
    kernels = importlib.import_module("kvpleat.kernels.grouping_triton")
    right = getattr(kernels, name)
    wrong = {
        "unmerge": lambda place, *rest: right(place.roll(1, 1), *rest),
        "costs": lambda states, *rest: right(states.roll(1, 1), *rest),
    }
    monkeypatch.setattr(kernels, name, wrong[name])
    with pytest.raises(JudgeError, match="no speed"):
        check.check(methods.parse("merge:ratio=3,floor=4"), *checked)


def test_ragged_rows_have_the_lengths_that_are_timed() -> None:
    (case, _) = speed.cases(tiny=True)
    seen: list[tuple[int, ...]] = []

    def model(input_ids: Tensor, attention_mask: Tensor | None = None) -> None:
        seen.append(tuple(input_ids.shape) if attention_mask is None else tuple(attention_mask.sum(1).tolist()))

    by_length, padded = speed._ragged(case, methods.parse("full"), model, torch.zeros(4, 64, dtype=torch.int64))
    by_length.run()
    padded.run()
    assert seen == [(1, 16), (1, 24), (1, 32), (1, 40), (16, 24, 32, 40)]
