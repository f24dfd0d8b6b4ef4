"""Which tokens of a text were merged, layer by layer: `python -m kvpleat.bench.encoder.picture [TEXT] --out FILE.svg`

How to read it stands in `kvpleat.bench.report.merged`. What is shown comes from the run that draws it.
"""

import argparse
from pathlib import Path

import torch

from kvpleat.bench.encoder.methods import Method, parse
from kvpleat.bench.report.merged import draw
from kvpleat.hf.embed import cut, max_tokens, tokenize
from kvpleat.hf.minilm import NAME
from kvpleat.hf.models import LoadedModel, load_encoder

SENTENCE = (  # of John F. Kennedy's inaugural address, a work of the US Government
    "My fellow citizens of the world: ask not what America will do for you, but what together we can do for the "
    "freedom of man. Finally, whether you are citizens of America or citizens of the world, ask of us here the same "
    "high standards of strength and sacrifice which we ask of you."
)


@torch.inference_mode()
def trace(loaded: LoadedModel, method: Method, text: str) -> tuple[list[str], list[list[int]]]:
    """The tokens of a text, and for each layer the group of each token after it, by one forward."""
    (row,) = cut(tokenize(loaded, [text]), max_tokens(loaded))
    with method.on(loaded.model) as attached:
        loaded.model(input_ids=torch.tensor([row], device=loaded.model.device))
        groups = method.groups(attached)
    return [str(token) for token in loaded.tokenizer.convert_ids_to_tokens(row)], groups


def main(argv: list[str] | None = None) -> None:
    """Command line of the picture."""
    parser = argparse.ArgumentParser(prog="python -m kvpleat.bench.encoder.picture", description=__doc__)
    parser.add_argument("text", nargs="?", default=SENTENCE, help="to encode; some words of a speech without it")
    parser.add_argument("--out", type=Path, required=True, help="SVG file to write")
    parser.add_argument("--model", default=NAME)
    parser.add_argument("--policy", default="merge:ratio=2.6")
    args = parser.parse_args(argv)
    method = parse(args.policy)
    tokens, layers = trace(load_encoder(args.model, dtype="float32"), method, args.text)
    if not layers:
        parser.error(f"{args.policy} merges nothing, so there is nothing to draw.")
    picture = draw(tokens, layers, f"{args.model}, {method.label}", xmlns="http://www.w3.org/2000/svg")
    args.out.write_text(picture + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
