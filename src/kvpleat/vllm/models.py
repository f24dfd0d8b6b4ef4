"""vLLM's model classes with kvpleat's cache: `KvpleatLlamaForCausalLM` is vLLM's `LlamaForCausalLM`, and so on.

Made of vLLM's own class when vLLM asks for the name. After its layers were built, each attention layer gets our
backend; the first one of a worker stands for the cache of all of them (vLLM's own way to share a cache between
layers); and a hook before each attention block asks the gates about the hidden states that go in.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from vllm.distributed import get_pp_group, get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.models import ModelRegistry

from kvpleat.errors import OptionError, UnsupportedError
from kvpleat.hf import families
from kvpleat.kernels import gate
from kvpleat.policies import Gates
from kvpleat.policies.lora import LoraWeights
from kvpleat.types import KVShape, Rotary
from kvpleat.vllm.backend import PleatedBackend, PleatedImpl
from kvpleat.vllm.cache import PleatedSpec
from kvpleat.vllm.memory import Memory
from kvpleat.vllm.settings import ARCHITECTURES, PREFIX, Settings, base_of, check

PLAIN = (torch.float32, torch.bfloat16, torch.float16)  # weights that something can be added to


def __getattr__(name: str) -> Any:
    """The class of that name."""
    original = name.removeprefix(PREFIX)
    if not name.startswith(PREFIX) or original not in ARCHITECTURES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = made = pleated(ModelRegistry._try_load_model_cls(original), name)
    return made


def pleated(base: Any, name: str) -> type[nn.Module]:
    """A class of vLLM's with kvpleat's cache."""

    def start(self: Any, *, vllm_config: Any, prefix: str = "") -> None:
        check(vllm_config)
        base.__init__(self, vllm_config=vllm_config, prefix=prefix)
        self.kvpleat = _attach(self, vllm_config)

    def load_weights(self: Any, weights: Iterable[tuple[str, Tensor]]) -> Any:
        return base.load_weights(self, _adapted(weights, self.kvpleat))

    return type(name, (base,), {"__init__": start, "load_weights": load_weights, "__module__": __name__})


def _attach(model: nn.Module, vllm_config: Any) -> LoraWeights | None:
    """Give a model's attention layers our cache. Returns what is added to the weights when they are loaded."""
    config = vllm_config.model_config.hf_text_config
    settings = Settings.of(vllm_config.model_config.hf_config)
    layers = {name: m for name, m in model.named_modules() if isinstance(m, Attention)}
    _refuse(layers)
    policy, gates, delay = settings.policy, None, settings.delay
    if policy is not None:
        policy = policy.for_model(base_of(config))
        gates, delay = policy.gates, policy.delayed  # type: ignore[attr-defined]
        assert isinstance(gates, Gates)
        if gates.borrowed is not None:
            raise UnsupportedError(
                f"{gates!r} are channels of the model; inside vLLM gates have weights of their own. Pass others, or "
                "use kvpleat.compress."
            )
    assert delay is not None
    first: Any = next(iter(layers.values()))
    device = next(model.parameters()).device
    depth = -(-int(config.num_hidden_layers) // get_pp_group().world_size)
    if len(layers) > depth:
        raise UnsupportedError(
            f"This worker has {len(layers)} layers, more than an even share of {depth}: blocks of all workers must be "
            "alike. Leave out VLLM_PP_LAYER_PARTITION."
        )
    shape = KVShape(
        depth, first.num_kv_heads, first.num_heads, first.head_size, vllm_config.model_config.dtype,
        vllm_config.cache_config.block_size, fields=("log_weight",) if delay.log_size else (),
    )  # fmt: skip
    scheduler, length = vllm_config.scheduler_config, vllm_config.model_config.max_model_len
    sizes = vllm_config.compilation_config.cudagraph_capture_sizes or [1]
    memory = Memory(
        shape, delay, scheduler.max_num_seqs, length,
        scheduler.max_num_batched_tokens + max(sizes), gates.config.outputs if gates else 0,
        _rotary(config) if delay.merges else None, device,
    )  # fmt: skip
    spec = PleatedSpec(
        block_size=shape.page_size, num_kv_heads=shape.num_streams, head_size=memory.entry_bytes, dtype=torch.uint8,
        waiting=delay.tokens + 1 + delay.sinks, ratio=gates.config.ratio if gates else float(length),
        seats=scheduler.max_num_seqs, chunk=scheduler.max_num_batched_tokens,
    )  # fmt: skip
    for place, (name, layer) in enumerate(layers.items()):
        _join(layer, memory, place, place + 1 == len(layers))
        if gates is not None:
            block = model.get_submodule(name.rpartition(".")[0])
            index = _number(name)
            block.register_forward_pre_hook(_asking(gates, index, memory, block), with_kwargs=True)
        if place:
            layer.kv_sharing_target_layer_name = first.layer_name
    first.get_kv_cache_spec = lambda vllm_config: spec
    return gates.adapter if gates is not None else None


def _join(layer: Any, memory: Memory, place: int, is_last: bool) -> None:
    """Replace a layer's backend by ours."""
    old = layer.impl
    layer.attn_backend = PleatedBackend
    softcap = getattr(old, "logits_soft_cap", None)
    layer.impl = PleatedImpl(
        layer.num_heads, layer.head_size, old.scale, layer.num_kv_heads, logits_soft_cap=softcap,
        kv_cache_dtype=layer.kv_cache_dtype,
    )  # fmt: skip
    layer.impl.join(memory, place, is_last)


def _number(name: str) -> int:
    """The number in a layer's name: model.layers.7.self_attn.attn is 7."""
    return int(next(part for part in name.split(".") if part.isdigit()))


def _refuse(layers: dict[str, Any]) -> None:
    if not layers:
        raise UnsupportedError(
            "The model has no attention layers on this worker, so there is nothing to compress. Take fewer stages "
            "(--pipeline-parallel-size)."
        )
    for name, layer in layers.items():
        if layer.sliding_window is not None:
            raise UnsupportedError(
                f"{name} has a sliding window of {layer.sliding_window} tokens of the model's own, which kvpleat does "
                "not serve inside vLLM; kvpleat.LLM does. Pass --hf-overrides '{\"use_sliding_window\": false}' if the "
                "model does not need it."
            )
        if layer.has_sink:
            raise UnsupportedError(
                f"{name} has attention sinks of the model's own, which kvpleat would leave out, so answers would be "
                "others. Serve this model without kvpleat."
            )


def _rotary(config: Any) -> Rotary | None:
    """How the model rotates its keys; None: it does not."""
    if config.model_type == "gpt2":
        return None
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    module: Any = LlamaRotaryEmbedding(config)
    if module.rope_type not in families.MOVABLE_ROPE:
        raise UnsupportedError(
            f"rope_type {module.rope_type!r} rotates a key by an angle that depends on the length of the text, so a "
            f"stored key cannot be merged. Supported: {', '.join(sorted(families.MOVABLE_ROPE))}. The policies dms and "
            "window merge nothing."
        )
    return Rotary(module.inv_freq.detach().float())


def _asking(gates: Gates, index: int, memory: Memory, block: nn.Module) -> Any:
    """A hook before an attention block: what its gates say of the hidden states, for the attention in it."""
    config = gates.config
    outer: Any = gates.outer[index]
    heads = _own_heads(config.num_kv_heads)
    weight = outer.weight.detach().view(config.outputs, config.num_kv_heads, -1)[:, heads].flatten(0, 1)
    bias = outer.bias.detach().view(config.outputs, config.num_kv_heads)[:, heads].flatten()
    device = memory.device
    tensors = {"weight": weight, "bias": bias}
    if len(gates.inner):
        inner: Any = gates.inner[index]
        tensors |= {"inner_weight": inner.weight.detach(), "inner_bias": inner.bias.detach()}
    for name, tensor in tensors.items():
        block.register_buffer(f"kvpleat_{name}", tensor.float().contiguous().to(device), persistent=False)
    block.register_buffer("kvpleat_asked", torch.zeros(1, device=device), persistent=False)
    scale, outputs, inside = config.scale, config.outputs, bool(len(gates.inner))

    def ask(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[-1]
        if inside:
            hidden = nn.functional.linear(hidden.float(), module.kvpleat_inner_weight, module.kvpleat_inner_bias)
            hidden = nn.functional.silu(hidden)
        weight, bias = module.kvpleat_weight, module.kvpleat_bias
        torch.ops.kvpleat.ask(hidden, weight, bias, module.kvpleat_asked, scale, outputs)

    return ask


def _own_heads(heads: int) -> slice:
    """KV heads of this worker: a share, or one of them where there are more workers than heads."""
    rank, size = get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size()
    share = max(1, heads // size)
    start = rank * heads // size
    return slice(start, start + share)


@torch.library.custom_op("kvpleat::ask", mutates_args=("asked",))
def _ask(hidden: Tensor, weight: Tensor, bias: Tensor, asked: Tensor, scale: float, outputs: int) -> None:
    """Keep what gates say of tokens [T, C] for the attention that comes next.

    To torch.compile it changes `asked`, a single number, or it would be left out; what is really written to is larger,
    and a compiler that is careful with it would copy it. All layers write to the same place, so that their compiled
    pieces are the same.
    """
    layers = get_forward_context().no_compile_layers.values()
    memory = next(layer.impl.memory for layer in layers if isinstance(getattr(layer, "impl", None), PleatedImpl))
    memory.said[:, : hidden.shape[0]] = gate.logits(hidden[None], weight, bias, scale, outputs)[:, 0].transpose(1, 2)


@_ask.register_fake
def _(hidden: Tensor, weight: Tensor, bias: Tensor, asked: Tensor, scale: float, outputs: int) -> None:
    return


def _adapted(weights: Iterable[tuple[str, Tensor]], lora: LoraWeights | None) -> Iterable[tuple[str, Tensor]]:
    """The checkpoint's weights, with the gates' LoRA added.

    Raises:
        OptionError: weights that the LoRA changes are not in the checkpoint as they are: it is quantised, or another's.
    """
    if lora is None:
        yield from weights
        return
    left = dict(lora.pairs)
    for name, tensor in weights:
        plain = name.endswith(".weight") and tensor.dtype in PLAIN  # quantised ones can have the same name
        pair = left.pop(name.removesuffix(".weight"), None) if plain else None
        yield name, tensor if pair is None else _sum(tensor, *pair, lora.scale)
    if left:
        raise OptionError(
            f"The gates' LoRA changes {next(iter(left))} and {len(left) - 1} more, which the checkpoint does not have "
            "as plain weights: it is quantised, or another model. Merge the LoRA before the model is quantised."
        )


def _sum(weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    added = scale * (b.float() @ a.float())
    if added.shape != weight.shape:  # a Conv1D, as in GPT-2
        added = added.T
    return (weight.float() + added.to(weight.device)).to(weight.dtype)
