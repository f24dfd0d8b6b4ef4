"""The model card of a gate folder: what it is for, how it was made, what was measured."""

import json
from pathlib import Path
from typing import Any

from kvpleat.policies.gates import CONFIG_FILE

TEMPLATE = """---
library_name: kvpleat
tags: [kv-cache, compression, {method}]
---
# {title}

Gates that teach a {family} model ({num_layers} layers x {num_kv_heads} KV heads of {head_dim} channels) to compress its
key-value memory {ratio:g} times by {method}, with kvpleat. {inside}

```python
from kvpleat import compress, policies

with compress(model, policies.{policy}.from_pretrained("FOLDER")):
    model.generate(**inputs)
```

## Training

Distillation from the model itself without compression: KL per token, a one-sided penalty for compressing too little.

| | |
|---|---|
{training}

## Measured

{measured}
"""
POLICIES = {"dms": "DMS", "fold": "Fold", "dmc": "DMC"}


def write_card(folder: Path) -> None:
    """Write README.md beside the gates in `folder`, from their config."""
    config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    training = config["training"]
    rows = {"optimiser steps so far": training["step"], "tokens so far": f"{training['tokens']:,}"}
    rows |= training["recipe"] | training.get("about", {})
    text = TEMPLATE.format(
        method=config["method"],
        policy=POLICIES[config["method"]],
        title=f"{config['method']} {config['ratio']:g}x",
        ratio=config["ratio"],
        inside=_inside(folder),
        training="\n".join(f"| {name} | {_cell(value)} |" for name, value in rows.items()),
        measured=_measured(training["measured"]),
        **{key: config["base"][key] for key in ("family", "num_layers", "num_kv_heads", "head_dim")},
    )
    (folder / "README.md").write_text(text, encoding="utf-8")


def _inside(folder: Path) -> str:
    if (folder / "model").is_dir():
        return "All weights of the model were trained too; they are in the folder model."
    if (folder / "adapter_config.json").exists():
        return "A LoRA was trained beside them (adapter_*, PEFT's layout); kvpleat merges it while it compresses."
    return "The model's own weights are as they were."


def _cell(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _measured(figures: dict[str, Any]) -> str:
    if not figures:
        return "Nothing was measured on held-out text."
    lines = ["Hard decisions, held-out text, after the last token of each row:", "", "| | |", "|---|---|"]
    return "\n".join([*lines, *(f"| {name} | {value:.4g} |" for name, value in figures.items())])
