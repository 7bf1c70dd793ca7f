"""Zero-shot classes by two packages of CLIP, an image tower and a text tower, in float and in INT8, on a CPU.

export CLIP_FOLDER=/models/clip-vit-base-patch32    # which the text tower was built from
.venv/bin/python -m docs.examples.clip_zero_shot artifacts/clip_b32_image/int8 artifacts/clip_text.Text/int8 photos

`photos` is a folder of images. Where its subfolders are named as the classes of clip.json, or by their numbers or ImageNet's
wnids, the share of right classes is told too. The float networks are built again and compared with the manifests' sha256.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from calib.errors import UserError
from calib.images.folder import WNID, labels_from_names, listed
from calib.images.preprocess import array_from_image
from calib.images.samples import first_samples, inputs_from_file, samples_from_file
from calib.weights.load import load_net
from calib.weights.zoo import spec_of
from deploy.cli import Parser, answered
from deploy.measure.accuracy import mean_cosine
from deploy.measure.onnx_runner import OnnxRunner
from deploy.measure.tasks.features import unit
from deploy.package import MANIFEST, MODEL_FP32, read_json
from deploy.serve.shipped import Shipped, shipped_from_package

BATCH = 32
RANDOM = "-random-weights"  # what the name of such a package ends with


@dataclass(frozen=True)
class Tower:
    """The features (N, D) that one tower computes of the same N samples, in float and in INT8."""

    exact: np.ndarray
    rounded: np.ndarray


def float_net(shipped: Shipped, weights: str, prompts: Path) -> torch.nn.Module:
    """The float network that the package was built from. Raises UserError if its weights are others."""
    built = read_json(shipped.folder / MANIFEST)["weights"]
    factory = built["module"]["factory"] if built["module"] else None
    prepared = shipped.preprocessing
    spec = spec_of(shipped.model.removesuffix(RANDOM), factory, (prepared.height, prepared.width) if prepared else None)
    loaded = load_net(spec, "random" if shipped.random else weights, inputs=lambda: inputs_from_file(prompts))
    if loaded.sha256 != built["sha256"]:
        raise UserError(
            f"'{shipped.folder}' was built from other weights ({built['source']}) than {loaded.source}: expected the same; "
            f"give --image-weights or --text-weights, or CLIP_FOLDER as then"
        )
    return loaded.net


def tower(shipped: Shipped, net: torch.nn.Module, given: np.ndarray, name: str | None) -> Tower:
    """Both features of `given`: images (N, 3, H, W), or rows (N, K) of the input `name`, which are whole numbers."""
    runner, exact, rounded = OnnxRunner(shipped.folder / MODEL_FP32), [], []
    for start in range(0, len(given), BATCH):
        part = given[start : start + BATCH]
        with torch.inference_mode():
            exact.append(net(torch.from_numpy(part)).numpy())
        rounded.append(runner(part if name is None else {name: part.astype(np.int64)}))
    return Tower(np.concatenate(exact), np.concatenate(rounded))


def images_of(folder: Path, shipped: Shipped) -> tuple[np.ndarray, list[str]]:
    """(all images of a folder as the package reads them, their names). Raises UserError for one that cannot be read."""
    if shipped.preprocessing is None or not folder.is_dir():
        raise UserError(
            f"expected the package of an image tower and a folder of images, got '{shipped.folder}', '{folder}'"
        )
    names, arrays = listed(folder).images, []
    if not names:
        raise UserError(f"'{folder}' holds no images: expected JPEG or PNG files, in a subfolder for each class or not")
    for name in names:
        try:
            with Image.open(folder / name) as image:
                arrays.append(array_from_image(image, shipped.preprocessing))
        except (OSError, SyntaxError) as error:
            raise UserError(f"image '{folder / name}' cannot be read ({error}): remove it") from error
    return np.stack(arrays), [*names]


def labels_of(folder: Path, names: Sequence[str], classes: Sequence[str]) -> np.ndarray | None:
    """The class of each image by its subfolder; None without subfolders. Raises UserError for one that is no class."""
    if not any("/" in name for name in names):
        return None
    places = {name.replace("_", " "): index for index, name in enumerate(classes)}
    tops = [name.split("/")[0].replace("_", " ") if "/" in name else "" for name in names]
    if all(top in places for top in tops):
        return np.array([places[top] for top in tops])
    numbered = all(top.isdecimal() or WNID.fullmatch(top) for top in tops)
    found = labels_from_names(folder, names) if numbered else None
    if found is None or max(found.values()) >= len(classes):
        wrong = next(top for top in tops if top not in places)
        raise UserError(
            f"'{folder}' has the subfolder '{wrong}': expected the classes of clip.json, {', '.join(classes[:5])}..."
        )
    return np.array([found[name] for name in names])


def of_classes(texts: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """One vector (classes, D) of length 1 per class: the mean of its prompts, each of length 1."""
    return unit(np.stack([unit(texts)[groups == each].mean(0) for each in range(groups.max() + 1)]))


def table(images: Tower, texts: Tower, groups: np.ndarray, labels: np.ndarray | None) -> list[dict[str, Any]]:
    """One row for float, for INT8 images beside float texts, and for both in INT8."""
    pairs = {
        "float": (images.exact, texts.exact),
        "images in INT8": (images.rounded, texts.exact),
        "both in INT8": (images.rounded, texts.rounded),
    }
    classes = {name: (unit(seen) @ of_classes(said, groups).T).argmax(1) for name, (seen, said) in pairs.items()}
    prompts = {name: (unit(seen) @ unit(said).T).argmax(1) for name, (seen, said) in pairs.items()}
    return [
        {
            "towers": name,
            "top1": None if labels is None else float((classes[name] == labels).mean()),
            "same_class": float((classes[name] == classes["float"]).mean()),
            "same_prompt": float((prompts[name] == prompts["float"]).mean()),
        }
        for name in pairs
    ]


def read_prompts(prompts: Path, clip: Path, shipped: Shipped) -> tuple[str, np.ndarray, np.ndarray, list[str]]:
    """(name of the input, prompts (N, tokens), class of each prompt, names of the classes). Raises UserError."""
    classes = read_json(clip).get("classes")
    inputs = inputs_from_file(prompts)
    rows = first_samples(arrays := samples_from_file(prompts, inputs), len(next(iter(arrays.values()))))
    groups = np.load(prompts).get("groups")
    taken = [(each.name, each.shape) for each in shipped.inputs]
    if shipped.preprocessing is not None or taken != [(one.name, one.shape) for one in inputs.each] or len(taken) != 1:
        raise UserError(
            f"'{prompts}' holds {inputs.described()}: expected the input of the text tower in '{shipped.folder}'"
        )
    if not isinstance(classes, list) or groups is None or [*np.unique(groups)] != [*range(len(classes))]:
        raise UserError(
            f"'{clip}' and '{prompts}' do not fit: expected both from one run of docs/examples/clip_text.py"
        )
    return inputs.each[0].name, rows, np.asarray(groups), classes


def main(argv: Sequence[str] | None = None) -> int:
    """Judge two packages; returns the exit code."""
    parser = Parser(description=str(__doc__), formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, meaning in (
        ("image", "package of the image tower"),
        ("text", "package of the text tower"),
        ("photos", "folder"),
    ):
        parser.add_argument(name, type=Path, help=meaning)
    parser.add_argument("--prompts", type=Path, default=Path("prompts.npz"))
    parser.add_argument("--clip", type=Path, default=Path("clip.json"))
    parser.add_argument("--image-weights", default="auto", help="as WEIGHTS= was for the image tower (default auto)")
    parser.add_argument("--text-weights", default="auto", help="as WEIGHTS= was for the text tower (default auto)")
    args = parser.parse_args(argv)
    image, text = shipped_from_package(args.image), shipped_from_package(args.text)
    name, rows, groups, classes = read_prompts(args.prompts, args.clip, text)
    pictures, names = images_of(args.photos, image)
    labels = labels_of(args.photos, names, classes)
    images = tower(image, float_net(image, args.image_weights, args.prompts), pictures, None)
    texts = tower(text, float_net(text, args.text_weights, args.prompts), rows, name)
    if images.exact.shape[1] != texts.exact.shape[1]:
        raise UserError(
            f"images have {images.exact.shape[1]} features, texts {texts.exact.shape[1]}: expected towers of one CLIP"
        )
    print(f"{len(pictures)} images, {len(rows)} prompts of {len(classes)} classes")
    for row in table(images, texts, groups, labels):
        right = "" if row["top1"] is None else f"top-1 {row['top1']:.1%}, "
        print(f"{row['towers']:>15}: {right}same class {row['same_class']:.1%}, same prompt {row['same_prompt']:.1%}")
    print(
        f"cosine to float: images {mean_cosine(images.exact, images.rounded):.4f}, "
        f"prompts {mean_cosine(texts.exact, texts.rounded):.4f}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(answered(main))
