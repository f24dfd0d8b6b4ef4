"""Soft attention: with hard decisions it is what the compressed cache computes; documents of a row are apart; nothing
stays on the model."""

import functools
import math
from typing import Any

import peft
import pytest
import torch
from torch import Tensor

from kvpleat import compress
from kvpleat.errors import AttachError, OptionError, UnsupportedError
from kvpleat.kernels import relaxed
from kvpleat.policies import DMC, GateConfig, Gates
from kvpleat.retrofit import soft
from kvpleat.retrofit.measure import HARD
from kvpleat.retrofit.student import Student, without_adapters
from tests import models
from tests.retrofit.rows import KINDS, packed, random_gates

LENGTH, ROUNDING = 91, 1e-5  # tokens: more than a block of queries, and than a block of the scan


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relaxed, "QUERY_BLOCK", 32)


def student_of(model: Any, kind: str, gates: Gates | None = None, **options: Any) -> Student:
    return Student(model, gates or random_gates(model, kind), KINDS[kind][0], **options)


def logits_of(student: Student, hidden: Tensor) -> Tensor:
    logits = student.head(hidden)
    softcap = getattr(student.model.config, "final_logit_softcapping", None)
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def one_document(rows: int, length: int) -> Tensor:
    return torch.zeros(rows, length, dtype=torch.int32)


@pytest.mark.parametrize("family", models.FAMILIES)
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_hard_decisions_are_the_compressed_cache(family: str, kind: str) -> None:
    """Training and inference are one function: the same gates, the same tokens, the same logits."""
    model, tokens = models.tiny(family), models.prompt(LENGTH, rows=2)
    gates = random_gates(model, kind)
    student = student_of(model, kind, gates, temperature=HARD)
    with student.attached():
        hidden, marks = student(tokens, one_document(2, LENGTH), student.no_noise(2, LENGTH))
        found = logits_of(student, hidden)
    with compress(model, KINDS[kind][0](gates=gates)) as pleated:
        cache = pleated.new_cache()
        wanted = model(tokens, **models.given(cache)).logits
    shares = torch.stack([layer.marked.mean() for layer in marks.values()])
    assert bool(((shares > 0.1) & (shares < 0.9)).all())  # there is something to compress, and to keep
    torch.testing.assert_close(found, wanted, atol=ROUNDING, rtol=0)


@pytest.mark.parametrize("family", models.FAMILIES)
@torch.no_grad()
def test_the_teacher_is_the_model(family: str) -> None:
    """Without compression soft attention gives the model's own hidden states."""
    model, tokens = models.tiny(family), models.prompt(LENGTH, rows=2)
    student = student_of(model, "dms")
    wanted = model(tokens).logits
    with student.attached():
        found = logits_of(student, student.teach(tokens, one_document(2, LENGTH)))
        untaught, _ = student(tokens, one_document(2, LENGTH), None)
    torch.testing.assert_close(found, wanted, atol=ROUNDING, rtol=0)
    assert torch.equal(logits_of(student, untaught), found)


@pytest.mark.parametrize("family", models.FAMILIES)
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_documents_of_a_row_do_not_see_each_other(family: str, kind: str) -> None:
    """Each document comes out as if it were alone, with soft decisions and the noise that its tokens have."""
    model, sizes = models.tiny(family), [1, 43, 2, 33, 12]
    batch = packed(LENGTH, sizes, [3, 4])
    student = student_of(model, kind, temperature=0.5)
    noise = student.noise(2, LENGTH, torch.Generator().manual_seed(1))
    with student.attached():
        together, _ = student(batch.tokens, batch.doc_start, noise)
        taught = student.teach(batch.tokens, batch.doc_start)
        start = 0
        for size in sizes:
            place = slice(start, start + size)
            alone, _ = student(batch.tokens[:, place], one_document(2, size), noise[..., place])
            torch.testing.assert_close(together[:, place], alone, atol=ROUNDING, rtol=0)
            alone = student.teach(batch.tokens[:, place], one_document(2, size))
            torch.testing.assert_close(taught[:, place], alone, atol=ROUNDING, rtol=0)
            start += size
    assert float((together - taught).abs().max()) > 0.01


def test_noise_is_logistic() -> None:
    """Mean 0, variance pi^2 / 3, and heavier tails than a normal variable: what two Gumbel variables differ by."""
    student = student_of(models.tiny("llama"), "dms")
    noise = student.noise(5, 20_000, torch.Generator().manual_seed(0)).double()
    assert noise.shape == (3, 5, 2, 20_000)
    assert float(noise.mean()) == pytest.approx(0, abs=0.01)
    assert float(noise.var()) == pytest.approx(math.pi**2 / 3, rel=0.01)
    assert float((noise.abs() > 5).double().mean()) == pytest.approx(2 / (1 + math.exp(5)), rel=0.05)
    assert not student.no_noise(2, 7).any()


def picture(model: Any) -> list[Any]:
    """What could have changed about a model."""
    modules = [(type(m), m.training, len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    return [model.config._attn_implementation, modules, [(n, p.requires_grad) for n, p in model.named_parameters()]]


@pytest.mark.parametrize("family", models.FAMILIES)
@pytest.mark.parametrize("broken", [False, True])
def test_everything_is_taken_off(family: str, broken: bool) -> None:
    """Logits bit for bit, and no hook, whether training ended or failed."""
    model, tokens = models.tiny(family), models.prompt(40)
    with torch.no_grad():
        before, as_it_was = model(tokens).logits, picture(model)
        student = student_of(model, "fold", teacher=models.tiny(family))
        try:
            with student.attached():
                assert picture(model) != as_it_was
                student(tokens, one_document(1, 40), student.no_noise(1, 40))
                student.teach(tokens, one_document(1, 40))
                if broken:
                    raise InterruptedError
        except InterruptedError:
            pass
        assert picture(model) == as_it_was
        assert torch.equal(model(tokens).logits, before)


def test_a_teacher_of_its_own_is_asked() -> None:
    """Where the model's weights move, the frozen copy is what is taught."""
    model, teacher, tokens = models.tiny("llama"), models.tiny("llama", seed=1), models.prompt(30)
    student = student_of(model, "dms", teacher=teacher)
    with torch.no_grad():
        wanted = teacher(tokens).logits
        with student.attached():
            found = student.teacher_head(student.teach(tokens, one_document(1, 30)))
    torch.testing.assert_close(found, wanted, atol=ROUNDING, rtol=0)
    names = [name for name, _ in student.named_parameters()]
    assert not any("teacher" in name for name in names)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft asks by an old name
def test_adapters_go_off_and_on() -> None:
    """Off: the model bit for bit. What is trained stays trained."""
    model, tokens = models.tiny("llama"), models.prompt(30)
    with torch.no_grad():
        before = model(tokens).logits
        adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
        trained = [name for name, p in model.named_parameters() if p.requires_grad]
        after = model(tokens).logits
        with without_adapters(model):
            assert torch.equal(model(tokens).logits, before)
            assert trained == [name for name, p in model.named_parameters() if p.requires_grad]
        assert torch.equal(model(tokens).logits, after)
    assert trained
    assert not torch.equal(after, before)
    adapted.unload()


def test_what_cannot_be_taught_is_refused() -> None:
    model = models.tiny("llama")
    with pytest.raises(OptionError, match=r"for 3 layers of 2 KV heads and the model has 2 of 2"):
        student_of(models.tiny("llama", num_hidden_layers=2), "dms", random_gates(model, "dms"))
    with pytest.raises(UnsupportedError, match=r"look_back=4"):
        Student(model, Gates(GateConfig("dmc", 3, 2, 48, 0, look_back=4)), DMC)


def test_a_layer_without_its_gates_is_noticed() -> None:
    """Where the attention module was replaced, and where a forward runs after detaching."""
    model, tokens = models.tiny("llama"), models.prompt(9)
    student = student_of(model, "dms")
    with student.attached(), torch.no_grad():
        model.model.layers[1].self_attn._forward_pre_hooks.clear()
        with pytest.raises(AttachError, match="Layer 1 ran without its gates"):
            student(tokens, one_document(1, 9), student.no_noise(1, 9))
    with pytest.raises(AttachError, match="Gates of 0 layers out of 3"):
        student(tokens, one_document(1, 9), student.no_noise(1, 9))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # torch.compile looks at it where a graph breaks
@pytest.mark.parametrize("method", ["dms", "fold"])
def test_layers_share_what_is_compiled(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same numbers fused, in as many graphs however many layers there are, and nothing is left behind."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    soft._fused_merge.cache_clear()
    graphs = []
    for layers in (2, 4):
        model = models.tiny("llama", dtype=torch.float32, num_hidden_layers=layers).requires_grad_(False)
        gates = random_gates(model, method)
        tokens, doc_start = models.prompt(37, rows=2), torch.zeros(2, 37, dtype=torch.int32)
        found = []
        for compile in (False, True):
            torch._dynamo.reset()
            torch._dynamo.utils.counters.clear()
            gates.zero_grad()
            student = student_of(model, method, gates, compile=compile)
            with student.attached():
                taught = student.teach(tokens, doc_start)
                hidden, _ = student(tokens, doc_start, student.noise(2, 37, torch.Generator().manual_seed(1)))
                hidden.square().sum().backward()
            found.append((taught, hidden.detach(), gates.outer[0].weight.grad.clone()))
        for fused, plain in zip(found[1], found[0], strict=True):
            torch.testing.assert_close(fused, plain, rtol=1e-4, atol=1e-5)
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
        assert all(module._compiled_call_impl is None for module in model.modules())
    assert graphs[0] == graphs[1] > 0
    soft._fused_merge.cache_clear()
