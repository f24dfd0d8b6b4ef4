"""A retrofit in progress: what is trained, one optimiser step, what is saved of it."""

import hashlib
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as torch_checkpoint
from transformers.pytorch_utils import Conv1D

from kvpleat import policies
from kvpleat.errors import OptionError
from kvpleat.hf.families import attention_modules, base_of, decoder_layers, describe
from kvpleat.policies.gates import Gates
from kvpleat.policies.learned import Learned, new_gates
from kvpleat.retrofit import checkpoint
from kvpleat.retrofit.card import write_card
from kvpleat.retrofit.config import Recipe
from kvpleat.retrofit.data import Batch
from kvpleat.retrofit.distributed import Processes, whole
from kvpleat.retrofit.measure import Lesson, moved, precision, predicted_weight
from kvpleat.retrofit.objective import too_little
from kvpleat.retrofit.student import Student

# Before anything merges, gates of weights and shares have gradients of about 1e-8, which are rounding. AdamW divides by
# their size: with its usual eps of 1e-8 it would make real steps of them.
GATES_EPS = 1e-6


class Figures(NamedTuple):
    """Of one step, means over its batches and all processes: loss and KL in nats a token, agreement, share of marked
    entries."""

    loss: float
    kl: float
    agreement: float
    share: float


class Run:
    """A retrofit in progress. `close` it, and the model is as it was but for weights that were trained themselves.

    Args:
        model: a causal LM, on its device; its weights change only where the recipe says so. With several processes it
            ends up, and stays, in shards.
        recipe: what to do.
        batches: endless, of the recipe's rows and length; has state() and load_state() (retrofit.data.mixture).
    """

    def __init__(self, model: Any, recipe: Recipe, batches: Any) -> None:
        self.recipe, self.batches, self.model = recipe, batches, model
        self.step = self.tokens = 0
        self.policy = policy_of(recipe.method)
        facts = describe(model)
        self.device, self.base = facts.device, base_of(model, facts)
        self.processes = Processes(self.device)
        self._needed_grad = {name: p.requires_grad for name, p in model.named_parameters()}
        teacher = checkpoint.frozen_copy(model) if recipe.train == "full" else None
        if recipe.train == "full":
            model.float()
        model.requires_grad_(recipe.train == "full")
        with _seeded(recipe.seed, self.device):
            gates = _fresh_gates(self.policy, recipe, self.base).to(self.device)
            self.adapted: Any = _with_lora(model, recipe) if recipe.train == "lora" else None
        self.student = Student(
            model, gates, self.policy, temperature=recipe.temperature, teacher=teacher, compile=recipe.compile
        )
        self.lesson = Lesson(self.student)
        _set_modes(model, recipe.checkpointing)
        self.processes.shard(
            self.lesson, (layer for m in (model, teacher) if m is not None for layer in decoder_layers(describe(m)))
        )
        self.optimizer = torch.optim.AdamW(self._groups(), betas=(0.9, 0.95), weight_decay=0.0)
        self._rates = [group["lr"] for group in self.optimizer.param_groups]

    def trained(self) -> dict[str, nn.Parameter]:
        """Everything that is trained, by name, in a fixed order."""
        named = [(f"gates.{name}", p) for name, p in self.student.gates.named_parameters()]
        named += [(f"model.{name}", p) for name, p in self.student.model.named_parameters() if p.requires_grad]
        return dict(named)

    def _groups(self) -> list[dict[str, Any]]:
        trained = self.trained()
        gates = [p for name, p in trained.items() if name.startswith("gates.")]
        rest = [p for name, p in trained.items() if not name.startswith("gates.")]
        groups = [{"params": gates, "lr": self.recipe.rate, "eps": GATES_EPS}]
        return groups + ([{"params": rest, "lr": self.recipe.weights_rate}] if rest else [])

    def advance(self) -> Figures:
        """One optimiser step."""
        recipe = self.recipe
        _, rate = recipe.at(self.step)
        for group, base in zip(self.optimizer.param_groups, self._rates, strict=True):
            group["lr"] = base * rate
        figures = torch.stack([self._backward(next(self.batches), part) for part in range(recipe.accumulate)]).mean(0)
        torch.nn.utils.clip_grad_norm_(list(self.trained().values()), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return Figures(*self.processes.mean(figures).tolist())

    def fit_steps(self, more: float) -> None:
        """Have the run end after about `more` further steps, the same number in every process."""
        more = float(self.processes.mean(torch.tensor(more, device=self.device)))
        recipe = replace(self.recipe, steps=max(self.step + len(self.recipe.ratios), self.step + int(more)))
        while recipe.stage_ends()[0] <= self.step:  # every ratio leaves its gates
            recipe = replace(recipe, steps=recipe.steps + 1)
        self.recipe = recipe

    def _backward(self, batch: Batch, part: int) -> Tensor:
        """Gradients of one batch, and its figures [4] in this process."""
        recipe, processes = self.recipe, self.processes
        batch = moved(batch, self.device)
        total = processes.mean(predicted_weight(batch).sum())  # a mean of losses over it is a mean over all tokens
        with precision(self.device):
            distance, share, _ = self.lesson(batch, self._noise(batch, part), recipe.lm_weight, total)
        penalty = too_little(share, recipe.target(self.step))
        ((distance.loss + recipe.ratio_weight * penalty) / recipe.accumulate).backward()
        self.tokens += batch.tokens.numel() * processes.size
        return torch.stack([distance.loss, distance.kl, distance.agreement, share.mean()]).detach().float()

    def _noise(self, batch: Batch, part: int) -> Tensor:
        """Noise [L, R, H, T] that belongs to each row, whichever process has it."""
        rows, tokens = batch.tokens.shape
        noise = []
        for row in range(self.processes.rank * rows, (self.processes.rank + 1) * rows):
            seed = _seed(self.recipe.seed, self.step, part, row)
            noise.append(self.student.noise(1, tokens, torch.Generator(self.device).manual_seed(seed)))
        return torch.cat(noise, dim=1)

    def save_gates(self, folder: Path, ratio: float, measured: dict[str, Any] | None = None) -> None:
        """Write a usable gate folder for `ratio`: gates, the adapters if there are any, a model card.

        Every process has to ask; the main one writes.
        """
        training = {
            "recipe": asdict(self.recipe) | {"ratios": list(self.recipe.ratios)},
            "step": self.step,
            "tokens": self.tokens,
            "measured": measured or {},
        }
        gates = Gates(replace(self.student.gates.config, ratio=ratio, training=training))
        gates.load_state_dict({name: whole(x) for name, x in self.student.gates.state_dict().items()})
        if self.processes.main:
            gates.save_pretrained(folder)
        if self.adapted is not None:
            checkpoint.save_adapter(self.adapted, folder, self.processes.main)
        if self.recipe.train == "full":
            checkpoint.save_model(self.model, folder, self.processes.main)
        if self.processes.main:
            write_card(folder)

    def close(self) -> None:
        """Take adapters off the model, and leave it in eval mode with its parameters as trainable as before."""
        if self.adapted is not None:
            self.adapted.unload()
        _set_modes(self.model, False)
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(self._needed_grad[name])


def policy_of(method: str) -> type[Learned]:
    """The policy of a method. Raises OptionError where none is taught."""
    known = {name: policy for name, policy in policies.registry().items() if issubclass(policy, Learned)}
    if method not in known:
        raise OptionError(f"method={method!r}: retrofit teaches one of {', '.join(known)}.")
    return known[method]


def _fresh_gates(policy: type[Learned], recipe: Recipe, base: dict[str, Any]) -> Gates:
    sizes = {name: base[name] for name in ("num_layers", "num_kv_heads", "hidden_size")}
    options = {name: getattr(recipe, name) for name in ("delay", "sinks", "scale", "mlp_size")}
    return new_gates(policy, base=base, **options, **sizes)


def _with_lora(model: Any, recipe: Recipe) -> Any:
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        raise OptionError(
            "train='lora' needs peft, which is not installed. Run: pip install 'kvpleat[retrofit]'"
        ) from None
    targets: Any = "all-linear"
    if recipe.adapt == "attention":
        names = {module: name for name, module in model.named_modules()}  # whole ones: GPT-2 has two kinds of c_proj
        inside = (child for module in attention_modules(describe(model)) for child in module.children())
        targets = [names[child] for child in inside if isinstance(child, nn.Linear | Conv1D)]
    options = LoraConfig(
        r=recipe.rank,
        lora_alpha=2 * recipe.rank,
        target_modules=targets,
        bias="none",
        task_type="CAUSAL_LM",
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),  # GPT-2's layers
    )
    with warnings.catch_warnings():  # peft asks for a name that transformers calls old
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        return get_peft_model(model, options)


def _set_modes(model: Any, checkpointing: bool) -> None:
    """transformers recomputes activations in training mode only; nothing is ever dropped out.

    Not by its public method, which would also have embeddings ask for gradients, and leave a hook behind.
    """
    model._set_gradient_checkpointing(checkpointing, partial(torch_checkpoint, use_reentrant=False))
    model.train(checkpointing)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.eval()


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Random starts that follow from the seed, the same in every process; torch's generators stay as they were."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def _seed(*numbers: int) -> int:
    """One seed of several numbers."""
    return int.from_bytes(hashlib.sha256(repr(numbers).encode()).digest()[:8], "little") >> 1
