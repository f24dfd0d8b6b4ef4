"""`kvpleat retrofit`: what reaches the training, what comes out, what is shown, and what is refused."""

import json
import subprocess
import sys
import time
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner, Result

from kvpleat.cli import app, teaching
from kvpleat.cli import retrofit as module
from kvpleat.retrofit import Recipe
from kvpleat.retrofit.train import Progress
from tests import models
from tests.retrofit import texts

LENGTH, ROWS = 256, 2
INNER = {"ramp", "temperature", "scale", "ratio_weight"}  # of Recipe, without an option of their own


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["retrofit", *arguments], catch_exceptions=False)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a tiny model, texts to train and to judge on, and a cache of its own."""
    monkeypatch.setenv("KVPLEAT_CACHE", str(tmp_path / "cache"))
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    fast = texts.tokenizer()
    models.tiny("llama", dtype=torch.float32, vocab_size=len(fast)).save_pretrained(tmp_path / "tiny")
    fast.save_pretrained(tmp_path / "tiny")
    prose = texts.prose()
    (tmp_path / "train.txt").write_text(prose[:30_000])
    (tmp_path / "judge.txt").write_text(prose[30_000:40_000])
    return tmp_path


def arguments(place: Path, *more: str) -> list[str]:
    """A run that takes a second or two; `more` wins over what comes before."""
    given = ["--model", str(place / "tiny"), "--device", "cpu", "--data", str(place / "train.txt")]
    given += ["--out", str(place / "out"), "--length", str(LENGTH), "--rows", str(ROWS), "--delay", "8"]
    return [*given, "--steps", "6", *more]


@pytest.fixture
def taught(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the training would have been called with; nothing is trained."""
    seen: dict[str, Any] = {}

    def fake(model: Any, recipe: Recipe, batches: Any, out: Path, **how: Any) -> dict[str, Any]:
        seen.update(model=model, recipe=recipe, out=out, first=next(batches), **how)
        for step in range(1, 9):
            steps = 8 if how["fit_s"] else recipe.steps
            how["on_step"](Progress(step, steps, step * 512, step * 2.0, 0.5, 0.25, 0.9, 4.0, 3.0, 256.0))
        return {}

    monkeypatch.setattr(module, "retrofit", fake)
    return seen


# ---- what reaches the training


def test_defaults_are_those_of_the_recipe(place: Path, taught: dict[str, Any]) -> None:
    model, out = ["--model", str(place / "tiny"), "--device", "cpu"], ["--out", str(place / "out")]
    result = invoke(*model, *out, "--data", str(place / "train.txt"), "--length", "512", "--ratio", "1.5")
    assert result.exit_code == 0, result.stderr
    assert taught["recipe"] == Recipe(length=512, ratios=(1.5,))
    assert (taught["resume"], taught["save_every"], taught["deadline_s"]) == (True, 100, None)
    assert taught["held_out"] is None


def test_every_option_reaches_the_recipe(place: Path, taught: dict[str, Any]) -> None:
    expected = Recipe(
        method="fold", ratios=(2.0, 3.5), train="lora", steps=9, rows=3, length=300, delay=5, sinks=3, rate=0.5,
        model_rate=0.25, margin=0.9, lm_weight=0.75, recall_share=0.25, answer_weight=2.0, adapt="all", rank=3,
        mlp_size=7, seed=11, accumulate=2, checkpointing=True, compile=True,
    )  # fmt: skip
    same = {f.name for f in fields(Recipe) if getattr(expected, f.name) == f.default}
    assert same == INNER  # so that no option can be forgotten above
    options = ["--method", "fold", "--ratio", "2,3.5", "--train", "lora", "--steps", "9", "--rows", "3"]
    options += ["--length", "300", "--delay", "5", "--rate", "0.5", "--model-rate", "0.25", "--lm-weight", "0.75"]
    options += ["--recall-share", "0.25", "--answer-weight", "2", "--adapt", "all", "--rank", "3", "--mlp-size", "7"]
    options += [
        "--sinks",
        "3",
        "--margin",
        "0.9",
        "--seed",
        "11",
        "--accumulate",
        "2",
        "--checkpointing",
        "--compile",
        "--no-resume",
    ]
    result = invoke(*arguments(place), *options, "--save-every", "4", "--deadline", "60")
    assert result.exit_code == 0, result.stderr
    assert taught["recipe"] == expected
    assert (taught["resume"], taught["save_every"], taught["deadline_s"]) == (False, 4, 60.0)
    assert taught["fit_s"] is None
    assert taught["first"].tokens.shape == (3, 300)


def test_seconds_in_place_of_steps(place: Path, taught: dict[str, Any]) -> None:
    result = invoke(*arguments(place)[:-2], "--seconds", "90")
    assert result.exit_code == 0, result.stderr
    assert taught["fit_s"] == 90.0


def test_dmc_does_not_wait(place: Path, taught: dict[str, Any]) -> None:
    given = arguments(place, "--method", "dmc")
    at = given.index("--delay")
    assert invoke(*given[:at], *given[at + 2 :]).exit_code == 0
    assert (taught["recipe"].method, taught["recipe"].delay) == ("dmc", 0)


@pytest.mark.parametrize(("world", "steps"), [(1, 7), (3, 3)])
def test_tokens_say_how_many_steps(
    place: Path, taught: dict[str, Any], monkeypatch: pytest.MonkeyPatch, world: int, steps: int
) -> None:
    """6,145 tokens are 6 steps of 2 x 2 x 256 and one token more; three processes do three times as much a step."""
    monkeypatch.setenv("WORLD_SIZE", str(world))
    given = arguments(place, "--accumulate", "2", "--tokens", "6145")
    at = given.index("--steps")
    assert invoke(*given[:at], *given[at + 2 :]).exit_code == 0
    assert taught["recipe"].steps == steps


def test_processes_have_rows_of_their_own_and_the_first_one_speaks(
    place: Path, taught: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    firsts = []
    for rank in range(2):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "2")
        result = invoke(*arguments(place, "--recall-share", "0"))
        assert result.exit_code == 0, result.stderr
        assert bool(result.stderr) == (rank == 0)
        firsts.append(taught["first"].tokens)
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("RANK", "0")
    invoke(*arguments(place, "--recall-share", "0", "--rows", str(2 * ROWS)))
    assert torch.equal(torch.cat(firsts), taught["first"].tokens)


# ---- what comes out


def test_a_run_leaves_gates_that_serve(place: Path) -> None:
    held_out = ("--held-out", str(place / "judge.txt"), "--held-out-rows", "3")
    result = invoke(*arguments(place, "--ratio", "2,4", *held_out, "--json"))
    assert result.exit_code == 0, result.stderr
    assert result.stdout.count("\n") == 1  # one object, one line
    got = json.loads(result.stdout)
    assert (got["steps"], got["tokens"]) == (6, 6 * ROWS * LENGTH)
    assert got["trained"] == {"gates": 3 * 2 * (48 + 1)}
    assert got["share_of_peak"] is None  # there is no peak of a CPU
    folders = [str(place / "out" / name) for name in ("2x", "4x")]
    assert list(got["gates"]) == folders
    for folder in folders:
        measured = json.loads((Path(folder) / "config.json").read_text())["training"]["measured"]
        assert got["gates"][folder] == measured
        assert measured["ratio"] >= 1
    assert len((place / "out" / "metrics.jsonl").read_text().splitlines()) == 6 + 2
    serve = ["generate", "--model", str(place / "tiny"), "--device", "cpu", "--prompt", texts.prose()[:900], "--json"]
    done = CliRunner().invoke(app, [*serve, "--max-new-tokens", "3", "--policy", "dms", "--gates", folders[1]])
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["policy"]["gates"] == folders[1]


def test_a_model_that_was_trained_whole_is_served_by_itself(place: Path) -> None:
    result = invoke(*arguments(place, "--train", "full", "--steps", "2", "--json"))
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["trained"]["model"] == sum(
        tensor.numel() for tensor in load_file(place / "tiny" / "model.safetensors").values()
    )
    gates = place / "out" / "4x"
    serve = ["explain", "--model", str(gates / "model"), "--device", "cpu", "--policy", "dms", "--gates", str(gates)]
    done = CliRunner().invoke(app, serve, catch_exceptions=False)
    assert done.exit_code == 0, done.stderr


def test_what_people_see(place: Path) -> None:
    result = invoke(*arguments(place, "--steps", "8", "--held-out", str(place / "judge.txt"), "--held-out-rows", "2"))
    assert result.exit_code == 0, result.stderr
    shown = " ".join(result.stderr.split())
    count = len(texts.tokenizer()((place / "train.txt").read_text())["input_ids"]) + 1  # and the end of text
    assert f"{count:,} tokens in 1 documents" in shown
    for words in ("294 of gates", "dms at 4x, delay 8", "8 steps x 2 rows x 256 tokens = 4,096 tokens", "tokens/s"):
        assert words in shown
    assert "about 0:00:0" in shown
    head, line = result.stdout.splitlines()
    assert head.split() == ["gates", "ratio", "kl", "agreement", "perplexity", "change"]
    assert line.split()[0] == str(place / "out" / "4x")
    assert len(line.split()) == 5


@pytest.mark.parametrize("train", ["gates", "lora"])
def test_an_interrupted_run_goes_on_to_the_same_bits(place: Path, monkeypatch: pytest.MonkeyPatch, train: str) -> None:
    whole, halves = str(place / "whole"), str(place / "halves")
    given = arguments(place, "--train", train, "--ratio", "2,4", "--save-every", "2")
    assert invoke(*given, "--out", whole).exit_code == 0
    stepped = teaching.Teaching.on_step

    def interrupted(self: teaching.Teaching, step: Progress) -> None:
        stepped(self, step)
        if step.step == 5:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(teaching.Teaching, "on_step", interrupted)
        assert invoke(*given, "--out", halves).exit_code == 130
    result = invoke(*given, "--out", halves)
    assert result.exit_code == 0, result.stderr
    assert "going on from its checkpoint" in " ".join(result.stderr.split())
    names = {f.relative_to(whole) for f in Path(whole).glob("*x/*.safetensors")}
    assert len(names) == (2 if train == "gates" else 4)
    for name in names:
        first, second = load_file(Path(whole) / name), load_file(Path(halves) / name)
        assert all(torch.equal(first[key], second[key]) for key in first)
    again = json.loads(invoke(*given, "--out", halves, "--json").stdout)  # there is nothing left to do
    assert list(again["gates"]) == [f"{halves}/2x", f"{halves}/4x"]


def test_what_was_learned_by_the_deadline_is_kept(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first step is slow: it alone is done before the deadline, and the second run does the others."""
    stepped, seen = teaching.Teaching.on_step, list[int]()

    def slow(self: teaching.Teaching, step: Progress) -> None:
        stepped(self, step)
        time.sleep(0 if seen else 1.1)
        seen.append(step.step)

    monkeypatch.setattr(teaching.Teaching, "on_step", slow)
    given = arguments(place, "--save-every", "0")
    result = invoke(*given, "--deadline", "1")
    assert result.exit_code == 0, result.stderr
    done = len(seen)
    assert 1 <= done < 6
    assert result.stdout == f"stopped after step {done} of 6; the same command goes on\n"
    assert "x" not in {path.name[-1] for path in (place / "out").iterdir()}
    assert json.loads(invoke(*given, "--json").stdout)["steps"] == 6
    assert seen == [1, 2, 3, 4, 5, 6]


def test_gates_of_another_recipe_are_no_result(place: Path, taught: dict[str, Any]) -> None:
    folder = place / "out" / "4x"
    folder.mkdir(parents=True)
    for seed, found in ((0, 1), (1, 0)):
        given = arguments(place, "--seed", "0")
        invoke(*given)
        recipe = asdict(taught["recipe"]) | {"seed": seed}
        (folder / "config.json").write_text(json.dumps({"training": {"recipe": recipe, "measured": {"kl": 0.5}}}))
        assert len(json.loads(invoke(*given, "--json").stdout)["gates"]) == found


def test_gates_of_a_run_whose_steps_were_fitted_to_a_time(place: Path, taught: dict[str, Any]) -> None:
    folder = place / "out" / "4x"
    folder.mkdir(parents=True)
    given = [*arguments(place)[:-2], "--seconds", "90"]
    invoke(*given)
    recipe = asdict(taught["recipe"]) | {"steps": 8}  # as the run's own recipe has it in the end
    measured = {"training": {"recipe": recipe, "measured": {"kl": 0.5}}}
    (folder / "config.json").write_text(json.dumps(measured))
    assert json.loads(invoke(*given, "--json").stdout)["gates"] == {str(folder): {"kl": 0.5}}
    assert "stopped" not in invoke(*given).stdout


# ---- speed


def test_speed_and_share_of_peak(place: Path, taught: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of 2 seconds each; the peak as a GPU would have it."""
    monkeypatch.setattr(teaching, "matmul_rate", lambda device: 1e6)
    enter = teaching.Teaching.__enter__

    def on_gpu(self: teaching.Teaching) -> teaching.Teaching:
        self.device = torch.device("cuda")
        return enter(self)

    monkeypatch.setattr(teaching.Teaching, "__enter__", on_gpu)
    result = invoke(*arguments(place, "--steps", "20", "--json"))
    got = json.loads(result.stdout)
    assert got["tokens_per_s"] == ROWS * LENGTH / 2.0
    assert got["share_of_peak"] == pytest.approx(got["flops_per_token"] * 256 / 1e6)
    share = f"{got['share_of_peak']:.0%} of the peak"
    assert f"about 0:00:28 to go at 256 tokens/s, {share}" in " ".join(result.stderr.split())


# ---- what is refused


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--data", "./nowhere.txt"], "./nowhere.txt stands for no text"),
        (["--ratio", "four"], "--ratio 'four': pass numbers"),
        (["--ratio", "0.75"], "1/(1-r): ratio=4"),
        (["--ratio", "4,2"], "pass them ascending"),
        (["--ratio", "40"], "Train on longer rows, or lower the delay"),
        (["--method", "magic"], "method='magic': gates are for one of dms, fold, dmc"),
        (["--method", "dmc"], "delay=8 for dmc: dmc merges at once (0)"),
        (["--delay", "0"], "delay=0 for dms"),
        (["--train", "heads"], "train='heads': one of gates, lora, full"),
        (["--adapt", "head"], "adapt='head'"),
        (["--tokens", "5"], "each says how long to train. A step is 512 tokens"),
        (["--length", "1000", "--delay", "8"], "knows 512 positions"),
        (["--recall-share", "1.5"], "recall_share=1.5"),
        (["--model", "./nowhere"], "'./nowhere' is not a folder"),
        (["--device", "toaster"], "device='toaster'"),
    ],
)
def test_what_does_not_fit_ends_with_2_and_a_remedy(place: Path, more: list[str], message: str) -> None:
    result = invoke(*arguments(place), *more)
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    assert not (place / "out").exists()


def test_data_and_out_must_be_named(place: Path) -> None:
    for option in ("--data", "--out"):
        given = arguments(place)
        at = given.index(option)
        result = invoke(*given[:at], *given[at + 2 :])
        assert result.exit_code == 2
        assert option in result.stderr


def test_texts_to_judge_on_are_not_trained_on(place: Path) -> None:
    result = invoke(*arguments(place, "--held-out", str(place / "*.txt")))
    assert result.exit_code == 2
    assert f"{place / 'train.txt'}: named by --data and by --held-out" in result.stderr


def test_texts_to_judge_on_must_be_long_enough(place: Path) -> None:
    (place / "judge.txt").write_text("Too short.")
    result = invoke(*arguments(place, "--held-out", str(place / "judge.txt")))
    assert result.exit_code == 2
    assert "there is no whole row to judge on" in result.stderr


def test_a_checkpoint_of_another_recipe_is_refused(place: Path) -> None:
    given = arguments(place, "--steps", "2", "--save-every", "1")
    assert invoke(*given).exit_code == 0
    result = invoke(*given, "--rate", "0.5")
    assert result.exit_code == 2
    assert "Pass the same options, or another --out" in result.stderr
    assert invoke(*given, "--rate", "0.5", "--no-resume").exit_code == 0


def test_lora_needs_peft(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = module.importlib.util.find_spec
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None if name == "peft" else found(name))
    result = invoke(*arguments(place, "--train", "lora"))
    assert result.exit_code == 2
    assert "pip install 'kvpleat[retrofit]'" in result.stderr


def test_importing_kvpleat_does_not_import_retrofit() -> None:
    code = "import kvpleat, sys; print([m for m in sys.modules if m.startswith(('kvpleat.retrofit', 'kvpleat.cli'))])"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
