"""The comparison of trainings with and without compression: arms see the same, and do what they say."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kvpleat.errors import OptionError
from kvpleat.hf.models import load
from kvpleat.policies.gates import Gates
from kvpleat.policies.lora import LoraWeights
from kvpleat.retrofit import effect, effect_arm
from kvpleat.retrofit.config import Recipe
from kvpleat.retrofit.data import Batch
from kvpleat.retrofit.effect import compare, main, prepared_gates, small_gpt2, table
from kvpleat.retrofit.effect_arm import Arm, Texts, fresh_gates, judge, rehearse, steps_in, train
from tests import models, reference
from tests.retrofit import texts

DELAY, LENGTH, ROWS = 3, 30, 2


def recipe(method: str = "dms", **changes: Any) -> Recipe:
    options: dict[str, Any] = {"ratios": (2.0,), "steps": 6, "rows": ROWS, "length": LENGTH, "delay": DELAY}
    return Recipe(method=method, train="full", **{"ramp": 0.5, "model_rate": 1e-3, **options, **changes})


def batch(seed: int, starts: tuple[int, ...] = (0,)) -> Batch:
    """Two random rows with documents that begin at `starts`."""
    tokens = models.prompt(LENGTH, seed, ROWS)
    doc_start = torch.zeros(ROWS, LENGTH, dtype=torch.int32)
    weight = torch.ones(ROWS, LENGTH)
    for start in starts:
        doc_start[:, start:], weight[:, start] = start, 0.0
    return Batch(tokens, doc_start, weight)


class Batches:
    """Endless batches that can be told apart, and what was taken of them."""

    def __init__(self) -> None:
        self.taken: list[Batch] = []

    def __iter__(self) -> "Batches":
        return self

    def __next__(self) -> Batch:
        self.taken.append(batch(100 + len(self.taken), (0, 11)))
        return self.taken[-1]

    def close(self) -> None:
        """Nothing to stop."""


class Opened:
    """Texts, and every stream of batches that was opened."""

    def __init__(self) -> None:
        self.streams: list[Batches] = []

        def batches() -> Any:
            self.streams.append(Batches())
            return self.streams[-1]

        self.texts = Texts(batches, [batch(100, (0, 11))], [batch(1), batch(2, (0, 9))])


def random_gates(model: Any, method: str, seed: int = 0) -> Gates:
    """Gates that mark about half of all tokens, each head other ones."""
    gates = fresh_gates(model, recipe(method))
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in gates.outer:
            layer.weight.copy_(torch.randn(layer.weight.shape, generator=random) / 50)
            layer.bias.copy_(torch.randn(layer.bias.shape, generator=random) / 2)
    return gates


def documents(of: Batch) -> list[Tensor]:
    """Every document of a batch."""
    found = []
    for tokens, starts in zip(of.tokens, of.doc_start, strict=True):
        found += [tokens[starts == start] for start in starts.unique()]
    return found


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma3_text"])
def test_the_uncompressed_loss_is_the_models(family: str) -> None:
    """Mean over the next tokens of every document, each seen alone by the untouched model."""
    model, given = models.tiny(family), [batch(1), batch(2, (0, 9, 21))]
    total, count = 0.0, 0
    for document in [document for one in given for document in documents(one)]:
        with torch.no_grad():
            logits = model(document[None]).logits[0]
        total += float(F.cross_entropy(logits[:-1], document[1:], reduction="sum"))
        count += len(document) - 1
    arm = Arm(model, recipe(), None)
    with arm.student.attached():
        found, ratio = judge(arm.student, given, False)
    assert found == pytest.approx(total / count, rel=1e-5)
    assert ratio == 1.0


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("method", ["dms", "fold"])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_the_compressed_loss_and_ratio_by_definition(family: str, method: str, seed: int) -> None:
    """With hard decisions the loss is that of the masked reference, and the ratio that of what it leaves."""
    model, given = models.tiny(family), [batch(seed + 3)]
    gates = random_gates(model, method, seed)
    weights, biases = [layer.weight for layer in gates.outer], [layer.bias for layer in gates.outer]
    learned = reference.Learned(method, weights, biases, gates.config.scale, DELAY, sinks=gates.config.sinks)
    total, seen, gone = 0.0, 0, 0
    for tokens in given[0].tokens:
        logits = reference.learned_forward(model, tokens, learned)
        total += float(F.cross_entropy(logits[:-1], tokens[1:], reduction="sum"))
        for number, (hidden, _) in enumerate(learned.entering[layer] for layer in sorted(learned.entering)):
            marked, _, _ = learned.gates(number, hidden)
            for head in marked.tolist():
                seen += LENGTH
                gone += sum(head[j + 1] and LENGTH - 1 - j > DELAY for j in range(LENGTH - 1))
    arm = Arm(model, recipe(method), gates)
    before = arm.student.temperature
    with arm.student.attached():
        found, ratio = judge(arm.student, given, True)
    assert found == pytest.approx(total / (ROWS * (LENGTH - 1)), rel=1e-5)
    assert ratio == pytest.approx(seen / (seen - gone))
    assert 1.2 < ratio < 4
    assert arm.student.temperature == before


def test_without_compression_it_is_plain_training() -> None:
    """Three steps give the weights that transformers' own loss and a plain loop give."""
    asked, given = recipe(steps=40), [batch(seed) for seed in (5, 6, 7)]
    arm = Arm(models.tiny("llama"), asked, None)
    with arm.student.attached():
        found = [float(arm.advance(step, one)[0]) for step, one in enumerate(given)]
    plain = models.tiny("llama")
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.0)
    for step, one in enumerate(given):
        optimizer.param_groups[0]["lr"] = 1e-3 * min(1.0, (step + 1) / 2)  # grows over 5% of 40 steps
        loss = plain(one.tokens, labels=one.tokens).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        optimizer.step()
        assert found[step] == pytest.approx(float(loss.detach()), rel=1e-5)
    for mine, theirs in zip(arm.student.model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, atol=2e-5, rtol=0)


def test_the_ratio_is_reached_and_everything_learns() -> None:
    """The penalty brings new gates to the ratio asked for; weights and gates both move, and the loss falls."""
    model = models.tiny("llama", dtype=torch.float32)
    asked = recipe(steps=60, rate=2e-2, ramp=0.2)
    opened, lines = Opened(), []
    arm = Arm(model, asked, fresh_gates(model, asked))
    start = [p.detach().clone() for p in model.parameters()]
    assert train(arm, opened.texts, lines.append, evaluations=2) == 60
    assert all(not torch.equal(a, b) for a, b in zip(start, model.parameters(), strict=True))
    first, _, last = [line for line in lines if line["kind"] == "evaluation"]
    assert first["ratio"] < 1.1
    assert 1.7 < last["ratio"] < 3
    assert last["trained"] < first["trained"]
    assert last["held_out_off"] != last["held_out"]


@pytest.mark.parametrize("compressed", [False, True])
def test_a_rehearsal_leaves_nothing_behind(compressed: bool) -> None:
    """Weights, gates and optimiser are as before, so the steps that follow are the same."""
    model, opened, weights = models.tiny("gpt2"), Opened(), []
    for rehearsed in (True, False):
        arm = Arm(models.tiny("gpt2"), recipe(), random_gates(model, "dms") if compressed else None)
        with arm.student.attached():
            if rehearsed:
                step_s, evaluation_s = rehearse(arm, opened.texts)
                assert step_s > 0
                assert evaluation_s > 0
            for step in range(2):
                arm.advance(step, batch(step))
        weights.append([*arm.student.model.parameters(), *arm.student.gates.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))


def test_steps_that_fit() -> None:
    """Evaluations are taken off the time, and too little of it is refused."""
    assert steps_in(60.0, 0.25, 1.0, 10) == 200
    with pytest.raises(OptionError, match="seconds=5"):
        steps_in(5.0, 0.25, 1.0, 5)


def test_all_arms_see_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """One start, one order of batches, and the steps that the first arm has time for."""
    model, opened, lines = models.tiny("llama"), Opened(), []
    before = [p.detach().clone() for p in model.parameters()]
    monkeypatch.setattr(effect_arm, "rehearse", lambda arm, texts: (0.5, 0.25))
    asked = [recipe("dms", steps=1), recipe("fold", steps=1)]
    gates = [random_gates(model, "dms"), random_gates(model, "fold")]
    states = [{name: x.clone() for name, x in one.state_dict().items()} for one in gates]
    arms = [*zip(asked, gates, strict=True), (asked[0], None)]
    results = compare(model, arms, opened.texts, lines.append, evaluations=4, seconds=4.6)
    assert [result["arm"] for result in results] == ["off", "dms", "fold"]
    assert [result["step"] for result in results] == [7, 7, 7]  # (4.6 - 4 * 0.25) / 0.5
    assert len(opened.streams) == 3
    for stream in opened.streams:
        assert [one.tokens.tolist() for one in stream.taken] == [one.tokens.tolist() for one in opened.streams[0].taken]
        assert len(stream.taken) == 7
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    for one, state in zip(gates, states, strict=True):
        assert all(torch.equal(state[name], x) for name, x in one.state_dict().items())
    starts = {line["arm"]: line for line in lines if line["kind"] == "evaluation" and line["step"] == 0}
    for name in ("dms", "fold"):  # nothing is trained yet: without compression they are the one model
        assert starts[name]["held_out_off"] == pytest.approx(starts["off"]["held_out"], rel=1e-6)
        assert starts[name]["held_out"] != starts["off"]["held_out"]
    for result in results:
        assert result["tokens"] == 7 * ROWS * LENGTH
        assert result["start"] == starts[result["arm"]]["held_out"]
        assert result["difference"] == pytest.approx(result["held_out"] - results[0]["held_out"])
        assert result["percent"] == pytest.approx(100 * result["difference"] / results[0]["held_out"])
    for name in ("dms", "fold", "off"):
        steps = [line for line in lines if line["kind"] == "step" and line["arm"] == name]
        assert [line["step"] for line in steps] == list(range(1, 8))
        asked_for = [min(2.0, 1 + step / 3.5) for step in range(1, 8)] if name != "off" else [1.0] * 7
        assert [line["asked"] for line in steps] == pytest.approx(asked_for)
        stops = [line["step"] for line in lines if line["kind"] == "evaluation" and line["arm"] == name]
        assert stops == [0, 2, 4, 5, 7]
    shown = table(results).splitlines()
    assert [line.split()[0] for line in shown] == ["arm", "off", "dms", "fold"]
    assert f"{results[1]['held_out']:.4f}" in shown[2]
    assert len({len(line) for line in shown}) == 1


def test_gates_of_a_folder(tmp_path: Path) -> None:
    """They start the arm of their method; their LoRA becomes part of the common start; others are refused."""
    model = models.tiny("llama")
    name = "model.layers.1.self_attn.q_proj"
    before = model.get_submodule(name).weight.detach().clone()
    gates = random_gates(model, "dms")
    random = torch.Generator().manual_seed(3)
    a, b = torch.randn(2, 48, generator=random), torch.randn(before.shape[0], 2, generator=random)
    gates.adapter = LoraWeights(2, 4.0, {name: (a.half().float(), b.half().float())})
    gates.save_pretrained(tmp_path)
    found = prepared_gates(model, ["dms"], str(tmp_path))
    assert list(found) == ["dms"]
    assert torch.equal(found["dms"].outer[0].weight, gates.outer[0].weight.half().float())
    wanted = before + 2.0 * (b.half().double() @ a.half().double())
    torch.testing.assert_close(model.get_submodule(name).weight.detach(), wanted)
    arm = Arm(model, recipe(), found["dms"])
    assert all(p.requires_grad for p in [*arm.student.model.parameters(), *arm.student.gates.parameters()])
    with pytest.raises(OptionError, match="--method is fold"):
        prepared_gates(models.tiny("llama"), ["fold"], str(tmp_path))
    with pytest.raises(OptionError, match="--method is dms fold"):
        prepared_gates(models.tiny("llama"), ["dms", "fold"], str(tmp_path))
    with pytest.raises(OptionError, match="another model"):
        prepared_gates(models.tiny("gpt2"), ["dms"], str(tmp_path))
    assert prepared_gates(model, ["dms", "fold"], None) == {}


def test_a_small_gpt2_is_the_same_for_a_seed() -> None:
    """Its shape is the one asked for, and nothing in it is dropped at random."""
    shape = {"layers": 2, "width": 24, "heads": 3, "length": 40}
    one, same, other = (small_gpt2(texts.tokenizer(), seed=seed, **shape) for seed in (4, 4, 5))
    assert torch.equal(one.transformer.h[1].mlp.c_fc.weight, same.transformer.h[1].mlp.c_fc.weight)
    assert not torch.equal(one.transformer.h[1].mlp.c_fc.weight, other.transformer.h[1].mlp.c_fc.weight)
    assert one.lm_head.weight is one.transformer.wte.weight
    assert one.lm_head.weight.shape == (len(texts.tokenizer()), 24)
    assert (len(one.transformer.h), one.config.n_head, one.config.n_positions) == (2, 3, 40)
    assert all(module.p == 0.0 for module in one.modules() if isinstance(module, torch.nn.Dropout))


def words(path: Path, seed: int) -> str:
    """A JSON lines file of texts that the tokenizer of tiny_folder knows."""
    random = torch.Generator().manual_seed(seed)
    lines = [" ".join(f"w{i}" for i in torch.randint(0, 58, (70,), generator=random)) for _ in range(12)]
    path.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("scratch", [False, True])
def test_the_command(
    scratch: bool,
    tiny_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Of a model in a folder and of one from scratch: a file of lines, and a table."""
    monkeypatch.setenv("KVPLEAT_CACHE", str(tmp_path / "cache"))
    data, held_out, out = (
        words(tmp_path / "a.jsonl", 0),
        words(tmp_path / "b.jsonl", 1),
        tmp_path / "deep" / "out.jsonl",
    )
    options = ["--data", data, "--held-out", held_out, "--out", str(out), "--rows", "2", "--length", "32"]
    options += ["--delay", "2", "--ratio", "2", "--evaluations", "2", "--evaluated-rows", "3", "--seed", "7"]
    if scratch:
        options += ["--model", "scratch", "--tokenizer", str(tiny_folder), "--layers", "1", "--width", "16"]
        options += ["--heads", "2", "--seconds", "2", "--method", "dms"]
    else:
        options += ["--model", str(tiny_folder), "--steps", "3", "--method", "fold", "dms"]
    main(options)
    lines = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    run, results = lines[0], [line for line in lines if line["kind"] == "result"]
    assert run["recipe"]["method"] == ("dms" if scratch else "fold")
    assert run["recipe"]["model_rate"] == (effect.RATES["scratch"] if scratch else effect.RATE)
    assert (run["trained"], run["held_out"]) == (4 * 32, 3 * 32)  # whole batches of the one, whole rows of the other
    assert run["machine"]
    assert sorted(line["arm"] for line in results) == (["dms", "off"] if scratch else ["dms", "fold", "off"])
    steps = {line["step"] for line in results}
    assert len(steps) == 1
    assert scratch or steps == {3}
    for result in results:
        curve = [line["loss"] for line in lines if line["kind"] == "step" and line["arm"] == result["arm"]]
        assert len(curve) == result["step"]
        assert 0 < result["held_out"] < 10
    printed = capsys.readouterr().out
    assert table(results) in printed
    assert run["machine"] in printed


def test_the_command_with_gates(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gates of a folder decide from the start, wait as they were trained to, and are asked for their own ratio."""
    monkeypatch.setenv("KVPLEAT_CACHE", str(tmp_path / "cache"))
    data, out, folder = words(tmp_path / "a.jsonl", 0), tmp_path / "out.jsonl", tmp_path / "gates"
    gates = random_gates(load(str(tiny_folder), dtype="float32", device="cpu").model, "dms")
    gates.config = replace(gates.config, ratio=1.75)
    gates.save_pretrained(folder)
    options = ["--model", str(tiny_folder), "--gates", str(folder), "--data", data, "--held-out", data]
    main([*options, "--out", str(out), "--steps", "2", "--rows", "1", "--length", "40", "--evaluations", "1"])
    lines = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert (lines[0]["recipe"]["delay"], lines[0]["recipe"]["ratios"], lines[0]["gates"]) == (
        DELAY,
        [1.75],
        str(folder),
    )
    assert [line["asked"] for line in lines if line["kind"] == "step"] == [1.75, 1.75, 1.0, 1.0]
    first = next(line for line in lines if line["kind"] == "evaluation")
    assert first["ratio"] > 1.2


@pytest.mark.parametrize("options", [["--steps", "3", "--seconds", "3"], [], ["--steps", "3", "--method", "dmc"]])
def test_options_that_are_refused(options: list[str], tmp_path: Path) -> None:
    """One of steps and seconds, and methods that wait."""
    with pytest.raises(SystemExit):
        main(["--data", "a.jsonl", "--held-out", "b.jsonl", "--out", str(tmp_path / "x"), *options])
