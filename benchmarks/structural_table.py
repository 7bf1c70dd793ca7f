"""`python -m benchmarks.structural_table`: what INT8, branches and FP8 change in the kernels of an engine, by network.

    python -m benchmarks.structural_table                   all of NETWORKS
    python -m benchmarks.structural_table swin_t resnet50   some; the rows of the others stay as they are

Kernels and the sizes of their tensors depend on the structure of the graph, hardly on its numbers. So weights are random,
images are noise, and branches stand beside every block that can have one, whether they help or not. What is counted is what
TensorRT-RTX plans for SM89; nothing runs.
"""

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.fp8_twin import fp8_twin
from calib.attention import int8 as attention
from calib.attention.int8 import int8_attention
from calib.errors import UserError, first_line
from calib.grids import Unrounded
from calib.images.batches import Half, Part
from calib.layerwise.int8_products import linear_layers
from calib.layerwise.rounding_points import reach
from calib.methods import rtn
from calib.network.fold import fold_affine
from calib.network.qdq import quantized_net
from calib.quant_model import Branch, QuantModel
from calib.quantizer import qparams_from_amax
from calib.scales.calibrate import Config, calibrate
from calib.weights.load import load_net
from calib.weights.zoo import ZOO
from compensation.branch import BlockBranch
from compensation.forms import FORMS, Place
from compensation.moments import Moments
from compensation.qwt import places
from deploy import host
from deploy.bridge.export import export_fp16
from deploy.engine.audit import audit, planned_layers
from deploy.engine.backends import tensorrt_rtx
from deploy.engine.build import Profile
from deploy.engine.kernels import Kernel, megabytes_per_image
from deploy.package import read_json
from deploy.report.evidence import tool_commit

ROOT = Path(__file__).parents[1]
RESULT, PAGE = ROOT / "benchmarks/results/structure.json", ROOT / "docs/structure.md"
NETWORKS = ("vit_s", "vit_b", "deit_s", "swin_t", "resnet50", "efficientnet_lite0")
ENGINES = {
    "fp16": "FP16", "int8": "INT8", "int8_dense": "INT8 + QwT, dense", "int8_shared": "INT8 + QwT, shared",
    "int8_products": "INT8, every product in INT8", "int8_attention": "INT8, attention in INT8",
    "int8_both": "INT8, both", "fp8": "FP8 in place of INT8",
}  # fmt: skip
SM, BATCH = 89, 8
SIZE_OF_BRANCH = 0.01  # of its outputs beside noise: its scale decides which products an engine may merge

INTRODUCTION = """# Kernels of an engine in FP16, in INT8, with branches and in FP8

Written by `python -m benchmarks.structural_table` from [structure.json](../benchmarks/results/structure.json). Weights are
random; branches stand beside every block that can have one, and products and attention are in INT8 wherever they can be:
this is about the structure of engines, not about accuracy, for which a recipe chooses few of them.
MB: the sizes of all tensors that kernels read and write, per image at batch {batch}, an upper bound of the traffic with the
GPU's memory. Convolutions are planned in INT8; which kernel runs them is chosen on the GPU. Nothing was run on a GPU.
[Why is INT8 not faster?](why-is-int8-not-faster.md) explains the differences.
"""
COLUMNS = ("kernels", "INT8 GEMMs", "planned INT8 convolutions", "fused attention", "MB per image")


def noise(size: Sequence[int]) -> list[Half]:
    """Two halves of calibration images (3, H, W), 16 in all."""
    generator = torch.Generator().manual_seed(0)
    parts = [Part([torch.randn(4, *size, generator=generator)]) for _ in range(4)]
    return [Half((parts[0], parts[1])), Half((parts[2], parts[3]))]


def _branch(form: str, place: Place) -> BlockBranch:
    """A branch of `form` at `place`, fitted to noise."""
    groups = []
    for _ in range(place.layout.groups):
        moments, rows = Moments(place.layout.d_in, place.layout.d_out), 2 * place.layout.d_in
        moments.update(torch.randn(rows, place.layout.d_in), SIZE_OF_BRANCH * torch.randn(rows, place.layout.d_out))
        groups.append(moments)
    return FORMS[form].fit(groups, place, 0.0)


def with_branches(model: QuantModel, forms: Sequence[str], image: Tensor) -> QuantModel | None:
    """`model` with a branch of the first form that can stand at a block beside every block; None if there is no such block.

    Raises ValueError if a block is not called, or edits its input.
    """
    torch.manual_seed(0)
    branches: dict[str, Branch] = {}
    for block, place in places(model, quantized_net(model), image).of.items():
        if form := next((form for form in forms if place.serves(form)), None):
            branches[block] = _branch(form, place)
    return replace(model, branches=branches) if branches else None


def with_products(model: QuantModel, halves: Sequence[Half]) -> QuantModel | None:
    """`model` with the products of all its linear layers in INT8, up to the largest that was seen; None if it has none."""
    layers = linear_layers(model)
    if not layers:
        return None
    net = quantized_net(model.with_quantizers({f"{layer}:output": Unrounded() for layer in layers}))
    largest, _ = reach(net, {layer: f"{layer}.output" for layer in layers}, halves[0])
    grids = {f"{layer}:output": qparams_from_amax(torch.tensor(value)) for layer, value in largest.items()}
    return model.with_quantizers(grids)


def with_attention(model: QuantModel, halves: Sequence[Half]) -> QuantModel | None:
    """`model` with all its attention in INT8; None if there is none that can be."""
    return int8_attention(model, halves, attention.Config(int8="all")) if model.structure.attentions else None


def figures(kernels: Sequence[Kernel], planned: Sequence[str]) -> dict[str, Any]:
    """What is counted of an engine; `planned`: its layers planned for INT8."""
    found = audit(kernels, planned)
    return {
        "kernels": found.kernels,
        "int8_gemms": found.int8_gemms,
        "planned_int8_convolutions": found.int8_convs,
        "fused_attention": found.fused_attention,
        "int8_attention": found.int8_attention,
        "lost": list(found.lost),
        "mb_per_image": megabytes_per_image(kernels, BATCH),
        "gmac_per_image": sum(kernel.macs or 0 for kernel in kernels) / 1e9,
    }


def measure(name: str) -> dict[str, Any]:
    """Build the engines of the network `name`, with random weights; by engine what is counted, or why there is none."""
    loaded = load_net(ZOO[name], "random")
    size = loaded.data_config["input_size"]
    halves = noise(size)
    image = next(iter(halves[0].parts[0]))[:1]
    model = calibrate(fold_affine(QuantModel.of(name, loaded.net), image), halves, Config("max"))
    model = rtn.nearest(model).whole

    def built(net: Callable[[], torch.nn.Module | None], in_fp8: bool = False) -> dict[str, Any]:
        try:
            module = net()
        except ValueError as error:
            return {"none": str(error)}
        if module is None:
            return {"none": "the network has no product or attention of this kind"}
        graph = export_fp16(module, (size[1], size[2]))
        try:
            kernels = tensorrt_rtx.build(fp8_twin(graph) if in_fp8 else graph, Profile(), (SM,)).kernels
        except UserError as error:
            if not in_fp8:
                raise
            return {"none": first_line(error)}
        return figures(kernels, () if in_fp8 else planned_layers(graph))

    def branched(*forms: str) -> Callable[[], torch.nn.Module | None]:
        return lambda: quantized_net(found) if (found := with_branches(model, forms, image)) else None

    def rounded() -> torch.nn.Module:
        return quantized_net(model)

    def of(changed: QuantModel | None) -> Callable[[], torch.nn.Module | None]:
        return lambda: None if changed is None else quantized_net(changed)

    attended = with_attention(model, halves)
    engines = {
        "fp16": built(lambda: model.float_net), "int8": built(rounded), "int8_dense": built(branched("dense")),
        "int8_shared": built(branched("shared", "shared_mlp")), "int8_products": built(of(with_products(model, halves))),
        "int8_attention": built(of(attended)), "int8_both": built(of(attended and with_products(attended, halves))),
        "fp8": built(rounded, in_fp8=True),
    }  # fmt: skip
    return {"network": name, "tag": ZOO[name].tag, "size": list(size), "blocks": len(model.structure.blocks), **engines}


def _cells(found: dict[str, Any]) -> list[str]:
    if "none" in found:
        return ["none"] + [""] * (len(COLUMNS) - 1)
    attention = f"{found['fused_attention']}" + (
        f" ({found['int8_attention']} INT8)" if found["int8_attention"] else ""
    )
    return [
        str(found["kernels"]), str(found["int8_gemms"]), str(found["planned_int8_convolutions"]), attention,
        f"{found['mb_per_image']:.1f}",
    ]  # fmt: skip


def _reasons(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Why networks have no engine of some kinds."""
    found: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        for engine, title in ENGINES.items():
            if "none" in row[engine]:
                found.setdefault((row["network"], row[engine]["none"]), []).append(title)
    return [f"{network}, {'; '.join(titles)}: {reason}" for (network, reason), titles in found.items()]


def page(result: dict[str, Any]) -> str:
    """docs/structure.md: a table of all rows of `result`."""
    lines = [INTRODUCTION.format(batch=BATCH), f"| network | engine | {' | '.join(COLUMNS)} |"]
    lines.append("|---|---|" + "---:|" * len(COLUMNS))
    for row in result["rows"]:
        for index, (engine, title) in enumerate(ENGINES.items()):
            lines.append(f"| {row['network'] if not index else ''} | {title} | {' | '.join(_cells(row[engine]))} |")
    lines += ["", *(f"- {reason}" for reason in _reasons(result["rows"]))]
    commits = ", ".join(dict.fromkeys(row["commit"] for row in result["rows"]))
    lines += ["", f"TensorRT-RTX {result['version']} for SM{SM}, built at commit {commits}.", ""]
    return "\n".join(lines)


def merged(rows: Sequence[dict[str, Any]], new: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """`rows` with those of the same network replaced by `new`, in the order of NETWORKS; older ones lack some of ENGINES."""
    by_name = {row["network"]: row for row in (*rows, *new) if row.keys() >= ENGINES.keys()}
    return [by_name[name] for name in NETWORKS if name in by_name]


def main(names: Sequence[str]) -> int:
    """Measure the networks `names`, or all, and write the result and the page after each; returns the exit code."""
    if unknown := [name for name in names if name not in NETWORKS]:
        print(f"unknown network '{unknown[0]}': expected some of {', '.join(NETWORKS)}", file=sys.stderr)
        return 2
    commit = str(tool_commit())  # before anything is written
    for name in names or NETWORKS:
        print(name, file=sys.stderr)
        row = measure(name) | {"commit": commit, "date": datetime.now(UTC).isoformat(timespec="seconds")}
        rows = read_json(RESULT)["rows"] if RESULT.exists() else []
        result = {
            "weights": "random", "sm": SM, "batch": BATCH, "backend": tensorrt_rtx.NAME, "version": tensorrt_rtx.version(),
            "machine": host.describe(), "command": "python -m benchmarks.structural_table", "rows": merged(rows, [row]),
        }  # fmt: skip
        RESULT.write_text(json.dumps(result, indent=2) + "\n")
        PAGE.write_text(page(result))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
