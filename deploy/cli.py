"""The command line: parses, calls, and turns a user's mistake into one line and exit code 2."""

import argparse
import errno
import io
import json
import os
import re
import signal
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from calib.errors import UserError, suggestion
from calib.store.paths import expanded
from calib.weights.zoo import input_size
from deploy.arguments import architectures, count
from deploy.errors import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_USER_ERROR, ContractError
from deploy.host import require_address_space
from deploy.package_options import DEFAULTS, add_package, folder_from_options
from deploy.serve.verbs import SERVE_VERBS, add_serve_verbs

# What libraries say, in exceptions of many types, when the machine has no more memory to give.
OUT_OF_MEMORY = (
    "can't allocate memory", "cannot allocate memory", "failed to map segment", "failed to allocate memory", "bad_alloc",
    "bad allocation", "out of memory", "can't start new thread",
)  # fmt: skip
# Packages of requirements-base.txt that a command imports when it runs.
NEEDED = ("numpy", "onnx", "onnx_ir", "onnxruntime", "onnxscript", "PIL", "rich", "safetensors", "timm", "torch")


class Parser(argparse.ArgumentParser):
    """Raises UserError for a wrong argument instead of ending the process."""

    def error(self, message: str) -> NoReturn:
        """Raise `message` as a UserError, with where help is."""
        raise UserError(f"{message} (see `{self.prog} --help`)")


def _seed(text: str) -> int:
    if not re.fullmatch("[0-9]{1,10}", text) or int(text) >= 1 << 32:
        raise UserError(f"SEED='{text}': expected a whole number from 0 to {(1 << 32) - 1}")
    return int(text)


def _limit(text: str) -> int:
    if not re.fullmatch("[0-9]{1,15}", text):
        raise UserError(f"'{text}': expected a whole number of 0 or more")
    return int(text)


def _speedup(text: str) -> float:
    try:
        found = float(text)
    except ValueError:
        found = 0.0
    if not 0 < found < float("inf"):
        raise UserError(f"MIN_SPEEDUP='{text}': expected a number above 0, such as 1.5")
    return found


def _engine_options(engine: argparse.ArgumentParser) -> None:
    engine.add_argument("--model", default="dinov2_s", help="short name (see `list`) or any timm name")
    engine.add_argument(
        "--module", help="a network of your own instead: package.module:factory or path/to/file.py:factory"
    )
    engine.add_argument(
        "--input", type=input_size, help="size of the images: 384, 364x490 or 3x364x490 (default: the network's)"
    )
    engine.add_argument("--weights", default="auto", help="auto, pretrained, random, or a checkpoint file")
    engine.add_argument("--calib", help="folder of images, .npy or .npz; default: built-in sample, not for production")
    engine.add_argument("--eval", dest="evaluation", help="ImageFolder, .npy or .npz; default: held-out images")
    engine.add_argument("--calib-images", type=count, default=512, help="images to calibrate on (default 512)")
    engine.add_argument("--recipe", default="int8", help="name of a recipe or a .toml file")
    engine.add_argument("--target", default="auto", help="auto, tensorrt, tensorrt_rtx or onnxruntime (a CPU)")
    engine.add_argument("--sm", type=architectures, help="GPU architectures for tensorrt_rtx, such as 86,89,120")
    engine.add_argument(
        "--builder", default="", help="what TensorRT's builder is told: level=5,aux_streams=0,gpus=ampere+"
    )
    engine.add_argument(
        "--float", dest="floats", choices=("fp16", "fp32"), default="fp16",
        help="types beside the integers; fp32 for networks whose values FP16 cannot hold (default fp16)",
    )  # fmt: skip
    engine.add_argument("--batch", type=count, default=8, help="batch size the engine is tuned for (default 8)")
    engine.add_argument("--max-batch", type=count, default=32, help="largest batch size (default 32)")
    engine.add_argument(
        "--device", default="auto", help="where torch computes: auto, cpu, cuda or cuda:1 (default auto)"
    )
    engine.add_argument("--out", default="artifacts", help="root of the output folders (default artifacts)")
    engine.add_argument("--seed", type=_seed, default=0, help="decides the choice of images (default 0)")
    engine.add_argument(
        "--cache", choices=("on", "off"), default="on", help="off: calibrate anew though nothing changed (default on)"
    )
    engine.add_argument(
        "--from",
        dest="begin",
        metavar="STAGE",
        help="run anew from this stage (see `list`); before it, take kept states",
    )
    engine.add_argument("--until", metavar="STAGE", help="stop after this stage; nothing is written to OUT")
    engine.add_argument(
        "--max-extra-kernels", type=_limit, help="kernels that QwT branches may add (default: the recipe's)"
    )
    engine.add_argument(
        "--max-extra-bytes", type=_limit, help="bytes that QwT branches may add (default: the recipe's)"
    )
    engine.add_argument(
        "--max-drop",
        help="accuracy that may be lost: 1%% (top-1 results, boxes) or 30dB (least SQNR, PSNR); else exit code 1",
    )
    engine.add_argument(
        "--min-speedup", type=_speedup, help="least speed beside the float network, such as 1.5; else exit code 1"
    )
    engine.add_argument("--json", action="store_true", help="print the report as JSON instead of a table")


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m deploy", description="timm model -> verified INT8 TensorRT engine")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", parser_class=Parser)
    _engine_options(verbs.add_parser("engine", help="calibrate, export, build, prove, verify and measure one model"))
    verify = verbs.add_parser(
        "verify",
        help="check a finished package: files, the graph's outputs, the engine's where it runs; needs no torch",
    )
    add_package(verify)
    report = verbs.add_parser(
        "report", help="write a finished package as one page and as a model card, beside its folder"
    )
    add_package(report)
    add_serve_verbs(verbs)
    verbs.add_parser("doctor", help="what is installed, which backends build and run, what is missing")
    verbs.add_parser("list", help="models, recipes, methods, backends and stages")
    structure = verbs.add_parser(
        "structure", help="what a network consists of: layers, what stays in float and why, blocks, channel scales"
    )
    structure.add_argument("model", nargs="?", default="", help="short name (see `list`) or any timm name")
    structure.add_argument("--module", help="as for `engine`")
    structure.add_argument("--input", type=input_size, help="as for `engine`")
    structure.add_argument("--calib", help="of a network with other inputs than one image: as for `engine`")
    structure.add_argument(
        "--weights", default="random", help="as for `engine`; the structure needs none (default random)"
    )
    structure.add_argument("--json", action="store_true", help="print it as JSON")
    verbs.add_parser(
        "clean-cache", help="remove what is kept to be used again: states of stages, downloads, environments"
    )
    recipe = verbs.add_parser("recipe", help="print a recipe as a .toml file with every option, to change and to give")
    recipe.add_argument("recipe")
    explain = verbs.add_parser(
        "explain",
        help="where the time of an engine goes, beside FP16, and why INT8 is hardly faster; needs no torch or GPU",
    )
    add_package(explain)
    explain.add_argument(
        "--gpu", default="A10", help="the GPU to estimate for, as in the table it prints (default A10)"
    )
    explain.add_argument("--batch", type=count, default=8, help="images at a time (default 8)")
    return parser


def _engine(args: argparse.Namespace) -> int:
    require_address_space()
    if args.module and args.model != DEFAULTS["model"]:
        raise UserError(
            f"--model '{args.model}' beside --module '{args.module}': expected one of them (MODEL=, MODULE=)"
        )
    from deploy.acceptance import Limits, MaxDrop
    from deploy.engine.build import Profile
    from deploy.engine.builder import Builder
    from deploy.options import Options
    from deploy.pipeline import engine
    from deploy.report.terminal import print_report

    done = engine(
        Options(
            model=args.model,
            module=args.module or None,
            input_size=args.input,
            weights=args.weights,
            calib=str(expanded(args.calib, "CALIB")) if args.calib else None,
            evaluation=str(expanded(args.evaluation, "EVAL")) if args.evaluation else None,
            calib_images=args.calib_images,
            recipe=args.recipe,
            target=args.target,
            sms=args.sm,
            builder=Builder.from_text(args.builder),
            floats=args.floats,
            profile=Profile(args.batch, args.max_batch),
            out=str(expanded(args.out, "OUT")),
            device=args.device,
            seed=args.seed,
            limits=Limits(MaxDrop.from_text(args.max_drop) if args.max_drop else None, args.min_speedup),
            max_extra_kernels=args.max_extra_kernels,
            max_extra_bytes=args.max_extra_bytes,
            cache=args.cache == "on",
            begin=args.begin or None,
            until=args.until or None,
        )
    )
    if isinstance(done, str):
        print(done, file=sys.stderr if args.json else sys.stdout)
        return 0
    folder, report = done
    if args.json:
        print(json.dumps(report, indent=2))
    else:
        print_report(report, folder)
    failed = [check for check in report["acceptance"]["checks"] if not check["kept"]]
    for check in failed:
        print(f"failed: {check['limit']}: {check['measured']}; not to be served: '{folder}'", file=sys.stderr)
    return EXIT_FAILED if failed else 0


def _verify(args: argparse.Namespace) -> int:
    from deploy.execution import golden_faults
    from deploy.verify import broken_limits, verify_package

    folder = folder_from_options(args, args.folder)
    wrong, engine = verify_package(folder), ""
    if not wrong:
        wrong, engine = golden_faults(folder)
    for finding in wrong:
        print(f"{folder}: {finding}", file=sys.stderr)
    if not wrong:
        print(f"{folder}: files unchanged, golden outputs reproduced by the graph")
        print(f"engine {engine}")
    broken = broken_limits(folder)
    for limit in broken:
        print(f"{folder}: not to be served: {limit}", file=sys.stderr)
    return EXIT_FAILED if wrong or broken else 0


def _doctor(_args: argparse.Namespace) -> int:
    from deploy.doctor import examine

    findings = examine()
    print("\n".join(findings.lines))
    return 0 if findings.healthy else EXIT_FAILED


def _list(_args: argparse.Namespace) -> int:
    import pkgutil

    import calib.methods
    from calib.weights.published import PUBLISHED
    from calib.weights.zoo import ZOO
    from deploy.engine.backends import backends
    from deploy.pipeline import stage_names
    from deploy.recipe import recipe_names

    width = max(map(len, ZOO))
    print("models (any other timm name works too):")
    for spec in ZOO.values():
        pinned = PUBLISHED[spec.published] if spec.published else None
        origin = f", weights from {pinned.index}: {pinned.name}" if pinned else ""
        print(f"  {spec.name:<{width}}  {spec.tag}{origin}")
    methods = [item.name for item in pkgutil.iter_modules(calib.methods.__path__)]
    for title, names in (
        ("recipes", recipe_names()),
        ("methods", methods),
        ("backends", backends()),
    ):
        print(f"{title}: {', '.join(sorted(names))}")
    print("stages, in order (--from, --until); in brackets those that not every recipe has, rtn or another method:")
    for half, names in stage_names().items():
        print(f"  {half}: {', '.join(names)}")
    return 0


def _structure(args: argparse.Namespace) -> int:
    require_address_space()
    import torch

    from calib.network.fold import fold_affine
    from calib.quant_model import QuantModel
    from calib.weights.load import load_net
    from calib.weights.zoo import spec_of
    from deploy.named_inputs import inputs_told_by, two_samples
    from deploy.report.structure import structure_json, structure_lines

    if not args.module and not args.model:
        raise UserError("structure: expected the name of a model, or --module")
    spec = spec_of(args.model, args.module, args.input)
    calib = str(expanded(args.calib, "CALIB")) if args.calib else None
    loaded = load_net(spec, args.weights, inputs=inputs_told_by(calib))
    if calib is not None and loaded.inputs is not None:
        example = two_samples(calib, loaded.inputs)[:1]
    else:
        example = torch.randn(1, *loaded.data_config["input_size"], generator=torch.Generator().manual_seed(0))
    structure = fold_affine(QuantModel.of(spec.name, loaded.net), example).structure
    print(json.dumps(structure_json(structure), indent=2) if args.json else "\n".join(structure_lines(structure)))
    return 0


def _recipe(args: argparse.Namespace) -> int:
    from deploy.recipe import load_recipe

    print(load_recipe(args.recipe).to_toml(), end="")
    return 0


def _explain(args: argparse.Namespace) -> int:
    from deploy.explain.gpus import gpu_from_name
    from deploy.explain.kernel_list import read_lists
    from deploy.explain.page import print_page
    from deploy.package import engine_targets

    folder, gpu = folder_from_options(args, args.folder), gpu_from_name(args.gpu)
    lists = read_lists(folder)
    if not lists.told:
        raise UserError(
            f"the kernels of the engine in '{folder}' do not tell what they read and write: expected an engine of "
            f"TARGET=tensorrt or tensorrt_rtx; one of onnxruntime runs on a CPU and is measured by make engine"
        )
    print_page(folder.as_posix(), lists, gpu, args.batch, engine_targets(folder))
    return 0


def _clean_cache(_args: argparse.Namespace) -> int:
    from calib.store.user_cache import clear

    folder, size = clear()
    print(f"removed {size / 1e6:.0f} MB from '{folder}'")
    return 0


def _report(args: argparse.Namespace) -> int:
    folder = folder_from_options(args, args.folder)
    try:
        import huggingface_hub  # noqa: F401
        import jinja2  # noqa: F401
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise UserError(f"{error}: use `make report`, or an environment with requirements-base.txt") from error
    from deploy.pages.write import write_pages

    for path in write_pages(folder):
        print(f"written to {path}")
    return 0


VERBS = {
    "engine": _engine,
    "verify": _verify,
    "doctor": _doctor,
    "list": _list,
    "structure": _structure,
    "recipe": _recipe,
    "explain": _explain,
    "clean-cache": _clean_cache,
    "report": _report,
    **SERVE_VERBS,
}


def _terminated(_signal: int, _frame: object) -> NoReturn:
    raise KeyboardInterrupt


def _close_stdout() -> None:
    """Let what is still buffered go nowhere: Python would write it at the end, and fail again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def answered(command: Callable[[], int]) -> int:
    """The exit code of `command`: 2 for a user's mistake, 1 for a result that does not hold, each told in one line."""
    signal.signal(signal.SIGTERM, _terminated)  # cleans up like Ctrl-C
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a path that the terminal's encoding lacks
    try:
        code = command()
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # who reads has read enough, as `| head` does
        _close_stdout()
        return EXIT_FAILED
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        _close_stdout()
        print(
            f"error: {error.filename or 'the output'} cannot be written ({error.strerror}): free space", file=sys.stderr
        )
        return EXIT_USER_ERROR
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    except ContractError as error:
        print(f"failed: {error}; no package was written", file=sys.stderr)
        return EXIT_FAILED
    except KeyboardInterrupt:
        print("interrupted: no package was written; the states kept of finished stages stay", file=sys.stderr)
        return EXIT_INTERRUPTED
    except ModuleNotFoundError as error:
        if error.name not in NEEDED:
            raise
        print(
            f"error: the package {error.name} is not installed for {sys.executable}: run make setup and use "
            f".venv/bin/python -m deploy",
            file=sys.stderr,
        )
        return EXIT_USER_ERROR
    except Exception as error:
        said = " ".join(str(error).split())
        if not isinstance(error, MemoryError) and not any(text in said.lower() for text in OUT_OF_MEMORY):
            raise
        print(
            f"error: out of memory ({said[:150] or type(error).__name__}): free some, raise the limit, or give a smaller "
            f"INPUT= or BATCH=; nothing was written",
            file=sys.stderr,
        )
        return EXIT_USER_ERROR


def _run(argv: Sequence[str]) -> int:
    if argv and not argv[0].startswith("-") and argv[0] not in VERBS:
        raise UserError(f"unknown command '{argv[0]}': expected {', '.join(VERBS)}.{suggestion(argv[0], VERBS)}")
    parser = _parser()
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        command = " ".join(filter(None, (parser.prog, args.verb)))
        raise UserError(f"unrecognized arguments: {' '.join(unknown)} (see `{command} --help`)")
    if args.verb is None:
        parser.print_help()
        return EXIT_USER_ERROR
    return VERBS[args.verb](args)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0 done, 1 the result does not hold, 2 bad input, 130 interrupted."""
    given = list(sys.argv[1:] if argv is None else argv)
    return answered(lambda: _run(given))
