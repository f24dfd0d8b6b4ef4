"""vLLM with kvpleat in it says what transformers with kvpleat says, token for token, however a scheduler cuts the work.

A window is compared with full forwards without kvpleat and without a cache: inside vLLM it slides token by token, which
no policy of kvpleat.compress does.
"""

from collections.abc import Iterator
from typing import Any

import pytest

from tests.vllm import engines  # isort: skip  # skips this module where vLLM is not installed

import torch

import kvpleat
from tests import models

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.timeout(600)]  # of vLLM's

CASES = [
    *((family, method) for family in ("llama", "gpt2", "qwen3") for method in ("fold", "dms", "dmc", "window")),
    ("mistral", "fold"),
    ("qwen2", "dms"),
]
SIZES = (1, 15, 16, 17, 64, 65, 130, 200)  # one token, edges of pages and of chunks, several chunks


@pytest.fixture(scope="module", params=CASES, ids="-".join)
def case(request: Any, tmp_path_factory: Any) -> Iterator[engines.Case]:
    """One engine after the other, each for all tests that want it."""
    folder = tmp_path_factory.mktemp("-".join(request.param))
    model, policy, options = engines.make(folder, *request.param)
    with engines.started(folder / "model", **options) as llm:
        yield engines.Case(llm, model, policy)


def test_a_ragged_batch_and_a_second_turn(case: engines.Case) -> None:
    """Prompts of all sizes at once, in chunks; then each with its answer and something more as a prompt."""
    asked = engines.prompts(SIZES)
    want = case.want(asked)
    dense = engines.by_transformers(case.model, None, asked)
    assert sum(a != b for a, b in zip(want, dense, strict=True)) >= 3, "compression changes nothing here: a weak test"
    assert engines.answers(case.llm, asked) == want
    engines.assert_empty(case.llm)
    again = [[*p, *said, *more] for p, said, more in zip(asked, want, engines.prompts(SIZES, seed=1), strict=True)][1:6]
    assert engines.answers(case.llm, again, engines.told(12)) == case.want(again, 12)
    engines.assert_empty(case.llm)


# ---- what vLLM does with requests, on one engine: entries leave, merge and weigh

on_llama = pytest.mark.parametrize("case", [("llama", "fold")], indirect=True, ids="-".join)


@on_llama
def test_several_samples_of_a_prompt_come_again_with_their_seed(case: engines.Case) -> None:
    """n=2: two rows of one prompt. Beside a greedy request, which does not notice. All in one chunk: after parts of
    prompts vLLM's sampler sets a seed back, which it cannot on a CPU."""
    asked = [{"prompt_token_ids": p} for p in engines.prompts((20, 15))]
    several = engines.told(16, temperature=1.0, n=2, seed=3)
    runs = [case.llm.generate(asked, [several, engines.told(16)], use_tqdm=False) for _ in range(2)]
    first, second = ([[list(x.token_ids) for x in y.outputs] for y in run] for run in runs)
    assert first == second
    assert first[0][0] != first[0][1], "both samples are the same"
    assert first[1] == case.want([asked[1]["prompt_token_ids"]], 16)
    other = case.llm.generate(asked[:1], engines.told(16, temperature=1.0, n=2, seed=4), use_tqdm=False)
    assert [list(x.token_ids) for x in other[0].outputs] != first[0]
    engines.assert_empty(case.llm)


@on_llama
def test_requests_that_are_aborted_leave_nothing_behind(case: engines.Case) -> None:
    """In the middle of a prompt, in the middle of an answer, and before anything happened; the others go on."""
    engine, asked = case.llm.llm_engine, engines.prompts((20, 200, 30, 90, 50))
    want = case.want(asked[-1:])[0]
    for i, prompt in enumerate(asked):
        engine.add_request(str(i), {"prompt_token_ids": prompt}, engines.told())
    engine.abort_request(["0"])
    said: dict[str, list[int]] = {}
    for step in range(200):
        for out in engine.step():
            said[out.request_id] = list(out.outputs[0].token_ids)
        if step == 1:
            running = {x.request_id.rsplit("-", 1)[0]: x for x in engines.scheduler(case.llm).running}
            assert 0 < running["1"].num_computed_tokens < 200, "not in the middle of its prompt"
            engine.abort_request(["1"])
        if step == 8:
            assert 0 < len(said["2"]) < 24, "not in the middle of its answer"
            engine.abort_request(["2", "3"])
        if not engine.has_unfinished_requests():
            break
    assert said["4"] == want
    engines.assert_empty(case.llm)


@on_llama
def test_a_request_stops_where_it_is_told(case: engines.Case) -> None:
    """At a stop token, in the middle of a page; the others of the batch go on as they would."""
    asked = engines.prompts((33, 100), seed=2)
    want = case.want(asked)
    stop = want[0][5]
    cut = want[0].index(stop) + 1
    params = [engines.told(stop_token_ids=[stop]), engines.told()]
    done = case.llm.generate([{"prompt_token_ids": p} for p in asked], params, use_tqdm=False)
    assert [list(x.outputs[0].token_ids) for x in done] == [want[0][:cut], want[1]]
    assert [x.outputs[0].finish_reason for x in done] == ["stop", "length"]
    engines.assert_empty(case.llm)


@on_llama
def test_logprobs_are_those_of_transformers(case: engines.Case) -> None:
    """Of the answer's tokens, up to rounding."""
    asked = engines.prompts((90,), seed=3)
    (done,) = case.llm.generate([{"prompt_token_ids": asked[0]}], engines.told(8, logprobs=1), use_tqdm=False)
    said = list(done.outputs[0].token_ids)
    got = torch.tensor([x[t].logprob for x, t in zip(done.outputs[0].logprobs, said, strict=True)])
    with torch.inference_mode(), kvpleat.compress(case.model, case.policy):
        out = case.model(torch.tensor(asked), use_cache=True)
        logits = [out.logits[0, -1]]
        for token in said[:-1]:
            out = case.model(torch.tensor([[token]]), **models.given(out.past_key_values))
            logits.append(out.logits[0, -1])
    want = torch.stack([x.log_softmax(-1)[t] for x, t in zip(logits, said, strict=True)])
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


@on_llama
def test_nan_in_one_row_harms_no_other(case: engines.Case) -> None:
    """Neither those beside it nor those that get its pages and its seat afterwards."""
    asked = engines.prompts((60, 17, 120, 80), seed=4)
    want = case.want(asked)
    assert not any(engines.BROKEN in said for said in want)
    ill = [*asked[0][:30], engines.BROKEN, *asked[0][30:]]
    batch = [ill, asked[1], ill[:40], *asked[2:], ill]
    got = engines.answers(case.llm, batch)
    assert [got[1], *got[3:5]] == want[1:]
    (broken,) = case.llm.generate([{"prompt_token_ids": ill}], engines.told(1, logprobs=1), use_tqdm=False)
    assert broken.outputs[0].token_ids[0] != want[0][0], "the token that should break its row does not"
    assert engines.answers(case.llm, asked * 2) == want * 2, "what was left in pages hurts those who come after"
    engines.assert_empty(case.llm)
