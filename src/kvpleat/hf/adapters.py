"""LoRA on a model: merged into its weights while a policy is attached, and the weights put back afterwards.

Merged, because then a decoded token costs nothing more. Price: a second copy of the weights that change, as long as
they are merged. Exact up to one rounding to the weights' dtype: W + scale * B A is computed in float32, or in the
weight's dtype where that is wider.
"""

from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from kvpleat.errors import OptionError, UnsupportedError
from kvpleat.policies.lora import LoraWeights


class Merged:
    """Weights of a model that are replaced by others; the originals are kept, untouched, until `undo`."""

    def __init__(self) -> None:
        self._originals: list[tuple[nn.Module, nn.Parameter]] = []

    def replace(self, module: nn.Module, weight: Tensor) -> None:
        """Put `weight` in place of the module's. A parameter tied to it elsewhere stays what it is."""
        original = module.weight
        assert isinstance(original, nn.Parameter)
        self._originals.append((module, original))
        module.weight = nn.Parameter(weight, requires_grad=original.requires_grad)

    def undo(self) -> None:
        """Put the originals back. Twice is no error."""
        while self._originals:
            module, original = self._originals.pop()
            module.weight = original


def merge(model: nn.Module, lora: LoraWeights) -> Merged:
    """Merge a LoRA into the weights of a causal LM, all of it or, where that fails, nothing.

    Raises:
        OptionError: the LoRA is for another model.
        UnsupportedError: a weight is quantised, wrapped, offloaded or used in two places.
    """
    uses = Counter(id(module) for _, module in model.named_modules(remove_duplicate=False))
    targets = {name: _target(model, name, lora) for name in lora.pairs}
    for name, module in targets.items():
        if uses[id(module)] > 1:
            raise UnsupportedError(
                f"{name} is one module under {uses[id(module)]} names, so a change meant for one of them would act on "
                "all. Give each place a module of its own (copy.deepcopy), or leave it out of the LoRA."
            )
    merged = Merged()
    try:
        for name, module in targets.items():
            merged.replace(module, _sum(module, *lora.pairs[name], lora.scale))
    except BaseException:
        merged.undo()
        raise
    return merged


def _target(model: nn.Module, name: str, lora: LoraWeights) -> nn.Linear | Conv1D:
    """The module called `name`, which must have a plain weight of the right shape."""
    try:
        module = model.get_submodule(name)
    except AttributeError:
        raise OptionError(
            f"The gates' LoRA changes {name}, and {type(model).__name__} has no such module: it was trained on another "
            "model. Load that one, or train gates for this one with `kvpleat retrofit`."
        ) from None
    # Exact types: a subclass of Linear keeps its weight in its own way, and so does a subclass of Tensor.
    weight: Any = getattr(module, "weight", None)
    plain = type(module) in (nn.Linear, Conv1D) and type(weight) is nn.Parameter and not weight.is_meta
    if not plain or not weight.is_floating_point():
        raise UnsupportedError(
            f"{name} is a {type(module).__name__} with a {type(weight).__name__}, quantised, wrapped or offloaded, so "
            "the gates' LoRA cannot be merged into its weight. Merge first (kvpleat.hf.adapters.merge on the plain "
            "model), then quantise, and attach gates whose `adapter` is None."
        )
    a, b = lora.pairs[name]
    size = (b.shape[0], a.shape[1])
    if tuple(weight.shape) != (size if isinstance(module, nn.Linear) else size[::-1]):
        raise OptionError(
            f"The gates' LoRA changes {name} from {size[1]} to {size[0]} channels, and the model's weight is "
            f"{tuple(weight.shape)}: it was trained on another model. Load that one."
        )
    return module


@torch.no_grad()
def _sum(module: nn.Linear | Conv1D, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """W + scale * B A in the weight's dtype; Conv1D keeps its weight transposed."""
    weight: Tensor = module.weight
    wide = torch.promote_types(weight.dtype, torch.float32)
    change = scale * (b.to(weight.device, wide) @ a.to(weight.device, wide))
    return (weight.to(wide) + (change if isinstance(module, nn.Linear) else change.T)).to(weight.dtype)
