"""`python -m benchmarks.qwt_latency`: table 2 of QwT on this machine's GPU, with FP16 beside the paper's FP32.

    python -m benchmarks.qwt_latency                              weights from the timm hub
    python -m benchmarks.qwt_latency deit_t --weights random      one network, for its times alone

For each network it builds the packages with `make engine`, plain 8-bit percentile scales without and with the branches of
QwT, and times them by `benchmarks.gpu_latency` at batch 64. Published figures, of an RTX 3090, are beside those measured.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks import gpu_latency
from benchmarks.engines import engine_arguments
from calib.errors import UserError
from deploy.cli import Parser, answered

BATCH = 64
RECIPES = ("int8_plain", "int8_plain_qwt", "int8_plain_qwt_shared")
PUBLISHED = {  # ms of FP32, percentile, percentile + QwT: table 2 of QwT, RTX 3090, batch 64
    "deit_t": (11.6, 2.8, 3.2), "swin_t": (34.5, 9.5, 10.9), "swin_s": (61.0, 16.0, 17.9), "vit_s": (28.3, 5.8, 6.6),
    "vit_b": (85.3, 15.5, 17.5),
}  # fmt: skip


def make(command: Sequence[str]) -> int:
    """Run `python -m deploy` in a process of its own; its exit code."""
    return subprocess.run([sys.executable, "-m", "deploy", *command], check=False).returncode


def packages(model: str, options: argparse.Namespace) -> None:
    """Build the packages of `model`. Raises UserError if one cannot be built; why is on stderr already."""
    for recipe in RECIPES:
        given = {"model": model, "recipe": recipe, "weights": options.weights, "calib": options.calib, "out": options.out,
                 "target": options.target, "batch": str(BATCH), "max-batch": str(BATCH)}  # fmt: skip
        if make(engine_arguments(given)):
            raise UserError(f"no package of {model} with {recipe}: see above")


def lines(model: str, row: Mapping[str, Any]) -> list[str]:
    """Return what was measured of one network beside what was published."""
    published = dict(zip(("fp32", *RECIPES), PUBLISHED[model], strict=False))
    return [
        f"{model:8} {name:24} {each['median_ms']:8.2f} ms"
        + (f"   published {published[name]:5.1f} ms" if name in published else "")
        for name, each in row["engines"].items()
    ]


def _main(argv: Sequence[str]) -> int:
    parser = Parser(prog="python -m benchmarks.qwt_latency")
    parser.add_argument("models", nargs="*", help=f"some of {', '.join(PUBLISHED)} (default: all)")
    parser.add_argument("--weights", default="auto", help="as WEIGHTS= of make engine")
    parser.add_argument("--calib", default="", help="as CALIB= of make engine")
    parser.add_argument("--target", default="auto", help="auto, tensorrt or tensorrt_rtx")
    parser.add_argument("--out", default="artifacts", help="root of the packages (default artifacts)")
    options = parser.parse_args(argv)
    if unknown := [model for model in options.models if model not in PUBLISHED]:
        raise UserError(f"unknown network '{unknown[0]}': expected some of {', '.join(PUBLISHED)}")
    gpu_latency.gpu_backend(options.target)
    shown = []
    for model in options.models or PUBLISHED:
        packages(model, options)
        timed = ["--weights", options.weights, "--target", options.target, "--out", options.out, "--fp32"]
        if code := gpu_latency.main([model, *RECIPES, *timed, "--batch", str(BATCH)]):
            return code
        found = json.loads(gpu_latency.result_file(model).read_text())
        shown += lines(model, found["batches"][0])
    print("\n".join(shown))
    return 0


def main(argv: Sequence[str]) -> int:
    """Build, time and print; returns the exit code."""
    return answered(lambda: _main(argv))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
