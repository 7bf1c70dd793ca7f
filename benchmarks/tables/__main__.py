"""`python -m benchmarks.tables`: the tables of papers, their published numbers beside this tool's simulation."""

import sys
from collections.abc import Sequence

from benchmarks.tables.experiments import table_names
from deploy.arguments import count
from deploy.cli import EXIT_INTERRUPTED, Parser, answered


def _parser() -> Parser:
    parser = Parser(prog="python -m benchmarks.tables", description="a paper's table beside this tool's simulation")
    parser.add_argument("--paper", default="qwt", help=f"{', '.join(table_names())} or a .toml file")
    parser.add_argument(
        "--imagenet", help="folder with val/ and train/ or calib/; default: fidelity on the built-in sample images"
    )
    parser.add_argument("--calib", help="images to calibrate on instead: a folder, .npy or .npz")
    parser.add_argument("--eval", dest="evaluation", help="images to judge on (default: some of --calib held out)")
    parser.add_argument("--models", default="", help="names with commas between; default: the paper's, or two offline")
    parser.add_argument("--calib-images", type=count, help="images to calibrate on (default 64; of ImageNet 512)")
    parser.add_argument(
        "--eval-images", type=count, help="images to judge on (default 64; all of --eval or ImageNet's val/)"
    )
    parser.add_argument(
        "--cache", choices=("on", "off"), default="on", help="off: measure finished rows anew (default on)"
    )
    return parser


def _run(argv: Sequence[str]) -> int:
    args = _parser().parse_args(argv)
    from benchmarks.tables.table import TableOptions, print_table, table

    options = TableOptions(
        paper=args.paper,
        imagenet=args.imagenet or None,
        calib=args.calib or None,
        evaluation=args.evaluation or None,
        models=tuple(args.models.replace(",", " ").split()),
        calib_images=args.calib_images,
        eval_images=args.eval_images,
        cache=args.cache == "on",
    )
    try:
        path, result = table(options)
    except KeyboardInterrupt:
        print("interrupted: finished rows are stored, the same command continues", file=sys.stderr)
        return EXIT_INTERRUPTED
    print_table(result, path)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print one table; returns the exit codes of `python -m deploy`."""
    given = list(sys.argv[1:] if argv is None else argv)
    return answered(lambda: _run(given))


if __name__ == "__main__":
    sys.exit(main())
