"""The command line: parses, calls, and turns a user's mistake into one line and exit code 2."""

import argparse
import json
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from calib.errors import UserError, nearest
from deploy.errors import ContractError

EXIT_FAILED, EXIT_USER_ERROR, EXIT_INTERRUPTED = 1, 2, 130


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see `python -m deploy {self.prog.split()[-1]} --help`)")


def _sms(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part.strip().lower().removeprefix("sm")) for part in text.split(","))
    except ValueError:
        raise UserError(f"SM='{text}': expected GPU architectures such as 86,89,120") from None


def _count(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise UserError(f"'{text}': expected a whole number of 1 or more")
    return int(text)


def _limit(text: str) -> int:
    if not text.isdigit():
        raise UserError(f"'{text}': expected a whole number of 0 or more")
    return int(text)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="python -m deploy", description="timm model -> verified INT8 TensorRT engine")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", parser_class=_Parser)

    engine = verbs.add_parser("engine", help="calibrate, export, build, prove, verify and measure one model")
    engine.add_argument("--model", default="dinov2_s", help="short name (see `list`) or any timm name")
    engine.add_argument("--weights", default="auto", help="auto, pretrained, random, or a checkpoint file")
    engine.add_argument("--calib", help="folder of images, .npy or .npz; default: built-in sample, not for production")
    engine.add_argument("--eval", dest="evaluation", help="ImageFolder, .npy or .npz; default: held-out images")
    engine.add_argument("--calib-images", type=_count, default=512, help="images to calibrate on (default 512)")
    engine.add_argument("--recipe", default="int8", help="name of a recipe or a .toml file")
    engine.add_argument("--target", default="auto", help="auto, tensorrt or tensorrt_rtx")
    engine.add_argument("--sm", type=_sms, help="GPU architectures for tensorrt_rtx, such as 86,89,120")
    engine.add_argument("--batch", type=_count, default=8, help="batch size the engine is tuned for (default 8)")
    engine.add_argument("--max-batch", type=_count, default=32, help="largest batch size (default 32)")
    engine.add_argument("--out", default="artifacts", help="root of the output folders (default artifacts)")
    engine.add_argument("--seed", type=int, default=0, help="decides the choice of images (default 0)")
    engine.add_argument(
        "--cache", choices=("on", "off"), default="on", help="off: calibrate anew though nothing changed (default on)"
    )
    engine.add_argument(
        "--max-extra-kernels", type=_limit, help="kernels that QwT branches may add (default: the recipe's)"
    )
    engine.add_argument(
        "--max-extra-bytes", type=_limit, help="bytes that QwT branches may add (default: the recipe's)"
    )
    engine.add_argument("--json", action="store_true", help="print the report as JSON instead of a table")

    table = verbs.add_parser("table", help="the papers' tables: published numbers beside this tool's simulation")
    table.add_argument("--paper", default="qwt", help="name of a table (see `list`) or a .toml file")
    table.add_argument(
        "--imagenet", help="folder with val/ and train/ or calib/; default: fidelity on sample photographs"
    )
    table.add_argument("--calib", help="images to calibrate on instead: a folder, .npy or .npz")
    table.add_argument("--eval", dest="evaluation", help="images to judge on (default: some of --calib held out)")
    table.add_argument("--models", default="", help="names with commas between; default: the paper's, or two offline")
    table.add_argument("--calib-images", type=_count, help="images to calibrate on (default 64; of ImageNet 512)")
    table.add_argument(
        "--eval-images", type=_count, help="images to judge on (default 64; all of --eval or ImageNet's val/)"
    )
    table.add_argument(
        "--cache", choices=("on", "off"), default="on", help="off: measure finished rows anew (default on)"
    )

    verify = verbs.add_parser("verify", help="check a finished package: files and outputs; needs no torch")
    verify.add_argument("folder", type=Path)
    verbs.add_parser("doctor", help="what is installed, which backends build and run, what is missing")
    verbs.add_parser("list", help="models, recipes, methods, families, backends and tables")
    explain = verbs.add_parser("explain", help="print a recipe with every option resolved")
    explain.add_argument("recipe")
    return parser


def _engine(args: argparse.Namespace) -> int:
    from deploy.pipeline import Options, engine
    from deploy.report import print_report
    from deploy.serialize import Profile

    folder, report = engine(
        Options(
            model=args.model,
            weights=args.weights,
            calib=args.calib or None,
            evaluation=args.evaluation or None,
            calib_images=args.calib_images,
            recipe=args.recipe,
            target=args.target,
            sms=args.sm,
            profile=Profile(args.batch, args.max_batch),
            out=args.out,
            seed=args.seed,
            max_extra_kernels=args.max_extra_kernels,
            max_extra_bytes=args.max_extra_bytes,
            cache=args.cache == "on",
        )
    )
    if args.json:
        print(json.dumps(report, indent=2))
    else:
        print_report(report, folder)
    return 0


def _table(args: argparse.Namespace) -> int:
    from deploy.table import Options, print_table, table

    models = tuple(args.models.replace(",", " ").split())
    options = Options(
        paper=args.paper,
        imagenet=args.imagenet or None,
        calib=args.calib or None,
        evaluation=args.evaluation or None,
        models=models,
        calib_images=args.calib_images,
        eval_images=args.eval_images,
        cache=args.cache == "on",
    )
    try:
        path, result = table(options)
    except KeyboardInterrupt:
        print("interrupted: finished rows are kept, the same command goes on", file=sys.stderr)
        return EXIT_INTERRUPTED
    print_table(result, path)
    return 0


def _verify(args: argparse.Namespace) -> int:
    from deploy.verify import verify_package

    wrong = verify_package(args.folder)
    for finding in wrong:
        print(f"{args.folder}: {finding}", file=sys.stderr)
    if not wrong:
        print(f"{args.folder}: files unchanged, golden outputs reproduced")
    return EXIT_FAILED if wrong else 0


def _doctor(_args: argparse.Namespace) -> int:
    from deploy.doctor import examine

    findings = examine()
    print("\n".join(findings.lines))
    return 0 if findings.healthy else EXIT_FAILED


def _list(_args: argparse.Namespace) -> int:
    import pkgutil

    import calib.methods
    from calib.families import families
    from calib.zoo import ZOO
    from deploy.backends import backends
    from deploy.experiments import table_names
    from deploy.recipe import recipe_names

    width = max(map(len, ZOO))
    print("models (any other timm name works too if its family is listed):")
    for spec in ZOO.values():
        print(f"  {spec.name:<{width}}  {spec.tag}")
    methods = [item.name for item in pkgutil.iter_modules(calib.methods.__path__)]
    for title, names in (
        ("recipes", recipe_names()),
        ("methods", methods),
        ("families", families()),
        ("backends", backends()),
        ("tables", table_names()),
    ):
        print(f"{title}: {', '.join(sorted(names))}")
    return 0


def _explain(args: argparse.Namespace) -> int:
    from deploy.recipe import load_recipe

    print(json.dumps(load_recipe(args.recipe).to_json(), indent=2))
    return 0


VERBS = {"engine": _engine, "table": _table, "verify": _verify, "doctor": _doctor, "list": _list, "explain": _explain}


def _terminated(_signal: int, _frame: object) -> NoReturn:
    raise KeyboardInterrupt


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0 done, 1 the result does not hold, 2 bad input, 130 interrupted."""
    signal.signal(signal.SIGTERM, _terminated)  # cleans up like Ctrl-C
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        if argv and not argv[0].startswith("-") and argv[0] not in VERBS:
            raise UserError(f"unknown command '{argv[0]}': expected {', '.join(VERBS)}.{nearest(argv[0], VERBS)}")
        parser = _parser()
        args = parser.parse_args(argv)
        if args.verb is None:
            parser.print_help()
            return EXIT_USER_ERROR
        return VERBS[args.verb](args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    except ContractError as error:
        print(f"failed: {error}; nothing was written", file=sys.stderr)
        return EXIT_FAILED
    except KeyboardInterrupt:
        print("interrupted: nothing was written", file=sys.stderr)
        return EXIT_INTERRUPTED
