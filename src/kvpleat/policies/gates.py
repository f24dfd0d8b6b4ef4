"""Gates: the learned part of a policy. Per layer a linear layer (or a small MLP) on the normalised attention input says
what each token means for each KV head.
"""

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from kvpleat.errors import ModelError, OptionError
from kvpleat.kernels import gate
from kvpleat.policies import lora
from kvpleat.policies.lora import LoraWeights

FORMAT = "kvpleat-gates-1"
CONFIG_FILE, WEIGHTS_FILE = "config.json", "gates.safetensors"
SHIPPED = Path(__file__).parent / "pretrained"  # a folder for each set of gates that comes with kvpleat
BASE = ("family", "num_layers", "num_kv_heads", "num_q_heads", "head_dim", "hidden_size", "vocab_size")
OWN = "model"  # name of the gates that are channels of the model itself: see kvpleat.hf.borrowed
METHODS = {"dms": 1, "fold": 2, "dmc": 2}  # method -> numbers a gate gives per token and KV head


def check_method(method: str, delay: int) -> None:
    """Refuse a method that is not known, or a delay (tokens) that it cannot have."""
    if method not in METHODS:
        raise OptionError(f"method={method!r}: gates are for one of {', '.join(METHODS)}.")
    if delay < 0 or (method == "dmc") != (delay == 0):
        raise OptionError(f"delay={delay} for {method}: dmc merges at once (0), the others wait at least 1 token.")


@dataclass(frozen=True)
class GateConfig:
    """What gates are for and how they are built.

    Args:
        method: dms, fold or dmc.
        num_layers: compressed layers (L). num_kv_heads: H. hidden_size: channels of the attention input.
        delay: tokens that a marked entry stays visible for after its own; 0 for dmc, which merges at once.
        look_back: members of a group that count, the newest ones (dmc's window of 12); None: all.
        mlp_size: hidden channels of the gate; None: a linear layer.
        sinks: first entries of a row that stay whatever gates say; see `types.Delay`.
        scale: factor on the gate's output before its bias, which makes a small learning rate move decisions.
        ratio: compression ratio the gates were trained for.
        base: what tells the model apart: the keys of BASE, as `kvpleat.hf.families.base_of` reads them.
        training: how they were trained, for people; under "measured" numbers by name, which `kvpleat policies` shows.
    """

    method: str
    num_layers: int
    num_kv_heads: int
    hidden_size: int
    delay: int
    look_back: int | None = None
    sinks: int = 0
    mlp_size: int | None = None
    scale: float = 10.0
    ratio: float = 1.0
    base: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_method(self.method, self.delay)

    @property
    def outputs(self) -> int:
        """Numbers a gate gives per token and KV head."""
        return METHODS[self.method]

    def misfit(self, base: dict[str, Any]) -> str:
        """What keeps these gates from the model that `base` describes, in words; empty where they fit."""
        own = {"num_layers": self.num_layers, "num_kv_heads": self.num_kv_heads, "hidden_size": self.hidden_size}
        own |= {key: value for key, value in self.base.items() if key in BASE}
        wrong = [f"{key} {value} (the model has {base[key]})" for key, value in own.items() if base[key] != value]
        return ", ".join(wrong)


@dataclass(frozen=True)
class Borrowed:
    """Last channels that carry a gate's numbers and so take no part in attention.

    Args:
        query_step: of every so many query heads, from the first on. keys: whether of all keys too.
    """

    query_step: int
    keys: bool


class Gates(nn.Module):
    """The gates of all layers.

    Args:
        config: what they are for.
        biases: start of each output's bias; see `policies.learned` for what each means.
        source: name or folder they came from; empty for gates that live in memory only.

    Attributes:
        adapter: LoRA that was trained together with the gates, or None; merged into the model's weights on attach.
        borrowed: channels of the model that these gates read, or None.
    """

    def __init__(self, config: GateConfig, biases: tuple[float, ...] | None = None, source: str = "") -> None:
        super().__init__()
        self.config, self.source = config, source
        self.adapter: LoraWeights | None = None
        self.borrowed: Borrowed | None = None
        size = config.outputs * config.num_kv_heads
        inner = config.mlp_size
        self.inner = nn.ModuleList(
            [] if inner is None else [nn.Linear(config.hidden_size, inner) for _ in range(config.num_layers)]
        )
        self.outer = nn.ModuleList([nn.Linear(inner or config.hidden_size, size) for _ in range(config.num_layers)])
        with torch.no_grad():
            layer: Any
            for layer in self.outer:
                layer.weight.zero_()
                start = torch.tensor(biases or (0.0,) * config.outputs).repeat_interleave(config.num_kv_heads)
                layer.bias.copy_(start)

    def forward(self, layer: int, hidden: Tensor) -> Tensor:
        """Logits of one layer, in float32 whatever the model computes in: hidden [R, T, hidden] -> [outputs, R, H, T].

        A product of 16-bit numbers would be rounded differently for one token and for many, and so decide differently.
        Where this runs: `kernels.gate`; in torch, where the gate is an MLP.
        """
        outer: Any = self.outer[layer]
        given = outer.weight, outer.bias, self.config.scale, self.config.outputs
        if not len(self.inner):
            return gate.logits(hidden, *given)
        inner: Any = self.inner[layer]
        x = nn.functional.linear(hidden.float(), inner.weight.float(), inner.bias.float())
        return gate.by_torch(nn.functional.silu(x), *given)

    def __repr__(self) -> str:
        config = self.config
        adapter = f", LoRA of rank {self.adapter.rank}" if self.adapter is not None else ""
        return f"Gates({self.label!r}: {config.method}, ratio {config.ratio:g}, delay {config.delay}{adapter})"

    @property
    def label(self) -> str:
        """Name or folder they came from; for gates in memory "memory:" and a checksum of them."""
        if self.source:
            return self.source
        digest, tensors = hashlib.sha256(), self.state_dict()
        if self.adapter is not None:
            for name, (a, b) in self.adapter.pairs.items():
                tensors |= {f"{name}.A": a, f"{name}.B": b * self.adapter.scale}
        for name, tensor in tensors.items():
            digest.update(name.encode() + tensor.detach().float().cpu().numpy().tobytes())
        return f"memory:{digest.hexdigest()[:12]}"

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json, gates.safetensors (in float16) and the adapter's files into `folder`.

        An adapter that is there and does not belong to these gates is removed; a README.md stays.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {name: tensor.detach().half().cpu().contiguous() for name, tensor in self.state_dict().items()}
        save_file(tensors, folder / WEIGHTS_FILE, {"format": FORMAT})
        text = json.dumps({"format": FORMAT, **asdict(self.config)}, indent=2)
        (folder / CONFIG_FILE).write_text(text + "\n", encoding="utf-8")
        if self.adapter is not None:
            self.adapter.save(folder)
            return
        for name in (lora.CONFIG_FILE, lora.WEIGHTS_FILE):
            (folder / name).unlink(missing_ok=True)

    @classmethod
    def from_pretrained(cls, name_or_folder: str | Path) -> "Gates":
        """Gates that come with kvpleat, by name, or those in a folder that `save_pretrained` wrote.

        Raises:
            ModelError: there are none, or the files do not fit together.
        """
        folder = SHIPPED / str(name_or_folder)
        folder = folder if folder.is_dir() else Path(name_or_folder).expanduser()
        try:
            gates = cls(_read_config(folder), source=str(name_or_folder))
            gates.load_state_dict({k: v.float() for k, v in load_file(folder / WEIGHTS_FILE).items()})
            if (folder / lora.CONFIG_FILE).exists() or (folder / lora.WEIGHTS_FILE).exists():
                gates.adapter = LoraWeights.load(folder)
        except (OSError, SafetensorError, ValueError, TypeError, RuntimeError) as error:
            raise ModelError(
                f"No gates can be loaded from {str(name_or_folder)!r}: {error}. Gates that come with kvpleat: "
                f"{', '.join(shipped()) or 'none'}; or pass a folder that `kvpleat retrofit` wrote."
            ) from error
        return gates.requires_grad_(False).eval()


def _read_config(folder: Path) -> GateConfig:
    options = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    if options.pop("format", None) != FORMAT:
        raise ValueError(f"its format is not {FORMAT}")
    return GateConfig(**options)


def shipped() -> dict[str, GateConfig]:
    """The gates that come with kvpleat: what they are for, by name."""
    return {path.parent.name: _read_config(path.parent) for path in sorted(SHIPPED.glob(f"*/{CONFIG_FILE}"))}


def find_shipped(method: str, ratio: float, base: dict[str, Any]) -> str:
    """The name of the gates that come with kvpleat for a method, a ratio (within 1%) and a model.

    Where several fit, the nearest ratio wins, then the shortest name: variants carry a suffix.

    Raises:
        OptionError: there are none.
    """
    fitting = {n: c.ratio for n, c in shipped().items() if c.method == method and not c.misfit(base)}
    near = {name: abs(found / ratio - 1.0) for name, found in fitting.items() if abs(found / ratio - 1.0) <= 0.01}
    if near:
        return min(near, key=lambda name: (near[name], len(name), name))
    ratios = ", ".join(f"{found:g}" for found in sorted(set(fitting.values())))
    raise OptionError(
        f"{method} with ratio={ratio:g}: no such gates come with kvpleat for this model ({base['family']}, "
        f"{base['num_layers']} layers of {base['num_kv_heads']} KV heads, hidden size {base['hidden_size']}). There "
        f"are {f'some for ratio {ratios}' if ratios else 'none at any ratio'}. Train gates with `kvpleat retrofit` and "
        "pass gates=FOLDER."
    )
