"""What users see of the engine, over a core without a model: order, samples, stops, streams, cancelling, failures."""

import asyncio
import dataclasses
import gc
import itertools
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from kvpleat.engine import base
from kvpleat.engine.async_llm import AsyncLLM, joined
from kvpleat.engine.llm import LLM
from kvpleat.engine.params import CompletionOutput, Logprob, Request, RequestOutput, RequestOutputKind, SamplingParams
from kvpleat.errors import EngineError, OptionError
from kvpleat.policies import Full, Window
from tests.engine import tokenizers
from tests.engine.fake_core import END, LONGEST, FakeCore
from tests.engine.tokenizers import encode

CUMULATIVE, DELTA, FINAL_ONLY = RequestOutputKind.CUMULATIVE, RequestOutputKind.DELTA, RequestOutputKind.FINAL_ONLY
TOKENIZER = tokenizers.of_bytes()
MANY = SamplingParams(max_tokens=100)
TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}>{% endif %}"
)


def text_of(tokens: Sequence[int]) -> str:
    return str(TOKENIZER.decode(list(tokens)))


def echo(request: Request) -> list[int]:
    """The prompt again, in brackets: any request's answer tells whose it is."""
    return encode(TOKENIZER, f"[{text_of(request.prompt)}]")


def says(text: str) -> Callable[[Request], list[int]]:
    return lambda request: encode(TOKENIZER, text)


@pytest.fixture
def core(monkeypatch: pytest.MonkeyPatch) -> FakeCore:
    """The core that the next engine gets. Its attributes may be changed before."""
    made = FakeCore(echo)

    def make(model: nn.Module, policy: Any, **options: Any) -> FakeCore:
        made.options = {"model": model, "policy": policy, **options}
        return made

    monkeypatch.setattr(base, "make_core", make)
    return made


@pytest.fixture
def llm(core: FakeCore) -> Iterator[LLM]:
    with LLM(nn.Identity(), tokenizer=TOKENIZER) as made:
        yield made
    assert core.closed == 1
    assert len(core.threads) == 1


@pytest.fixture
def served(core: FakeCore) -> Iterator[AsyncLLM]:
    made = AsyncLLM(nn.Identity(), tokenizer=TOKENIZER)
    yield made
    made.close()
    assert core.closed == 1
    assert not made._thread.is_alive()
    assert core.threads - {threading.get_ident()} == {made._thread.ident}, "the core is one thread's"


# ---- prompts and outputs


def test_outputs_are_in_the_order_of_the_prompts(llm: LLM, core: FakeCore) -> None:
    """More prompts than run at a time, the long ones first, so that they end in another order."""
    prompts = [letter * (20 - 2 * i) for i, letter in enumerate("abcdefgh")]
    outputs = llm.generate(prompts, MANY)
    assert [output.prompt for output in outputs] == prompts
    for prompt, output in zip(prompts, outputs, strict=True):
        assert output.finished
        assert output.prompt_token_ids == encode(TOKENIZER, prompt)
        (sample,) = output.outputs
        assert sample.text == f"[{prompt}]"
        assert sample.token_ids == [*encode(TOKENIZER, f"[{prompt}]"), END]
        assert (sample.index, sample.finish_reason, sample.stop_reason) == (0, "stop", None)
        assert sample.finished()
        assert (sample.logprobs, sample.cumulative_logprob) == (None, None)
    assert len({output.request_id for output in outputs}) == 8
    assert core.unfinished == 0
    assert core.cancelled == []


def test_prompts_come_in_many_forms(llm: LLM) -> None:
    """Text, tokens, and vLLM's dictionaries; one alone or in a list."""
    tokens = encode(TOKENIZER, "ab")
    forms = [
        "ab",
        tokens,
        tuple(tokens),
        {"prompt": "ab"},
        {"prompt_token_ids": tokens},
        {"prompt": "ab", "prompt_token_ids": None},
    ]
    for form in forms:
        (alone,) = llm.generate(form, MANY)
        assert alone.outputs[0].text == "[ab]"
        assert alone.prompt == ("ab" if "ab" in str(form) else None)
    assert [output.outputs[0].text for output in llm.generate(forms, MANY)] == ["[ab]"] * len(forms)
    assert llm.generate([], MANY) == []


def test_parameters_are_for_all_or_for_each(llm: LLM, core: FakeCore) -> None:
    """And the defaults without any: 16 tokens."""
    assert [len(x.outputs[0].token_ids) for x in llm.generate(["a" * 40, "b" * 40])] == [16, 16]
    each = [SamplingParams(max_tokens=3), SamplingParams(max_tokens=5, output_kind=DELTA)]
    outputs = llm.generate(["a" * 40, "b" * 40], each)
    assert [x.outputs[0].text for x in outputs] == ["[aa", "[bbbb"]
    assert [x.outputs[0].finish_reason for x in outputs] == ["length", "length"]
    with pytest.raises(OptionError, match="2 sampling_params for 3 prompts"):
        llm.generate(["a", "b", "c"], each)
    with pytest.raises(OptionError, match="does not say how to sample"):
        llm.generate("a", {"max_tokens": 3})  # type: ignore[arg-type]
    assert core.unfinished == 0


def test_special_tokens_go_around_text_but_not_around_chats(core: FakeCore) -> None:
    """A template writes its own."""
    starting = tokenizers.byte_model.tokenizer(start=True)
    starting.chat_template = TEMPLATE
    with LLM(nn.Identity(), tokenizer=starting) as llm:
        llm.generate("a", MANY)
        (output,) = llm.chat([{"role": "user", "content": "a"}], MANY)
        assert output.prompt == "<user>a>"
        assert [text_of(r.prompt) for r in core.added] == ["<s>a", "<user>a>"]
        two = llm.chat([[{"role": "user", "content": c}] for c in "xy"], MANY, add_generation_prompt=False)
        assert [output.outputs[0].text for output in two] == ["[<user>x]", "[<user>y]"]
        (other,) = llm.chat([{"role": "user", "content": "a"}], MANY, chat_template="{{ mood }}", mood="fine")
        assert other.prompt == "fine"
        assert llm.chat([], MANY) == []
        with pytest.raises(OptionError, match="does not take these messages"):
            llm.chat([{"role": "user"}], MANY, chat_template="{{ messages[0]['content'] + 1 }}")


def test_samples_of_a_prompt_are_requests_of_their_own(llm: LLM, core: FakeCore) -> None:
    """With seeds of their own, in order, though they end in another one."""
    core.answer = lambda request: encode(TOKENIZER, "x" * (9 - (request.params.seed or 0)))
    outputs = llm.generate(["a", "b"], SamplingParams(n=4, seed=3, max_tokens=50))
    for output in outputs:
        assert [sample.index for sample in output.outputs] == [0, 1, 2, 3]
        assert [sample.text for sample in output.outputs] == ["x" * 6, "x" * 5, "x" * 4, "x" * 3]
    assert [request.params.seed for request in core.added] == [3, 4, 5, 6] * 2
    llm.generate("a", SamplingParams(n=2))
    assert [request.params.seed for request in core.added[8:]] == [None, None]
    assert len({request.id for request in core.added}) == 10


# ---- how a sample ends


@pytest.mark.parametrize("include", [False, True])
def test_a_stop_string_ends_text_tokens_and_request(llm: LLM, core: FakeCore, include: bool) -> None:
    """The core is told, and what it still brings is not looked at."""
    core.answer = says("one END two")
    params = SamplingParams(stop=["nothing", "END"], max_tokens=50, include_stop_str_in_output=include)
    (output,) = llm.generate("a", params)
    (sample,) = output.outputs
    assert sample.text == ("one END" if include else "one ")
    assert text_of(sample.token_ids) == "one END", "the tokens that made the stop string are part of the answer"
    assert (sample.finish_reason, sample.stop_reason) == ("stop", "END")
    assert core.cancelled == [core.added[0].id]
    assert core.unfinished <= 1  # what was on its way


@pytest.mark.parametrize("include", [False, True])
def test_a_stop_token_ends_it_and_is_no_text(llm: LLM, core: FakeCore, include: bool) -> None:
    """Unless asked for; its id is the reason. The model's own end token is no stop_reason."""
    core.answer = says("one;two")
    (stop,) = encode(TOKENIZER, ";")
    params = SamplingParams(stop_token_ids=[stop], max_tokens=50, include_stop_str_in_output=include)
    (sample,) = llm.generate("a", params)[0].outputs
    assert sample.text == ("one;" if include else "one")
    assert text_of(sample.token_ids) == "one;"
    assert (sample.finish_reason, sample.stop_reason) == ("stop", stop)
    (sample,) = llm.generate("a", MANY)[0].outputs
    assert (sample.text, sample.finish_reason, sample.stop_reason) == ("one;two", "stop", None)
    params = dataclasses.replace(MANY, skip_special_tokens=False, include_stop_str_in_output=include)
    assert llm.generate("a", params)[0].outputs[0].text == ("one;two</s>" if include else "one;two")


def test_what_may_have_become_a_stop_string_is_text_at_the_end(llm: LLM, core: FakeCore) -> None:
    """At max_tokens, and at an end token. A stop string that the last token completes is one."""
    core.answer = says("one EN")
    assert llm.generate("a", SamplingParams(stop="END", max_tokens=50))[0].outputs[0].text == "one EN"
    assert llm.generate("a", SamplingParams(stop="END", max_tokens=6))[0].outputs[0].finish_reason == "length"
    (sample,) = llm.generate("a", SamplingParams(stop="EN", max_tokens=6))[0].outputs
    assert (sample.text, sample.finish_reason, sample.stop_reason) == ("one ", "stop", "EN")


def test_a_request_that_fails_keeps_what_it_has_and_harms_no_other(llm: LLM, core: FakeCore) -> None:
    """NaN in its logits, or more memory than there is."""
    core.answer = lambda r: (
        [*echo(r)[:3], {"b": -1, "d": -2}[text_of(r.prompt)]] if text_of(r.prompt) in "bd" else echo(r)
    )
    samples = [output.outputs[0] for output in llm.generate(["a", "b", "c", "d"], MANY)]
    assert [sample.text for sample in samples] == ["[a]", "[b]", "[c]", "[d]"]
    assert [sample.finish_reason for sample in samples] == ["stop", "error", "stop", "memory"]
    assert [len(sample.token_ids) for sample in samples] == [4, 3, 4, 3]


def test_log_probabilities(llm: LLM) -> None:
    """The chosen token first, then the likeliest, each with its rank and text; their sum besides."""
    (sample,) = llm.generate("a", SamplingParams(logprobs=2, max_tokens=2))[0].outputs
    first, second = sample.token_ids
    assert sample.logprobs is not None
    assert sample.logprobs[0] == {first: Logprob(-0.5, 1, "["), first + 1: Logprob(-1.5, 2, text_of([first + 1]))}
    assert sample.logprobs[1] == {second: Logprob(-0.5, 2, "a"), second + 1: Logprob(-1.0, 1, "b")}
    assert list(sample.logprobs[1]) == [second, second + 1]
    assert sample.cumulative_logprob == -1.0
    (sample,) = llm.generate("a", SamplingParams(logprobs=0, max_tokens=3, stop="a"))[0].outputs
    assert sample.logprobs is not None
    assert [list(each) for each in sample.logprobs] == [[token] for token in sample.token_ids]


def test_without_a_tokenizer_there_are_tokens(core: FakeCore) -> None:
    """Prompts of tokens, outputs of tokens, and clear words for all else."""
    with LLM(nn.Identity()) as llm:
        (output,) = llm.generate([5, 6], SamplingParams(detokenize=False, logprobs=1))
        assert output.outputs[0].text == ""
        assert output.outputs[0].token_ids[0] == encode(TOKENIZER, "[")[0]
        assert output.outputs[0].logprobs is not None
        assert {x.decoded_token for x in output.outputs[0].logprobs[0].values()} == {None}
        with pytest.raises(OptionError, match="detokenize=False"):
            llm.generate([5, 6])
        with pytest.raises(OptionError, match="cannot become tokens"):
            llm.generate("a", SamplingParams(detokenize=False))
        with pytest.raises(OptionError, match="no tokenizer, so messages"):
            llm.chat([{"role": "user", "content": "a"}])


# ---- what goes wrong


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("", "A prompt of 0 tokens"),
        ([], "A prompt of 0 tokens"),
        ("a" * LONGEST, "A prompt of 200 tokens"),
        (3.5, "neither text nor a list of tokens"),
        ([1.5], "neither text nor a list of tokens"),
        (["a", "b"], "neither text nor a list of tokens"),
        ([True], "neither text nor a list of tokens"),
        ({"prompt": "a", "prompt_token_ids": [1]}, "either 'prompt'"),
        ({"prompt": "a", "image": 3}, "either 'prompt'"),
        ({}, "either 'prompt'"),
    ],
    ids=str,
)
def test_a_prompt_that_cannot_be_used_is_refused_and_nothing_stays(
    llm: LLM, core: FakeCore, prompt: Any, message: str
) -> None:
    """Also where others before it were taken already; the engine goes on."""
    with pytest.raises(OptionError, match=message):
        llm.generate(["fine", prompt], MANY)
    assert core.unfinished == 0
    assert core.steps == 0
    assert llm.generate("a", MANY)[0].outputs[0].text == "[a]"
    with pytest.raises(OptionError, match="no chat template"):
        llm.chat([{"role": "user", "content": "a"}])


def test_a_failure_of_the_engine_is_told_from_then_on(llm: LLM, core: FakeCore) -> None:
    """With its cause."""

    def fail(number: int) -> None:
        if number == 2:
            raise RuntimeError("device is gone")

    core.before_step = fail
    with pytest.raises(EngineError, match="RuntimeError: device is gone") as caught:
        llm.generate(["a", "b"], MANY)
    assert isinstance(caught.value.__cause__, RuntimeError)
    with pytest.raises(EngineError, match="device is gone"):
        llm.generate("a", MANY)
    assert core.steps == 2


def test_a_core_that_loses_requests_is_a_failure(llm: LLM, core: FakeCore) -> None:
    """Instead of waiting for ever."""
    core.before_step = lambda number: core._live.clear()
    with pytest.raises(EngineError, match="lost 2 requests"):
        llm.generate(["a", "b"], MANY)


def test_a_tokenizer_that_fails_ends_its_request(llm: LLM, core: FakeCore, monkeypatch: pytest.MonkeyPatch) -> None:
    """The call raises what it raised, and nothing of it runs on."""
    monkeypatch.setattr(type(TOKENIZER), "decode", lambda *a, **k: 1 / 0)
    core.answer = lambda request: [5, 6, 7]
    with pytest.raises(ZeroDivisionError):
        llm.generate([[5], [6]], MANY)
    monkeypatch.undo()
    core.step()
    assert core.unfinished == 0


def test_control_c_waits_for_the_step_and_leaves_an_engine_that_works(llm: LLM, core: FakeCore) -> None:
    """The step ends, the requests are cancelled, and the handler is what it was."""
    ended = []

    def press(number: int) -> None:
        if number == 3:
            signal.raise_signal(signal.SIGINT)
            ended.append(number)

    core.before_step = press
    with pytest.raises(KeyboardInterrupt):
        llm.generate(["a", "b"], MANY)
    assert ended == [3], "the step went on"
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    core.step()
    assert core.unfinished == 0
    assert llm.generate("c", MANY)[0].outputs[0].text == "[c]"
    core.steps = 0
    core.before_step = lambda number: [signal.raise_signal(signal.SIGINT), signal.raise_signal(signal.SIGINT)]  # type: ignore[assignment]
    with pytest.raises(KeyboardInterrupt):
        llm.generate("a", MANY)
    with pytest.raises(EngineError, match="KeyboardInterrupt"):
        llm.generate("a", MANY)


def test_a_closed_engine_says_so(core: FakeCore) -> None:
    """And closing twice is no error."""
    llm = LLM(nn.Identity(), tokenizer=TOKENIZER)
    llm.close()
    llm.close()
    assert core.closed == 1
    with pytest.raises(EngineError, match="was closed"):
        llm.generate("a")


def test_a_progress_bar_comes_only_if_asked_for(llm: LLM, capfd: pytest.CaptureFixture[str]) -> None:
    """On stderr."""
    llm.generate(["a", "b"], MANY)
    assert capfd.readouterr() == ("", "")
    llm.generate(["a", "b"], MANY, use_tqdm=True)
    out, err = capfd.readouterr()
    assert out == ""
    assert "2/2" in err


def test_threads_wait_for_each_other(core: FakeCore) -> None:
    """Each gets its own answers."""
    core.before_step = lambda number: time.sleep(0.001)
    llm, found = LLM(nn.Identity(), tokenizer=TOKENIZER), {}

    def ask(name: str) -> None:
        found[name] = [x.outputs[0].text for x in llm.generate([name, name * 2], MANY)]

    threads = [threading.Thread(target=ask, args=(name,)) for name in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {name: [f"[{name}]", f"[{name * 2}]"] for name in "abcd"}
    llm.close()


# ---- making an engine


def test_a_model_is_found_by_name(core: FakeCore, tiny_folder: Path) -> None:
    """With its tokenizer; the arguments reach the core."""
    options = {"kv_memory": "1MiB", "max_num_seqs": 3, "max_num_batched_tokens": 64, "max_model_len": 99}
    options |= {"max_logprobs": 5, "seed": 7, "enforce_eager": True, "compile": True, "page_size": 32}
    options |= {"enable_prefix_caching": False}
    policy = Window(ratio=2.0)
    with LLM(str(tiny_folder), policy, dtype="bfloat16", device="cpu", **options) as llm:
        given = dict(core.options)
        model = given.pop("model")
        assert type(model).__name__ == "LlamaForCausalLM"
        assert model.dtype == torch.bfloat16
        assert given == {"policy": policy, **options}
        assert llm.tokenizer.eos_token == "<|end|>"
    loaded = base.models.load(str(tiny_folder), device="cpu", progress=False)
    with LLM(loaded) as llm:
        assert core.options["model"] is loaded.model
        assert core.options["policy"] == Full()
        assert llm.tokenizer is loaded.tokenizer
    with LLM(loaded, tokenizer=TOKENIZER) as llm:
        assert llm.tokenizer is TOKENIZER
    with pytest.raises(OptionError, match="this one is loaded"):
        LLM(loaded, dtype="float32")
    with pytest.raises(OptionError, match="this one is loaded"):
        LLM(loaded.model, device="cpu")
    with pytest.raises(TypeError, match="gpu_memory"):
        LLM(loaded, gpu_memory=3)  # type: ignore[call-arg]


# ---- streams


async def stream(llm: AsyncLLM, prompt: str, params: SamplingParams, pause: float = 0) -> list[RequestOutput]:
    found = []
    async for output in llm.generate(prompt, params):
        found.append(output)
        await asyncio.sleep(pause)
    return found


@pytest.mark.parametrize("kind", list(RequestOutputKind))
def test_a_stream_says_all_or_what_is_new_or_the_end(served: AsyncLLM, core: FakeCore, kind: RequestOutputKind) -> None:
    """Its sum, or its last output, is the whole answer."""
    core.before_step = lambda number: time.sleep(0.01)  # so that the reader sees more than the end
    params = dataclasses.replace(MANY, output_kind=kind, logprobs=1, stop="lo!")
    outputs = asyncio.run(stream(served, "hello", params))
    assert [output.finished for output in outputs] == [False] * (len(outputs) - 1) + [True]
    samples = [output.outputs[0] for output in outputs]
    tokens = [*encode(TOKENIZER, "[hello]"), END]
    if kind is DELTA:
        assert "".join(sample.text for sample in samples) == "[hello]"
        assert [token for sample in samples for token in sample.token_ids] == tokens
        assert sum(len(sample.logprobs or ()) for sample in samples) == len(tokens)
    else:
        assert samples[-1].text == "[hello]"
        assert samples[-1].token_ids == tokens
        assert len(samples[-1].logprobs or ()) == len(tokens)
        assert all(b.text.startswith(a.text) for a, b in itertools.pairwise(samples))
        assert (len(samples) == 1) == (kind is FINAL_ONLY)
    assert samples[-1].cumulative_logprob == -0.5 * len(tokens)
    assert {output.prompt for output in outputs} == {"hello"}


@pytest.mark.parametrize("kind", [CUMULATIVE, DELTA])
def test_a_slow_reader_loses_nothing_and_holds_up_nobody(
    served: AsyncLLM, core: FakeCore, kind: RequestOutputKind
) -> None:
    """What came meanwhile is joined: fewer outputs than tokens, and the same text."""
    params = dataclasses.replace(MANY, output_kind=kind, n=2)

    async def both() -> tuple[list[RequestOutput], list[RequestOutput]]:
        slow = asyncio.create_task(stream(served, "s" * 60, params, pause=0.05))
        fast = await stream(served, "f" * 60, params)
        assert not slow.done()
        return await slow, fast

    slow, fast = asyncio.run(both())
    assert len(slow) < 30
    for outputs, letter in ((slow, "s"), (fast, "f")):
        for index in range(2):
            samples = [s for output in outputs for s in output.outputs if s.index == index]
            text = "".join(s.text for s in samples) if kind is DELTA else samples[-1].text
            assert text == f"[{letter * 60}]"
            assert samples[-1].finish_reason == "stop"


def test_many_streams_at_once(served: AsyncLLM, core: FakeCore) -> None:
    """Each its own answer, also from several event loops."""
    core.width = 7

    async def all_of(letter: str) -> list[str]:
        outputs = await asyncio.gather(*(stream(served, letter * i, MANY) for i in range(1, 20)))
        return [each[-1].outputs[0].text for each in outputs]

    found: dict[str, list[str]] = {}
    threads = [threading.Thread(target=lambda x=x: found.update({x: asyncio.run(all_of(x))})) for x in "xyz"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {letter: [f"[{letter * i}]" for i in range(1, 20)] for letter in "xyz"}
    assert served._mailboxes == {}


def test_an_idle_engine_does_nothing(served: AsyncLLM, core: FakeCore) -> None:
    """No step without requests, before the first and after the last."""
    time.sleep(0.05)
    assert core.steps == 0
    asyncio.run(stream(served, "a", MANY))
    steps = core.steps
    time.sleep(0.05)
    assert core.steps == steps


def test_chats_stream_too(core: FakeCore) -> None:
    """In the template."""
    starting = tokenizers.byte_model.tokenizer(start=True)
    starting.chat_template = TEMPLATE

    async def main() -> str:
        async with AsyncLLM(nn.Identity(), tokenizer=starting) as llm:
            async for output in llm.chat([{"role": "user", "content": "hi"}], MANY):
                last = output
        return last.outputs[0].text

    assert asyncio.run(main()) == "[<user>hi>]"
    assert core.closed == 1


# ---- cancelling


async def until(true: Callable[[], bool]) -> None:
    for _ in range(2000):
        if true():
            return
        await asyncio.sleep(0.001)
    raise AssertionError("it never came to that")


@pytest.mark.parametrize("way", ["break", "aclose", "task"])
def test_leaving_a_stream_cancels_its_request(served: AsyncLLM, core: FakeCore, way: str) -> None:
    """By break, by closing it, or by cancelling the task that reads it; another stream goes on."""
    core.answer = lambda request: [5] * 10_000 if text_of(request.prompt) == "endless" else echo(request)
    core.before_step = lambda number: time.sleep(0.0005)
    endless = SamplingParams(max_tokens=None, n=2)

    async def main() -> str:
        other = asyncio.create_task(stream(served, "o" * 50, MANY))
        if way == "task":
            task = asyncio.create_task(stream(served, "endless", endless))
            await until(lambda: len(core.added) >= 2)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        else:
            generator = served.generate("endless", endless)
            async for _ in generator:
                break
            if way == "aclose":
                await generator.aclose()
            del generator
            gc.collect()
        await until(lambda: len(core.cancelled) == 2)
        return (await other)[-1].outputs[0].text

    assert asyncio.run(main()) == f"[{'o' * 50}]"
    assert {r.id for r in core.added if text_of(r.prompt) == "endless"} == set(core.cancelled)
    assert served._mailboxes == {}


@pytest.mark.parametrize("kind", list(RequestOutputKind))
def test_a_request_can_be_cancelled_by_name(served: AsyncLLM, core: FakeCore, kind: RequestOutputKind) -> None:
    """Its reader gets what there is; a name that is not there is no error."""
    core.answer = lambda request: [5] * 10_000
    core.before_step = lambda number: time.sleep(0.0005)
    params = SamplingParams(max_tokens=None, output_kind=kind)

    async def main() -> list[RequestOutput]:
        async def read() -> list[RequestOutput]:
            return [output async for output in served.generate("a", params, request_id="mine")]

        reader = asyncio.create_task(read())
        await until(lambda: core.steps > 5)
        await served.abort("another")
        await served.abort("mine")
        return await asyncio.wait_for(reader, 10)

    outputs = asyncio.run(main())
    assert outputs[-1].finished
    assert outputs[-1].request_id == "mine"
    assert outputs[-1].outputs[0].finish_reason == "abort"
    assert core.cancelled == ["mine"]
    assert sum(len(x.outputs[0].token_ids) for x in outputs) > 3


def test_a_reader_whose_event_loop_is_gone_is_forgotten(served: AsyncLLM, core: FakeCore) -> None:
    """Without harm to others."""
    core.answer = lambda request: [5] * 10_000 if text_of(request.prompt) == "endless" else echo(request)
    core.before_step = lambda number: time.sleep(0.0005)
    loop = asyncio.new_event_loop()
    generator = served.generate("endless", SamplingParams(max_tokens=None))
    loop.run_until_complete(generator.__anext__())
    loop.close()
    assert asyncio.run(stream(served, "b", MANY))[-1].outputs[0].text == "[b]"
    asyncio.run(until(lambda: len(core.cancelled) == 1))
    assert served._mailboxes == {}


# ---- what goes wrong in a stream


def test_one_bad_request_harms_no_other(served: AsyncLLM, core: FakeCore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused by the core, refused before, failing in the tokenizer, NaN: each is told to its reader alone."""
    bad = 77
    decode = type(TOKENIZER).decode

    def careful(self: Any, ids: Any, **options: Any) -> Any:
        if bad in ids:
            raise ZeroDivisionError("no such token")
        return decode(self, ids, **options)

    monkeypatch.setattr(type(TOKENIZER), "decode", careful)
    core.answer = lambda r: {"t": [5, bad], "n": [5, -1]}.get(text_of(r.prompt)) or echo(r)
    core.width = 10

    async def main() -> list[Any]:
        prompts: list[Any] = ["fine" * 5, "a" * LONGEST, "t", "n", "fine"]
        tasks = [asyncio.create_task(stream(served, prompt, MANY)) for prompt in prompts]
        with pytest.raises(OptionError, match="neither text"):
            served.generate(3.5, MANY)  # type: ignore[arg-type]
        return await asyncio.gather(*tasks, return_exceptions=True)

    fine, long, tokens, nan, again = asyncio.run(main())
    assert fine[-1].outputs[0].text == f"[{'fine' * 5}]"
    assert again[-1].outputs[0].text == "[fine]"
    assert isinstance(long, OptionError)
    assert isinstance(tokens, ZeroDivisionError)
    assert nan[-1].outputs[0].finish_reason == "error"
    assert nan[-1].outputs[0].token_ids == [5]
    assert served._mailboxes == {}


def test_a_name_can_be_used_once_at_a_time(served: AsyncLLM, core: FakeCore) -> None:
    """The first goes on; afterwards the name is free, also where samples are several."""

    async def read(params: SamplingParams) -> list[RequestOutput]:
        return [output async for output in served.generate("a" * 30, params, request_id="x")]

    async def main() -> list[Any]:
        many = dataclasses.replace(MANY, n=2)
        both = await asyncio.gather(read(MANY), read(many), return_exceptions=True)
        return [*both, await read(many), await read(MANY)]

    first, second, third, fourth = asyncio.run(main())
    assert isinstance(second, OptionError)
    assert "'x'" in str(second)
    for outputs in (first, third, fourth):
        assert outputs[-1].outputs[0].text == f"[{'a' * 30}]"


def test_a_failure_reaches_everybody_who_waits(core: FakeCore) -> None:
    """Running, waiting, and those who come later; the memory is freed by close."""

    def fail(number: int) -> None:
        if number == 4:
            raise RuntimeError("device is gone")

    core.before_step, core.width = fail, 2

    async def main() -> list[Any]:
        return await asyncio.gather(*(stream(served, c * 50, MANY) for c in "abcde"), return_exceptions=True)

    served = AsyncLLM(nn.Identity(), tokenizer=TOKENIZER)
    found = asyncio.run(main())
    assert [type(each) for each in found] == [EngineError] * 5
    assert all("RuntimeError: device is gone" in str(each) for each in found)
    assert len({id(each) for each in found}) == 5
    with pytest.raises(EngineError, match="device is gone"):
        asyncio.run(stream(served, "a", MANY))
    assert core.closed == 0
    served.close()
    assert core.closed == 1
    with pytest.raises(EngineError, match="was closed"):
        asyncio.run(stream(served, "a", MANY))


def test_closing_tells_everybody_who_waits(core: FakeCore) -> None:
    """Instead of letting them wait for ever; twice is no error."""
    core.answer = lambda request: [5] * 10_000
    core.before_step = lambda number: time.sleep(0.0005)

    async def main() -> list[Any]:
        async with AsyncLLM(nn.Identity(), tokenizer=TOKENIZER) as llm:
            tasks = [asyncio.create_task(stream(llm, c, SamplingParams(max_tokens=None))) for c in "abcde"]
            await until(lambda: core.steps > 3)
        llm.close()
        return await asyncio.gather(*tasks, return_exceptions=True)

    found = asyncio.run(main())
    assert [type(each) for each in found] == [EngineError] * 5
    assert all("was closed" in str(each) for each in found)
    assert core.closed == 1


def test_deltas_join() -> None:
    """By sample; what is new wins where it does not add up."""

    def delta(finished: bool, *samples: CompletionOutput) -> RequestOutput:
        return RequestOutput("r", "p", [1], list(samples), finished)

    a, b = {5: Logprob(-1.0, 1, "x")}, {6: Logprob(-2.0, 1, "y")}
    first = delta(False, CompletionOutput(1, "x", [5], -1.0, [a]))
    second = delta(True, CompletionOutput(0, "z", [7]), CompletionOutput(1, "y", [6], -3.0, [b], "stop", "q"))
    whole = delta(True, CompletionOutput(0, "z", [7]), CompletionOutput(1, "xy", [5, 6], -3.0, [a, b], "stop", "q"))
    assert joined(first, second) == whole


# ---- over the real core


@pytest.fixture(scope="module")
def tiny() -> base.models.LoadedModel:
    return tokenizers.byte_model.load()


SMALL: dict[str, Any] = {"kv_memory": "112KiB", "max_num_seqs": 3, "max_num_batched_tokens": 48, "max_model_len": 300}
PROMPTS = ["hello world", "the quick brown fox jumps over the lazy dog. " * 4, "x", "Grüße 🙂", "hello world"]


def test_greedy_answers_are_those_of_transformers(tiny: base.models.LoadedModel) -> None:
    """With prompts in pieces and decoding mixed; their log probabilities too; the model is left as it was."""
    implementation = tiny.model.config._attn_implementation
    with LLM(tiny, **SMALL) as llm:
        outputs = llm.generate(PROMPTS, SamplingParams(temperature=0, max_tokens=15, logprobs=2, ignore_eos=True))
    assert tiny.model.config._attn_implementation == implementation
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        ids = torch.tensor([encode(tiny.tokenizer, prompt)])
        options = {"max_new_tokens": 15, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        expected = tiny.model.generate(ids, attention_mask=torch.ones_like(ids), **options)[0]
        (sample,) = output.outputs
        assert sample.token_ids == expected[ids.shape[1] :].tolist()
        logits = tiny.model(expected[None]).logits[0, ids.shape[1] - 1 : -1].double()
        assert sample.logprobs is not None
        for row, token, found in zip(logits.log_softmax(-1), sample.token_ids, sample.logprobs, strict=True):
            assert found[token].logprob == pytest.approx(float(row[token]), abs=1e-3)
            assert found[token].rank == 1
            assert list(found)[:2] == row.topk(2).indices.tolist()


def test_samples_are_the_same_alone_in_a_batch_and_streamed(tiny: base.models.LoadedModel) -> None:
    """With seeds of their own; and without, where the engine's seed decides."""
    params = SamplingParams(n=2, seed=5, temperature=0.9, top_p=0.9, top_k=50, min_p=0.01, max_tokens=25)

    def said(output: RequestOutput) -> list[list[int]]:
        return [sample.token_ids for sample in output.outputs]

    with LLM(tiny, **SMALL) as llm:
        together = [said(output) for output in llm.generate(PROMPTS, params)]
        assert together == [said(llm.generate(prompt, params)[0]) for prompt in PROMPTS]
    assert together[0] == together[-1]
    assert together[0][0] != together[0][1]

    async def main() -> list[list[list[int]]]:
        async with AsyncLLM(tiny, **SMALL) as served:
            outputs = await asyncio.gather(*(stream(served, prompt, params) for prompt in PROMPTS))
            return [said(each[-1]) for each in outputs]

    assert asyncio.run(main()) == together
    unseeded = dataclasses.replace(params, seed=None)
    found = []
    for seed in (1, 1, 2):
        with LLM(tiny, seed=seed, **SMALL) as llm:
            found.append([said(output) for output in llm.generate(PROMPTS, unseeded)])
    assert found[0] == found[1] != found[2]
    assert found[0][0] != found[0][-1], "the same prompt twice is two requests"


def test_stop_strings_end_real_requests_early(tiny: base.models.LoadedModel) -> None:
    """The seats they leave serve those who wait."""
    params = SamplingParams(seed=1, max_tokens=60, ignore_eos=True)
    with LLM(tiny, **SMALL) as llm:
        whole = [output.outputs[0].text for output in llm.generate(PROMPTS, params)]
        stops = [text[8:11] for text in whole]
        each = [dataclasses.replace(params, stop=stop) for stop in stops]
        for text, stop, output in zip(whole, stops, llm.generate(PROMPTS, each), strict=True):
            assert output.outputs[0].text == text[: text.index(stop)]
            assert output.outputs[0].stop_reason == stop
