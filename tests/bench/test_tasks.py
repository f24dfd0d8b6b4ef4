"""Items are what they say, and what is measured on them is what an independent computation gives."""

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from kvpleat.bench import corpus, methods, tasks
from kvpleat.bench.tasks import Item, Source, Trial
from kvpleat.bench.tasks.asked import Asked
from kvpleat.bench.tasks.generation import TOP_P, Generation, sample
from kvpleat.errors import OptionError
from kvpleat.hf.models import LoadedModel
from tests.bench import byte_model

LENGTH = 8192  # bytes: the solved example of RULER's common words alone takes two thousand


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    """One model for all tests here."""
    return byte_model.load()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped texts under several names: enough windows of so many bytes."""
    path = tmp_path_factory.mktemp("data") / "texts.jsonl"
    texts = [text for _, text in corpus.read_documents(corpus.shipped())]
    lines = [json.dumps({"source": f"{i}", "text": "\n".join(texts[i % 5 :] + texts[: i % 5])}) for i in range(5)]
    path.write_text("\n".join(lines))
    return path


@pytest.fixture(scope="module")
def source(loaded: LoadedModel, data: Path) -> Source:
    """Two items of each kind."""
    return Source(loaded, data=data, lengths=(LENGTH,), count=2, depths=2)


@pytest.fixture(scope="module")
def short(loaded: LoadedModel) -> Source:
    """One short item of each kind, for what runs the model."""
    return Source(loaded, lengths=(3072,), count=1)


def text(loaded: LoadedModel, tokens: list[int]) -> str:
    """What tokens say."""
    return corpus.decode(loaded, tokens)


def asked(source: Source, name: str) -> list[Item]:
    """Items of an asking task."""
    return tasks.registry()[name].items(source)


def trial(loaded: LoadedModel, spec: str = "dynamic", shared: dict[str, Any] | None = None) -> Trial:
    """A method beside the reference."""
    reference = methods.parse("dynamic")
    method = reference if spec == "dynamic" else methods.parse(spec)
    return Trial(loaded, method, reference, {} if shared is None else shared)


@pytest.mark.parametrize("name", [name for name in tasks.registry() if name != "drift"])
def test_items_are_the_same_each_time(loaded: LoadedModel, source: Source, data: Path, name: str) -> None:
    """Same settings, same items; another seed, other items; ids are unique."""
    task = tasks.registry()[name]
    first, again = task.items(source), task.items(source)
    assert first == again
    assert len({item.id for item in first}) == len(first) > 0
    other = task.items(Source(loaded, data=data, lengths=(LENGTH,), count=2, depths=2, seed=1))
    assert [item.content for item in other] != [item.content for item in first]


@pytest.mark.parametrize("name", ["passkey", "multikey", "vt", "cwe", "fwe", "qa"])
def test_prompts_keep_to_their_length(source: Source, name: str) -> None:
    """Context and question together: at most the length, and close to it where text fills them."""
    for item in asked(source, name):
        for question in item.content.questions:
            total = len(item.content.context) + len(question.tokens)
            assert total <= LENGTH
            if name in ("passkey", "multikey"):
                assert total > LENGTH - 120


def test_pass_key_is_where_it_should_be(loaded: LoadedModel, source: Source) -> None:
    """The key is in the context at its depth and not in the question, which ends where the key would begin."""
    for item in asked(source, "passkey"):
        (question,) = item.content.questions
        context, key = text(loaded, item.content.context), question.references[0]
        place = context.index(f"The pass key is {key}.") / len(context)
        assert abs(place - question.group["depth"]) < 0.08
        assert text(loaded, question.tokens).endswith("The pass key is ")


def test_multikey_names_and_keys(loaded: LoadedModel, source: Source) -> None:
    """Four names with four keys, each asked for by its name."""
    content: Asked = asked(source, "multikey")[0].content
    context = text(loaded, content.context)
    assert len({q.references[0] for q in content.questions}) == 4
    for question in content.questions:
        name = re.search(r"pass key of (\w+)\?", text(loaded, question.tokens))
        assert name is not None
        assert f"The pass key of {name[1]} is {question.references[0]}." in context


def test_variables_are_those_of_the_chain(loaded: LoadedModel, source: Source) -> None:
    """Followed by hand through the last text: from the value over all assignments."""
    for item in asked(source, "vt"):
        (question,) = item.content.questions
        last = text(loaded, item.content.context).rpartition("hidden in the following text.")[2]
        value = re.search(r"assigned the value (\d+)", text(loaded, question.tokens))
        assert value is not None
        held = set(re.findall(rf"VAR (\w+) = {value[1]}\.", last))
        for _ in range(6):
            held |= {new for new, old in re.findall(r"VAR (\w+) = VAR (\w+)\.", last) if old in held}
        assert held == set(question.references)
        assert len(held) == 5


def test_common_words_are_the_most_common(loaded: LoadedModel, source: Source) -> None:
    """Counted by hand in the last list."""
    for item in asked(source, "cwe"):
        last = text(loaded, item.content.context).rpartition("appear most often.\n")[2]
        counts = Counter(re.findall(r"\d+\. (\w+)", last))
        top = {word for word, _ in counts.most_common(10)}
        assert top == set(item.content.questions[0].references)


def test_frequent_words_are_the_most_frequent(loaded: LoadedModel, source: Source) -> None:
    """Counted by hand; the dots lead and are left out."""
    for item in asked(source, "fwe"):
        last = text(loaded, item.content.context).rpartition("appeared coded words. ")[2]
        counts = Counter(last.split())
        assert counts.most_common(1)[0][0] == "..."
        fewest = min(counts[word] for word in item.content.questions[0].references)
        others = set(counts) - {"...", *item.content.questions[0].references}
        assert all(counts[word] <= fewest for word in others)


def test_answers_are_in_the_context(loaded: LoadedModel, source: Source) -> None:
    """Extractive: what is asked for stands there, and no solved example is asked."""
    solved = [q["question"] for q in json.loads(corpus.shipped("qa.json").read_text())["questions"][-3:]]
    for item in asked(source, "qa"):
        context = text(loaded, item.content.context)
        for question in item.content.questions:
            assert any(answer.lower() in context.lower() for answer in question.references)
            assert not any(known in text(loaded, question.tokens) for known in solved)


def test_texts_begin_as_the_model_expects() -> None:
    """A tokenizer that puts a token before every text gets it once, at the start."""
    loaded = byte_model.load(start=True)
    source = Source(loaded, lengths=(LENGTH,), count=1, depths=1)
    for name in ("passkey", "vt", "qa", "continuation", "generation", "multiturn"):
        content = tasks.registry()[name].items(source)[0].content
        tokens = {"generation": lambda c: c[0], "continuation": lambda c: c}.get(name, lambda c: c.context)(content)
        assert tokens[0] == 0
        assert tokens.count(0) == 1
        assert len(tokens) <= LENGTH


def test_continuation_against_a_plain_forward(loaded: LoadedModel, short: Source) -> None:
    """Loss, KL and agreement of a window cut by hand; the reference's from one forward over all."""
    item = tasks.registry()["continuation"].items(short)[0]
    (got,) = tasks.registry()["continuation"].measure(item, trial(loaded, "window:budget=128"))
    ids = torch.tensor([item.content])
    full = loaded.model(ids).logits[0, -257:-1].log_softmax(-1)
    with methods.parse("window:budget=128").open(loaded) as session:
        logits = torch.cat([session.prefill(ids[:, :-256]), session.decode(ids[:, -256:-1])[0]]).log_softmax(-1)
    targets = ids[0, -256:]
    assert got.scores["nll"] == pytest.approx(-float(logits.gather(1, targets[:, None]).sum()), rel=1e-5)
    assert got.scores["kl"] == pytest.approx(float((full.exp() * (full - logits)).sum()), rel=1e-3)
    assert got.scores["agree"] == float((full.argmax(-1) == logits.argmax(-1)).sum())
    assert got.memory["prompt"]["allocated_bytes"] < got.memory["full_bytes"] / 4


def test_reference_runs_once_an_item(loaded: LoadedModel, short: Source) -> None:
    """Its logits are shared by all methods of the item."""
    item, shared = tasks.registry()["continuation"].items(short)[0], dict[str, Any]()
    tasks.registry()["continuation"].measure(item, trial(loaded, "dynamic", shared))
    kept = shared["act"]
    (full,) = tasks.registry()["continuation"].measure(item, trial(loaded, "full", shared))
    assert shared["act"] is kept
    assert full.scores["kl"] < 1e-5
    assert full.scores["agree"] == 256


def test_turns_follow_each_other_on_one_cache(loaded: LoadedModel, short: Source) -> None:
    """Every turn sees all before it: the same answers as greedy decoding of the whole text so far, without a cache."""
    task = tasks.registry()["multiturn"]
    item = task.items(short)[0]
    seen: list[list[int]] = []

    class Spy(Trial):
        def run(self, act: Any) -> Any:
            with methods.parse("dynamic").open(self.loaded) as session:
                fed: list[int] = []
                for name in ("prefill", "decode"):
                    plain = getattr(session, name)

                    def noted(ids: torch.Tensor, plain: Any = plain) -> torch.Tensor:
                        fed.extend(ids[0].tolist())
                        return plain(ids)  # type: ignore[no-any-return]

                    setattr(session, name, noted)
                result = act(session)
                seen.append(fed)
                return result

    reference = methods.parse("dynamic")
    got = task.measure(item, Spy(loaded, reference, reference, {}))
    assert [one.group["turn"] for one in got] == list(range(1, len(got) + 1))
    fed, context = seen[0], item.content.context
    assert fed[: len(context)] == context
    for question, _ in item.content.turns:  # each question is fed once, in order, after what was answered before
        place = next(i for i in range(len(context), len(fed)) if fed[i : i + len(question)] == question)
        logits = loaded.model(torch.tensor([fed[: place + len(question)]])).logits[0, -1]
        following = fed[place + len(question) : place + len(question) + 1]
        assert not following or int(logits.argmax()) == following[0]


def test_generation_is_paired_and_judged_by_the_full_model(loaded: LoadedModel) -> None:
    """Equal methods write equal texts; the loss is that of the text under a plain forward."""

    class Short(Generation):
        tokens = 70

    source = Source(loaded, lengths=(1024,), count=1)
    item = Short().items(source)[0]
    shared: dict[str, Any] = {}
    (dynamic,) = Short().measure(item, trial(loaded, "dynamic", shared))
    (full,) = Short().measure(item, trial(loaded, "full", shared))
    assert full.scores["nll"] == pytest.approx(dynamic.scores["nll"], rel=1e-5)
    assert full.scores["kl"] < 1e-5
    parts = [full.scores["kl_0"], full.scores["kl_1"]]
    assert sum(parts) == pytest.approx(full.scores["kl"], abs=1e-9)
    assert len(full.memory["trace"]) == 3
    assert full.memory["trace"][1][0] == len(item.content[0]) + 32


def test_sampling_by_hand() -> None:
    """Probabilities .5 .3 .16 .04: the last is outside the likeliest 95%, the rest share the draw in order."""
    logits = torch.tensor([0.3, 0.5, 0.04, 0.16]).log()
    kept = 0.96
    assert kept > TOP_P
    for draw, token in ((0.0, 1), (0.49 / kept, 1), (0.51 / kept, 0), (0.79 / kept, 0), (0.81 / kept, 3), (0.999, 3)):
        assert sample(logits, draw) == token
    counts = Counter(sample(logits, (i + 0.5) / 960) for i in range(960))
    assert dict(counts) == {1: 500, 0: 300, 3: 160}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lengths": (100,)}, "at least 512 tokens"),
        ({"lengths": (32768,)}, "knows 16384 positions"),
        ({"forms": ("before",)}, "form 'before'"),
        ({"count": 0}, "at least 1"),
    ],
)
def test_bad_sources(loaded: LoadedModel, options: dict[str, Any], message: str) -> None:
    """Refused before anything is read."""
    with pytest.raises(OptionError, match=message):
        Source(loaded, **options)


def test_bad_files(loaded: LoadedModel, tmp_path: Path) -> None:
    """Each names the file and the format."""
    broken = tmp_path / "broken.json"
    broken.write_text('{"paragraphs": []}')
    with pytest.raises(OptionError, match=r"broken\.json is not a question-answering set"):
        asked(Source(loaded, qa=broken, lengths=(LENGTH,)), "qa")
    with pytest.raises(OptionError, match=r"broken\.json is not a multi-turn set"):
        tasks.registry()["multiturn"].items(Source(loaded, multiturn=broken, lengths=(LENGTH,)))
    with pytest.raises(OptionError, match="cannot be read as texts"):
        Source(loaded, data=broken, lengths=(LENGTH,)).windows(1024, 1)
    with pytest.raises(OptionError, match="windows of 2048 tokens and 5000"):
        Source(loaded).windows(2048, 5000)
    with pytest.raises(OptionError, match="no such task"):
        tasks.parse_list("passkey,nothing")


def test_drift_takes_twenty_turns(loaded: LoadedModel) -> None:
    """The shipped stories have them; the bytes of a text that has no room are refused."""
    items = tasks.registry()["drift"].items(Source(loaded, lengths=(4096,), count=2))
    assert [len(item.content.turns) for item in items] == [20, 20]
    with pytest.raises(OptionError, match="do not hold the story"):
        tasks.registry()["drift"].items(Source(loaded, lengths=(2048,), count=2))
