"""`python -m benchmarks.intake`: what the tool finds in every architecture of timm, without weights and without images.

Writes `results/intake.json`: for every architecture the numbers of layers, of those to be quantized, of places where channel
scales can move, of blocks and of attentions that can be INT8, or the reason why nothing was found, in one line. Weights are
random: they decide nothing here but the proof of every step, for which random numbers do. So that it takes an hour and not
days, networks for any size get images of `SIDE` pixels, others of at most `LARGEST_SIDE` where they can be built so, and
those of more than `LARGE` parameters have `DEPTH` blocks if their code has that option; one that fails so is tried in timm's
own form. What has more than `LARGEST` is skipped and counted as such. Each line says what was examined. A process may take
`GIGABYTES` of memory.

    python -m benchmarks.intake                  every architecture; goes on where a run of the same commit was interrupted
    python -m benchmarks.intake --every 3        every third one in timm's alphabetic order: a sample
    python -m benchmarks.intake 'vit_*' swin_t   some of them, by pattern; figures of others stay
"""

import json
import random
import resource
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from deploy import host
from deploy.report.evidence import tool_commit

RESULT = Path(__file__).parent / "results" / "intake.json"
LARGE = 50_000_000  # parameters from which on an architecture is built with fewer blocks, if it can be
LARGEST = 300_000_000  # parameters, of which the proof holds two copies in float64
GIGABYTES = 9  # per process
SIDE = 128  # pixels of the images of an architecture that takes any size
LARGEST_SIDE, SIDE_OF_FIXED = 288, 224  # an architecture for one size above the first is built for the second
DEPTH = 3  # blocks of a transformer that would be large
WORKERS = 2
EVERY = "--every"
CHUNK = 15  # architectures per process
EXAMINE = "--examine"  # the rest are names: examine them in this process


class TooLargeError(Exception):
    """An architecture that this machine cannot examine."""


def parameters(name: str, **options: Any) -> int | None:
    """Return how many parameters an architecture has with `options`, or None if it does not take them."""
    import timm
    import torch

    with torch.device("meta"):
        try:
            return sum(each.numel() for each in timm.create_model(name, **options).parameters())
        except (TypeError, ValueError, AssertionError, RuntimeError):
            return None


def examined(name: str) -> tuple[dict[str, Any], tuple[int, ...]]:
    """Return (options of the architecture, (channels, height, width) of the example), small enough for this machine.

    Raises TooLargeError if the architecture cannot be built with fewer blocks.
    """
    import timm

    config = timm.get_pretrained_cfg(name)
    assert config is not None
    channels, *own = config.input_size
    options: dict[str, Any] = {}
    if not config.fixed_input_size and min(own) > SIDE:
        own = [SIDE, SIDE]
    elif min(own) > LARGEST_SIDE and parameters(name, img_size=SIDE_OF_FIXED) is not None:
        options, own = {"img_size": SIDE_OF_FIXED}, [SIDE_OF_FIXED, SIDE_OF_FIXED]
    size = parameters(name, **options) or 0
    shorter = parameters(name, **options, depth=DEPTH) if size > LARGE else None
    if shorter is not None:
        options, size = {**options, "depth": DEPTH}, shorter
    if size > LARGEST:
        raise TooLargeError(f"{size / 1e6:.0f} million parameters, more than this machine takes")
    return options, (channels, *own)


def examine(name: str) -> dict[str, Any]:
    """Return the figures of one architecture, or the reason why there are none.

    One that fails in its small form is tried in timm's own.
    """
    import timm

    resource.setrlimit(resource.RLIMIT_AS, (GIGABYTES << 30, GIGABYTES << 30))
    config = timm.get_pretrained_cfg(name)
    assert config is not None
    try:
        small = examined(name)
    except TooLargeError as error:
        return {"skipped": str(error)}
    own: tuple[dict[str, Any], tuple[int, ...]] = ({}, tuple(config.input_size))
    found = figures(name, *small)
    too_large = (parameters(name) or 0) > LARGEST
    return figures(name, *own) if "reason" in found and small != own and not too_large else found


def figures(name: str, options: dict[str, Any], size: tuple[int, ...]) -> dict[str, Any]:
    """Return what is found in an architecture built with `options`, on an example of `size`, or why nothing is."""
    import warnings

    import timm
    import torch

    from calib.errors import UserError
    from calib.network.fold import fold_affine
    from calib.quant_model import QuantModel
    from deploy.report.structure import structure_json

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    start = time.perf_counter()
    try:
        net = timm.create_model(name, **options).eval().requires_grad_(False)
        found = structure_json(fold_affine(QuantModel.of(name, net), torch.randn(1, *size)).structure)
    except UserError as error:
        return {"reason": str(error).splitlines()[0]}
    except Exception as error:  # what an architecture raises is the finding
        return {"reason": f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}", "bug": True}
    counted = ("quantized", "float", "places", "refused_places", "blocks", "int8_attention")
    shown = {"input": "x".join(map(str, size)), **options}
    counts = {key: len(found[key]) for key in counted}
    return {"kind": found["kind"], **shown, **counts, "seconds": round(time.perf_counter() - start, 1)}


def examine_all(names: Sequence[str]) -> None:
    """Print the figures of each architecture as a line of JSON: what a process of its own does."""
    for name in names:
        print(json.dumps({"name": name, **examine(name)}), flush=True)


def in_a_process(names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Return the figures of `names`, examined in another process; where it dies, that is the reason for the next name."""
    found: dict[str, dict[str, Any]] = {}
    waiting = list(names)
    while waiting:
        command = [sys.executable, "-m", "benchmarks.intake", EXAMINE, *waiting]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=False)
        lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
        found |= {line.pop("name"): line for line in lines}
        waiting = [name for name in waiting if name not in found]
        if waiting:
            found[waiting.pop(0)] = {"reason": "the process died, probably for memory", "bug": True}
    return found


def results(names: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the figures of each architecture as they come."""
    chunks = [names[start : start + CHUNK] for start in range(0, len(names), CHUNK)]
    with ThreadPoolExecutor(WORKERS) as pool:
        for found in pool.map(in_a_process, chunks):
            yield from found.items()


def has_structure(found: dict[str, Any]) -> bool:
    """Whether layers, places for channel scales and blocks were found."""
    return bool(found.get("quantized") and found.get("places") and found.get("blocks"))


def main(patterns: Sequence[str]) -> int:
    """Examine the architectures that match `patterns`, or all; returns the exit code."""
    if patterns and patterns[0] == EXAMINE:
        examine_all(patterns[1:])
        return 0
    import timm

    every = 1
    if patterns and patterns[0] == EVERY:
        if len(patterns) != 2 or not patterns[1].isdigit() or int(patterns[1]) < 1:
            print(f"{EVERY}: expected a number of 1 or more and nothing else", file=sys.stderr)
            return 2
        every, patterns = int(patterns[1]), ()
    names = timm.list_models()[::every]
    chosen = [name for name in names if not patterns or any(fnmatch(name, pattern) for pattern in patterns)]
    if not chosen:
        print(f"no architecture of timm matches {', '.join(patterns)}", file=sys.stderr)
        return 2
    command = "python -m benchmarks.intake" + (f" {EVERY} {every}" if every > 1 else "")
    before = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    interrupted = before.get("commit") == tool_commit() and not before.get("complete") and before["command"] == command
    kept = before["architectures"] if before and (patterns or interrupted) else {}
    waiting = chosen if patterns else [name for name in chosen if name not in kept]
    random.Random(0).shuffle(waiting)  # what an interrupted run has seen is a fair sample
    for number, (name, found) in enumerate(results(waiting), 1):
        kept[name] = found
        print(f"{len(kept)}/{len(names)} {name}: {json.dumps(found)}", flush=True)
        if number % CHUNK == 0:
            write(kept, command, complete=False)
    report = write(kept, command, complete=all(name in kept for name in names))
    print(
        f"{report['with_places_and_blocks']} of {report['tried']} architectures have layers, places and blocks "
        f"({report['skipped']} skipped)"
    )
    return 0


def write(kept: dict[str, dict[str, Any]], command: str, complete: bool) -> dict[str, Any]:
    """Write `results/intake.json` and return it."""
    import timm

    tried = [found for found in kept.values() if "skipped" not in found]
    report = {
        "architectures": dict(sorted(kept.items())),
        "in_timm": len(timm.list_models()), "complete": complete,
        "tried": len(tried), "skipped": len(kept) - len(tried),
        "traced": sum("reason" not in found for found in tried),
        "with_places_and_blocks": sum(map(has_structure, tried)),
        "reasons": Counter(found["reason"][:80] for found in tried if "reason" in found),
        "machine": host.describe(), "commit": tool_commit(), "command": command,
    }  # fmt: skip
    RESULT.write_text(json.dumps(report, indent=1) + "\n")
    return report


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
