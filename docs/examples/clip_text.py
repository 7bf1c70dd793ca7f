"""The text tower of CLIP, of a folder as Hugging Face keeps it (config.json, model.safetensors, tokenizer.json).

.venv/bin/pip install transformers==5.24.0
export CLIP_FOLDER=/models/clip-vit-base-patch32
.venv/bin/python docs/examples/clip_text.py classes.txt    # one class a line; writes prompts.npz and clip.json
make engine MODULE=docs/examples/clip_text.py:Text CALIB=prompts.npz
"""

import json
import os
import sys
from pathlib import Path

import numpy as np
from torch import Tensor, nn
from transformers import AutoTokenizer, CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTextModelWithProjection, logging

logging.set_verbosity_error()  # it would list the weights of the image tower, which is not read here
logging.disable_progress_bar()
FOLDER = "CLIP_FOLDER"  # the variable of the environment
TEMPLATES = (
    "a photo of a {}.", "a photo of the {}.", "a close-up photo of a {}.", "a blurry photo of a {}.",
    "a black and white photo of a {}.", "a drawing of a {}.", "a photo of a small {}.", "a photo of a large {}.",
)  # fmt: skip


def folder() -> str:
    """The folder of the model. Ends the program with one line where the environment names none."""
    found = os.environ.get(FOLDER, "")
    if not (Path(found) / "config.json").is_file():
        raise SystemExit(f"{FOLDER}='{found}': expected a folder with a CLIP of transformers (config.json)")
    return found


class Text(nn.Module):
    """The features of texts in the space that they share with images, not normalised; without a folder of random weights."""

    def __init__(self) -> None:
        super().__init__()
        self.net: nn.Module
        if os.environ.get(FOLDER):
            self.net = CLIPTextModelWithProjection.from_pretrained(folder())
        else:
            print(f"{FOLDER} is not set: the text tower has random weights", file=sys.stderr)
            self.net = CLIPTextModelWithProjection(CLIPTextConfig())

    def forward(self, input_ids: Tensor) -> Tensor:
        """Compute (B, width) of `input_ids` (B, tokens): causal attention, read at the first end token of each text."""
        return self.net(input_ids=input_ids).text_embeds


def tokens(texts: list[str], length: int) -> np.ndarray:
    """The ids int64 (N, length) of texts, by the tokenizer of the folder; behind a text comes the end token."""
    tokenizer = AutoTokenizer.from_pretrained(folder())
    rows = tokenizer(texts, padding="max_length", truncation=True, max_length=length, return_tensors="np")
    return rows["input_ids"].astype(np.int64)


def main() -> None:
    """Write the prompts of the classes that a file names, and what a client needs beside the features."""
    if len(sys.argv) != 2 or not Path(sys.argv[1]).is_file():
        raise SystemExit("expected the path of a text file with the names of classes, one a line")
    classes = [line.strip() for line in Path(sys.argv[1]).read_text().splitlines() if line.strip()]
    config = CLIPConfig.from_pretrained(folder())
    texts = [template.format(name) for name in classes for template in TEMPLATES]
    ids = tokens(texts, config.text_config.max_position_embeddings)
    np.savez("prompts.npz", input_ids=ids, groups=np.arange(len(ids)) // len(TEMPLATES))
    scale = float(CLIPModel.from_pretrained(folder()).logit_scale.detach().exp())
    Path("clip.json").write_text(
        json.dumps({"logit_scale": scale, "classes": classes, "templates": TEMPLATES}, indent=1)
    )
    print(f"prompts.npz: {len(ids)} prompts of {len(classes)} classes; clip.json: logit scale {scale:.2f}")


if __name__ == "__main__":
    main()
