"""Gates: the learned part of a policy. Per layer a linear layer (or a small MLP) on the normalised attention input says
what each token means for each KV head.
"""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from kvpleat.errors import ModelError, OptionError

FORMAT = "kvpleat-gates-1"
CONFIG_FILE, WEIGHTS_FILE = "config.json", "gates.safetensors"
SHIPPED = Path(__file__).parent / "pretrained"  # a folder for each set of gates that comes with kvpleat
METHODS = {"dms": 1, "fold": 2, "dmc": 2}  # method -> numbers a gate gives per token and KV head


@dataclass(frozen=True)
class GateConfig:
    """What gates are for and how they are built.

    Args:
        method: dms, fold or dmc.
        num_layers: compressed layers (L). num_kv_heads: H. hidden_size: channels of the attention input.
        delay: tokens that a marked entry stays visible for after its own; 0 for dmc, which merges at once.
        look_back: members of a group that count, the newest ones (dmc's window of 12); None: all.
        mlp_size: hidden channels of the gate; None: a linear layer.
        scale: factor on the gate's output before its bias, which makes a small learning rate move decisions.
        ratio: compression ratio the gates were trained for.
        base: what tells the model apart: family, num_layers, num_kv_heads, num_q_heads, head_dim, hidden_size,
            vocab_size.
        training: how they were trained and what was measured, for people.
    """

    method: str
    num_layers: int
    num_kv_heads: int
    hidden_size: int
    delay: int
    look_back: int | None = None
    mlp_size: int | None = None
    scale: float = 10.0
    ratio: float = 1.0
    base: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise OptionError(f"method={self.method!r}: gates are for one of {', '.join(METHODS)}.")
        if self.delay < 0 or (self.method == "dmc") != (self.delay == 0):
            raise OptionError(
                f"delay={self.delay} for {self.method}: dmc merges at once (0), the others wait at least 1 token."
            )

    @property
    def outputs(self) -> int:
        """Numbers a gate gives per token and KV head."""
        return METHODS[self.method]


class Gates(nn.Module):
    """The gates of all layers.

    Args:
        config: what they are for.
        biases: start of each output's bias; see `policies.learned` for what each means.
        source: name or folder they came from; empty for gates that live in memory only.
    """

    def __init__(self, config: GateConfig, biases: tuple[float, ...] | None = None, source: str = "") -> None:
        super().__init__()
        self.config, self.source = config, source
        size = config.outputs * config.num_kv_heads
        inner = config.mlp_size
        self.inner = nn.ModuleList(
            [] if inner is None else [nn.Linear(config.hidden_size, inner) for _ in range(config.num_layers)]
        )
        self.outer = nn.ModuleList([nn.Linear(inner or config.hidden_size, size) for _ in range(config.num_layers)])
        with torch.no_grad():
            for layer in self.outer:
                layer.weight.zero_()
                start = torch.tensor(biases or (0.0,) * config.outputs).repeat_interleave(config.num_kv_heads)
                layer.bias.copy_(start)

    def forward(self, layer: int, hidden: Tensor) -> Tensor:
        """Logits of one layer, in float32 whatever the model computes in: hidden [R, T, hidden] -> [outputs, R, H, T].

        A product of 16-bit numbers would be rounded differently for one token and for many, and so decide differently.
        """
        x = hidden.float()
        if len(self.inner):
            inner = self.inner[layer]
            x = nn.functional.silu(nn.functional.linear(x, inner.weight.float(), inner.bias.float()))
        outer = self.outer[layer]
        logits = nn.functional.linear(x, outer.weight.float()) * self.config.scale + outer.bias.float()
        return logits.unflatten(-1, (self.config.outputs, self.config.num_kv_heads)).permute(2, 0, 3, 1)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json and gates.safetensors (weights in float16) into `folder`."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {name: tensor.detach().half().cpu().contiguous() for name, tensor in self.state_dict().items()}
        save_file(tensors, folder / WEIGHTS_FILE, {"format": FORMAT})
        text = json.dumps({"format": FORMAT, **asdict(self.config)}, indent=2)
        (folder / CONFIG_FILE).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def from_pretrained(cls, name_or_folder: str | Path) -> "Gates":
        """Gates that come with kvpleat, by name, or those in a folder that `save_pretrained` wrote.

        Raises:
            ModelError: there are none, or the files do not fit together.
        """
        folder = SHIPPED / str(name_or_folder)
        folder = folder if folder.is_dir() else Path(name_or_folder).expanduser()
        try:
            options = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
            if options.pop("format", None) != FORMAT:
                raise ValueError(f"its format is not {FORMAT}")
            gates = cls(GateConfig(**options), source=str(name_or_folder))
            gates.load_state_dict({k: v.float() for k, v in load_file(folder / WEIGHTS_FILE).items()})
        except (OSError, SafetensorError, ValueError, TypeError, RuntimeError) as error:
            raise ModelError(
                f"No gates can be loaded from {str(name_or_folder)!r}: {error}. Gates that come with kvpleat: "
                f"{', '.join(shipped()) or 'none'}; or pass a folder that `kvpleat retrofit` wrote."
            ) from error
        return gates.requires_grad_(False).eval()


def shipped() -> list[str]:
    """Names of the gates that come with kvpleat."""
    return sorted(path.parent.name for path in SHIPPED.glob(f"*/{CONFIG_FILE}"))
