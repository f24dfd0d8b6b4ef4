"""Fewer bytes of weights: what a compressed cache is measured together with.

Each name of `WEIGHTS` makes a new model whose linear layers inside the decoder are quantised or pruned. The embedding
and the head stay as they are (where they are one tied tensor, they stay one), and so do norms and biases. What was not
changed is shared with the given model, so that two models do not take the memory of two.

Rounding weights to fewer bits is torchao's (an optional dependency); pruning is torch.nn.utils.prune's.
"""

import copy
import warnings
from dataclasses import replace
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import prune

from kvpleat.accounting import human_bytes, storage_bytes
from kvpleat.errors import AttachError, OptionError, UnsupportedError
from kvpleat.hf.attention import IMPLEMENTATION
from kvpleat.hf.families import describe as describe_model
from kvpleat.hf.models import LoadedModel

GROUP = 32  # inputs that share a scale at 4 bits
PRUNED = {"pruned30": 0.3, "pruned50": 0.5}
WEIGHTS = {
    "full": "the weights as they were loaded",
    "int8": "8 bits a weight and a scale for each output (torchao Int8WeightOnlyConfig)",
    "int4": "4 bits a weight, a scale and a zero point for each 32 inputs (quantised by torchao "
    "IntxWeightOnlyConfig, held two to a byte, widened layer by layer when it is used)",
    "pruned30": "the smallest 30% of each layer's weights set to zero",
    "pruned50": "the smallest 50% of each layer's weights set to zero",
    "2:4": "the smallest 2 of each 4 weights along the inputs set to zero, in dense tensors",
}


def transform(loaded: LoadedModel, name: str) -> LoadedModel:
    """A new model with its weights held as `name` of WEIGHTS says. The given one is not touched.

    Raises:
        OptionError: the name is unknown, torchao is missing, or it cannot hold this model's weights that way.
        UnsupportedError: the decoder has no nn.Linear layers (GPT-2).
        AttachError: a policy is attached to the model.
    """
    if name not in WEIGHTS:
        raise OptionError(f"There are no weights named {name!r}. Choose one of {', '.join(WEIGHTS)}.")
    if loaded.model.config._attn_implementation == IMPLEMENTATION:
        raise AttachError(
            "A policy is attached to the model, and a copy would call into it. Detach it, transform the weights, then "
            "attach to the new model."
        )
    shared = {id(tensor): tensor for tensor in [*loaded.model.parameters(), *loaded.model.buffers()]}
    model = copy.deepcopy(loaded.model, shared)
    if name != "full":
        for layer in _linear_layers(model):
            # torch's pruning writes into the parameter it finds, so the layer gets one of its own.
            layer.weight = nn.Parameter(layer.weight.detach(), requires_grad=False)
        _change(model, name)
    return replace(loaded, model=model)


def weight_bytes(model: nn.Module) -> int:
    """Bytes that all parameters and buffers really occupy: storages, each once. Zeros in a dense tensor count whole."""
    return storage_bytes([*model.parameters(), *model.buffers()])


def describe(name: str, model: nn.Module, full: nn.Module) -> str:
    """What `name` is, for people, and what it really saves: `model` is what `transform` made of `full`."""
    before, after = weight_bytes(full), weight_bytes(model)
    saved = f"{human_bytes(after)} instead of {human_bytes(before)}" if after != before else "no memory is saved"
    note = "; embedding and head stay as they are" if name in ("int8", "int4") else ""
    return f"{WEIGHTS[name]}: {saved}{note}"


def _linear_layers(model: Any) -> list[nn.Linear]:
    """The decoder's linear layers. Raises UnsupportedError where there are none."""
    facts = describe_model(model)
    layers = [module for module in facts.decoder.modules() if isinstance(module, nn.Linear)]
    if not layers:
        raise UnsupportedError(
            f"The {facts.family} model has no nn.Linear layers in its decoder, so its weights can be neither quantised "
            "nor pruned here. Use weights 'full'."
        )
    return layers


def _change(model: Any, name: str) -> None:
    layers = _linear_layers(model)
    if name in PRUNED:
        for layer in layers:
            prune.l1_unstructured(layer, "weight", amount=PRUNED[name])
            prune.remove(layer, "weight")
    elif name == "2:4":
        for layer in layers:
            prune.custom_from_mask(layer, "weight", _two_of_four(layer.weight))
            prune.remove(layer, "weight")
    else:
        _quantise(describe_model(model).decoder, layers, name)


def _two_of_four(weight: Tensor) -> Tensor:
    """[out, in] mask of the two largest of each four neighbours along the inputs."""
    if weight.shape[1] % 4:
        raise OptionError(
            f"2:4 needs inputs in fours, and a layer of this model has {weight.shape[1]}. Choose pruned50 instead."
        )
    fours = weight.detach().abs().unflatten(1, (-1, 4))
    return torch.zeros_like(fours).scatter_(2, fours.topk(2, dim=2).indices, 1.0).flatten(1)


def _torchao() -> ModuleType:
    """torchao's quantisation module. Raises OptionError where it is missing."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of torch, about torchao's own code
            import torchao.quantization
    except ImportError as error:
        raise OptionError(
            f"Weights of 8 and 4 bits need the package torchao, which cannot be imported ({error}). Run: pip install "
            "'kvpleat[judge]'"
        ) from error
    module: ModuleType = torchao.quantization
    return module


def _quantise(decoder: nn.Module, layers: list[nn.Linear], name: str) -> None:
    """Replace the layers' weights by quantised ones, and try each, so that what cannot run fails here."""
    torchao = _torchao()
    if name == "int8":
        config = torchao.Int8WeightOnlyConfig(set_inductor_config=False)
    else:
        uneven = sorted({layer.in_features for layer in layers if layer.in_features % GROUP})
        if uneven:
            raise OptionError(
                f"int4 shares a scale among {GROUP} inputs, which does not divide the {uneven} of this model's layers. "
                "Choose int8."
            )
        config = torchao.IntxWeightOnlyConfig(
            weight_dtype=torch.int4,  # type: ignore[attr-defined]
            granularity=torchao.PerGroup(GROUP),
            mapping_type=torchao.MappingType.ASYMMETRIC,
        )
    try:
        torchao.quantize_(decoder, config)
        if name == "int4":
            _pack(decoder)
        with torch.no_grad():
            for layer in [m for m in decoder.modules() if isinstance(m, nn.Linear | PackedLinear)]:
                layer(torch.zeros(1, layer.in_features, dtype=layer.weight.dtype, device=layer.weight.device))
    except (RuntimeError, NotImplementedError, AssertionError, ImportError, ValueError, TypeError) as error:
        raise OptionError(
            f"torchao cannot hold these weights as {name} on this machine: {type(error).__name__}: {error} Choose "
            "other weights, or load the model in float32 or bfloat16."
        ) from error


class PackedLinear(nn.Module):
    """A linear layer whose weights are held in 4 bits, two to a byte.

    torchao's own 4-bit tensors take a byte a weight where they run on every CPU (IntxUnpackedToInt8Tensor), and its
    packed one (prototype Int4OpaqueTensor) took 40 to 150 times as long as float32 weights for 16 and 64 rows of
    float32 on a CPU with AVX2 (one timing each, on a busy machine).

    Args:
        layer: whose weight torchao quantised: qdata [out, in] in -8..7, scale and zero_point [out, in / group].
    """

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.in_features, self.out_features, self.bias = layer.in_features, layer.out_features, layer.bias
        codes = (layer.weight.qdata + 8).to(torch.uint8)
        half = self.in_features // 2
        self.codes: Tensor
        self.scale: Tensor
        self.zero: Tensor
        self.register_buffer("codes", codes[:, :half] | codes[:, half:] << 4)
        self.register_buffer("scale", layer.weight.scale.clone())
        self.register_buffer("zero", layer.weight.zero_point.to(torch.int8))

    @property
    def weight(self) -> Tensor:
        """[out, in] the weight as it is used."""
        codes = torch.cat([self.codes & 15, self.codes >> 4], dim=1).to(torch.int8) - 8
        groups = codes.unflatten(1, (self.scale.shape[1], -1)) - self.zero[..., None]
        weight: Tensor = (groups * self.scale[..., None]).flatten(1)
        return weight

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        return F.linear(x, self.weight, self.bias)


def _pack(decoder: nn.Module) -> None:
    """Replace every linear layer by a packed one."""
    for parent in list(decoder.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.Linear):
                setattr(parent, name, PackedLinear(child))
