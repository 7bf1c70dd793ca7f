"""LLaMA and OPT of transformers: a text at once (Prefill), or one more token behind a past of fixed length (Step).

.venv/bin/pip install transformers==5.24.0
export DECODER=/models/opt-1.3b    # a folder that from_pretrained reads; without it: small networks with random weights
.venv/bin/python docs/examples/decoder_blocks.py write OPTPrefill --ids ids.npy    # calib.npz and eval.npz
make engine MODULE=docs/examples/decoder_blocks.py:OPTPrefill CALIB=calib.npz EVAL=eval.npz
.venv/bin/python docs/examples/decoder_blocks.py compare artifacts/decoder_blocks.OPTPrefill/int8 eval.npz

`OPTStep`, `LlamaPrefill` and `LlamaStep` likewise. `ids.npy`: int64 (N, TOKENS), token ids of texts; without it they are
random. Of random weights or random ids, agreement and perplexity say nothing.
"""

import argparse
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, OPTConfig
from transformers.cache_utils import DynamicCache

TOKENS = 64  # of a text; a step has one fewer behind it
LLAMA: dict[str, Any] = {
    "vocab_size": 1000, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2,
}  # fmt: skip
OPT: dict[str, Any] = {
    "vocab_size": 1000, "hidden_size": 256, "ffn_dim": 512, "num_hidden_layers": 4, "num_attention_heads": 4,
    "word_embed_proj_dim": 256,
}  # fmt: skip


class Prefill(nn.Module):
    """All tokens of a text at once. Its head and its embedding stay in float: they are the last layer and a table."""

    returns_tokens = True  # logits of the token behind every position

    def __init__(self, config: Any) -> None:
        super().__init__()
        folder = os.environ.get("DECODER")
        self.net = (
            AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")
            if folder
            else AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
        )

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Compute the logits (B, T, vocabulary) of `input_ids` (B, T); what fills up the end of a text has the mark 0."""
        return self.net(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits


class Step(Prefill):
    """One token behind P others, of which only keys and values are left."""

    returns_tokens = False

    def forward(self, input_ids: Tensor, attention_mask: Tensor, keys: Tensor, values: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        """Compute the logits of the next token, and the keys and values of this one, to be put behind the others.

        Args:
            input_ids: (B, 1), the token.
            attention_mask: (B, P + 1), 0 for places of the past that hold nothing.
            keys: (B, layers, heads of keys, P, width of a head), those of the past.
            values: of the same shape.

        Returns:
            "logits" (B, vocabulary), "new_keys" and "new_values" (B, layers, heads of keys, 1, width of a head).
        """
        cache = DynamicCache([(keys[:, layer], values[:, layer]) for layer in range(keys.shape[1])])
        found = self.net(input_ids=input_ids, attention_mask=attention_mask, cache=cache, use_cache=True)
        return {
            "logits": found.logits[:, -1],
            "new_keys": torch.stack([layer.keys[:, :, -1:] for layer in cache.layers], 1),
            "new_values": torch.stack([layer.values[:, :, -1:] for layer in cache.layers], 1),
        }


def LlamaPrefill() -> nn.Module:  # noqa: N802 - the name of the package
    """LLaMA, all tokens of a text at once."""
    return Prefill(LlamaConfig(**LLAMA))


def LlamaStep() -> nn.Module:  # noqa: N802
    """LLaMA, one more token."""
    return Step(LlamaConfig(**LLAMA))


def OPTPrefill() -> nn.Module:  # noqa: N802
    """OPT, all tokens of a text at once."""
    return Prefill(OPTConfig(**OPT))


def OPTStep() -> nn.Module:  # noqa: N802
    """OPT, one more token."""
    return Step(OPTConfig(**OPT))


FACTORIES = {each.__name__: each for each in (LlamaPrefill, LlamaStep, OPTPrefill, OPTStep)}


@torch.inference_mode()
def step_arrays(net: nn.Module, ids: np.ndarray) -> dict[str, np.ndarray]:
    """Return what a `Step` reads at the last of `ids` (N, T): keys and values are those of the float network."""
    pasts = []
    for row in torch.from_numpy(ids[:, :-1]):
        cache = net.net(input_ids=row[None], use_cache=True).cache  # type: ignore[operator,union-attr]
        pasts.append([(layer.keys[0], layer.values[0]) for layer in cache.layers])
    keys, values = (np.stack([[pair[which].numpy() for pair in past] for past in pasts]) for which in (0, 1))
    return {"input_ids": ids[:, -1:], "attention_mask": np.ones_like(ids), "keys": keys, "values": values}


def ids_from(path: str, vocabulary: int) -> np.ndarray:
    """Return the token ids (N, TOKENS) of a .npy file. Raises UserError if it holds none."""
    from calib.errors import UNREADABLE_ARRAYS, UserError

    expected = f"expected int64 (N, {TOKENS}), two texts or more, ids from 0 to {vocabulary - 1}"
    try:
        ids = np.load(path, allow_pickle=False)
    except UNREADABLE_ARRAYS as error:
        raise UserError(f"'{path}' cannot be read ({error}): {expected}") from error
    if ids.dtype != np.int64 or ids.ndim != 2 or ids.shape[1] != TOKENS or len(ids) < 2:
        raise UserError(f"'{path}' holds {ids.dtype} {ids.shape}: {expected}")
    if ids.min() < 0 or ids.max() >= vocabulary:
        raise UserError(f"'{path}' holds ids from {ids.min()} to {ids.max()}: {expected}")
    return ids


def write(args: argparse.Namespace) -> None:
    """Write calib.npz, and eval.npz of every fifth text."""
    torch.manual_seed(0)  # WEIGHTS=random takes this seed too, and a step needs keys and values of the same network
    net = FACTORIES[args.factory]().eval()
    vocabulary = net.net.config.vocab_size  # type: ignore[union-attr]
    ids = np.random.default_rng(0).integers(0, vocabulary, (args.samples, TOKENS))
    if args.ids:
        ids = ids_from(args.ids, vocabulary)
    judged = np.arange(len(ids)) % 5 == 0
    args.to.mkdir(parents=True, exist_ok=True)
    for name, rows in (("calib", ids[~judged]), ("eval", ids[judged])):
        arrays = {"input_ids": rows, "attention_mask": np.ones_like(rows)}
        np.savez(args.to / f"{name}.npz", **(step_arrays(net, rows) if isinstance(net, Step) else arrays))
        print(f"{args.to / name}.npz: {len(rows)} texts, {args.ids or 'random ids'}")


def compare(args: argparse.Namespace) -> None:
    """Print how often a package's INT8 graph and the float network tell the same next token, and their perplexities."""
    from calib.errors import UserError
    from calib.images.samples import inputs_from_file, samples_from_file
    from calib.weights.load import load_net
    from calib.weights.zoo import own_model
    from deploy.measure.onnx_runner import OnnxRunner
    from deploy.measure.tasks.tokens import perplexity
    from deploy.package import MANIFEST, read_json

    manifest = read_json(args.package / MANIFEST)
    if manifest["weights"]["module"] is None:
        raise UserError(f"'{args.package}' is of the model {manifest['model']}: expected a package of this file")
    inputs = inputs_from_file(args.data)
    loaded = load_net(own_model(manifest["weights"]["module"]["factory"]), args.weights, inputs=lambda: inputs)
    if loaded.sha256 != manifest["weights"]["sha256"]:
        raise UserError(f"'{args.package}' was made of other weights: expected the same DECODER= and --weights")
    if loaded.random or not os.environ.get("DECODER"):
        print("RANDOM WEIGHTS: these figures say nothing of a language model")
    arrays = samples_from_file(args.data, loaded.inputs or inputs)
    graph, found = OnnxRunner(args.package / "model.fp32.onnx"), []
    for row in range(len(arrays["input_ids"])):
        given = {name: array[row : row + 1] for name, array in arrays.items()}
        with torch.inference_mode():
            told = loaded.net(**{name: torch.from_numpy(array) for name, array in given.items()})
        exact = told["logits"] if isinstance(told, dict) else told
        named = graph.named_outputs(given)
        found.append((exact.numpy(), named.get("logits", next(iter(named.values())))))
    exact, rounded = (np.concatenate(each) for each in zip(*found, strict=True))
    agreement = (exact.argmax(-1) == rounded.argmax(-1))[arrays["attention_mask"] != 0] if exact.ndim == 3 else (
        exact.argmax(-1) == rounded.argmax(-1)
    )  # fmt: skip
    print(f"next token the same as float's: {agreement.mean():.1%} of {agreement.size} places")
    if exact.ndim == 3:
        ids, mask = arrays["input_ids"], arrays["attention_mask"]
        of_float, of_int8 = (perplexity(logits, ids, mask) for logits in (exact, rounded))
        print(f"perplexity: float {of_float:.3f}, INT8 {of_int8:.3f}")


def main(argv: list[str] | None = None) -> int:
    """Run one of the two commands; returns the exit code."""
    sys.path.insert(0, str(Path(__file__).parents[2]))  # the tool itself
    from deploy.cli import answered

    parser = argparse.ArgumentParser(description=main.__doc__)
    verbs = parser.add_subparsers(required=True)
    writing = verbs.add_parser("write", help="write calib.npz and eval.npz")
    writing.add_argument("factory", choices=FACTORIES)
    writing.add_argument("--ids", help=f"a .npy with token ids, int64 (N, {TOKENS}); default: random ids")
    writing.add_argument("--samples", type=int, default=80, help="texts of random ids without --ids (default 80)")
    writing.add_argument("--to", type=Path, default=Path(), help="the folder of both files")
    comparing = verbs.add_parser("compare", help="compare a package with the float network")
    comparing.add_argument("package", type=Path)
    comparing.add_argument("data", type=Path, help="a .npz as write made it")
    comparing.add_argument("--weights", default="auto", help="what WEIGHTS= was")
    for each, verb in ((writing, write), (comparing, compare)):
        each.set_defaults(verb=verb)
    args = parser.parse_args(argv)

    def run() -> int:
        args.verb(args)
        return 0

    return answered(run)


if __name__ == "__main__":
    sys.exit(main())
