"""LoRA (arXiv 2106.09685) beside gates: low-rank changes of a model's weights, as files in PEFT's own layout."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from kvpleat.errors import ModelError

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."  # of PEFT's names, before the module's own in the causal LM
# Options of PEFT: those read here, and those that change nothing about finished weights.
READ = {"peft_type", "init_lora_weights", "r", "lora_alpha", "use_rslora"}
HARMLESS = {
    *("auto_mapping", "base_model_name_or_path", "ensure_weight_tying", "exclude_modules", "fan_in_fan_out"),
    *("inference_mode", "layers_pattern", "layers_to_transform", "lora_dropout", "megatron_config", "megatron_core"),
    *("peft_version", "qalora_group_size", "revision", "runtime_config", "target_modules", "task_type"),
}
NEUTRAL: tuple[Any, ...] = (None, False, "none", {}, [])  # values of the others that ask for nothing
INITS = (True, False, "eva", "gaussian", "orthogonal")  # the other ways to begin change the base weights too


@dataclass(frozen=True, eq=False)
class LoraWeights:
    """What is added to some weights: W + scale * B A.

    Args:
        rank: r. alpha: numerator of the scale.
        pairs: module name in the causal LM -> (A [r, in], B [out, r]).
        rslora: the scale is alpha / sqrt(r) instead of alpha / r.
    """

    rank: int
    alpha: float
    pairs: dict[str, tuple[Tensor, Tensor]]
    rslora: bool = False

    @property
    def scale(self) -> float:
        """Factor on B A."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    def save(self, folder: str | Path) -> None:
        """Write both files into `folder`, numbers in 16 bits. PEFT reads them too."""
        folder = Path(folder)
        config = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": None,
            "inference_mode": True,
            "r": self.rank,
            "lora_alpha": self.alpha,
            "use_rslora": self.rslora,
            "target_modules": sorted(self.pairs),
        }
        tensors = {}
        for name, pair in self.pairs.items():
            for letter, tensor in zip("AB", pair, strict=True):
                small = tensor.detach().cpu()
                small = small if small.dtype == torch.bfloat16 else small.half()
                tensors[f"{PREFIX}{name}.lora_{letter}.weight"] = small.contiguous()
        save_file(tensors, folder / WEIGHTS_FILE, {"format": "pt"})
        (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: str | Path) -> "LoraWeights":
        """The LoRA in `folder`. Raises ModelError where files are missing or damaged, or PEFT's options say more than
        W + scale * B A."""
        folder = Path(folder)
        try:
            config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
            tensors = load_file(folder / WEIGHTS_FILE)
            _refuse_options(config)
            return cls(config["r"], config["lora_alpha"], _pairs(tensors, config["r"]), config.get("use_rslora", False))
        except (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModelError(
                f"No LoRA can be loaded from {str(folder)!r} ({type(error).__name__}: {error}). Pass a folder with "
                f"{CONFIG_FILE} and {WEIGHTS_FILE} as PEFT saves them, plain LoRA only."
            ) from error


def _refuse_options(config: dict[str, Any]) -> None:
    if config.get("peft_type", "LORA") != "LORA":
        raise ValueError(f"peft_type {config['peft_type']!r} is no LoRA")
    if config.get("init_lora_weights", True) not in INITS:
        raise ValueError(f"init_lora_weights {config['init_lora_weights']!r} changes base weights as well")
    said = [f"{k}={v!r}" for k, v in config.items() if k not in READ | HARMLESS and v not in NEUTRAL]
    if said:
        raise ValueError(f"options that kvpleat does not know: {', '.join(said)}")


def _pairs(tensors: dict[str, Tensor], rank: int) -> dict[str, tuple[Tensor, Tensor]]:
    """A and B by module name; every tensor of the file must be one of them, of rank r."""
    names = {key.removeprefix(PREFIX).rpartition(".lora_")[0] for key in tensors}
    pairs = {}
    for name in sorted(names):
        a, b = (tensors.pop(f"{PREFIX}{name}.lora_{letter}.weight") for letter in "AB")
        if a.dim() != 2 or b.dim() != 2 or a.shape[0] != rank or b.shape[1] != rank:
            raise ValueError(f"{name} has A {tuple(a.shape)} and B {tuple(b.shape)}, not of rank {rank}")
        pairs[name] = (a, b)
    if tensors or not pairs:
        raise ValueError(f"tensors that belong to no pair of A and B: {', '.join(tensors) or 'there are no pairs'}")
    return pairs
