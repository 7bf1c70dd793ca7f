"""`python -m benchmarks.language`: the papers' rows on language models, in the simulator.

    python -m benchmarks.language /models/opt-1.3b --ids ids.npy --out opt.json
    python -m benchmarks.language small_opt --ids ids.npy --rows smoothquant_8,smoothquant_8_adaq

MODEL is a folder of an OPT or a LLaMA that from_pretrained of transformers reads; `small_opt` and `small_llama` have random
weights, of which no figure says anything. `ids.npy`: token ids of texts, int64 (N, T); the last fifth of them judges, the
others calibrate. benchmarks/language/rows.py says what each row is, and how it differs from the paper's.
"""

import hashlib
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TextIO

from calib.errors import UserError
from deploy.cli import Parser, answered

RANDOM = "RANDOM WEIGHTS: these figures say nothing of a language model"


def _parser() -> Parser:
    parser = Parser(prog="python -m benchmarks.language", description="the papers' rows on language models, simulated")
    parser.add_argument("model", help="a folder of an OPT or a LLaMA, or small_opt or small_llama with random weights")
    parser.add_argument("--ids", type=Path, required=True, help="a .npy with token ids of texts, int64 (N, T)")
    parser.add_argument(
        "--rows", default="", help="names with commas between (default: all; benchmarks/language/rows.py)"
    )
    parser.add_argument("--out", type=Path, help="a .json file for the figures (default: the table alone)")
    parser.add_argument(
        "--device", default="auto", help="where torch computes: auto, cpu, cuda or cuda:1 (default auto)"
    )
    return parser


def print_table(measured: Sequence[dict[str, Any]], random: bool, stream: TextIO | None = None) -> None:
    """Print one line per row on `stream` (stdout by default), and what its figures are."""
    from rich.console import Console
    from rich.table import Table

    console = Console(file=stream, highlight=False, width=140)
    shown = Table()
    for heading in ("row", "perplexity", "loss more than float", "next token as float", "SQNR", "last token right"):
        shown.add_column(heading, justify="left" if heading == "row" else "right", no_wrap=True)
    for one in measured:
        found = one["figures"]
        beside = (
            f"{found['loss_more']:+.4f} ± {found['loss_error']:.4f}",
            f"{found['agreement']:.1%}",
            f"{found['sqnr_db']:.1f} dB",
        )
        beside = ("", "", "") if one["recipe"] is None else beside
        shown.add_row(one["row"], f"{found['perplexity']:.3f}", *beside, f"{found['last_token']:.1%}")
    console.print(shown)
    texts = measured[0]["figures"]["texts"]
    console.print(f"of {texts} texts that calibrated nothing; losses in nats per token, ± standard error over texts")
    for one in measured:
        notes = one["stages"][-1]["notes"] if one["stages"] else ()
        for note in notes[:1]:  # whether what the last stage offered stays
            console.print(f"{one['row']}: {note}", markup=False, soft_wrap=True)
    if random:
        console.print(RANDOM)


def _run(argv: Sequence[str]) -> int:
    args = _parser().parse_args(argv)
    from benchmarks.language.networks import load
    from benchmarks.language.rows import Bench, chosen_rows
    from benchmarks.language.texts import read_texts
    from calib.device import chosen_device
    from deploy import host
    from deploy.package import write_json
    from deploy.report.evidence import tool_commit

    names, device, texts = chosen_rows(args.rows), chosen_device(args.device), read_texts(args.ids)
    if args.out is not None and not args.out.parent.is_dir():
        raise UserError(f"--out '{args.out}': expected a file in a folder that exists")
    loaded = load(args.model, texts.tokens)
    texts.require_known(loaded.vocabulary)
    bench = Bench(loaded, texts, device)
    measured = []
    for name in names:
        measured.append(bench.measure(name))
        print(f"{name}: perplexity {measured[-1]['figures']['perplexity']:.3f}", file=sys.stderr, flush=True)
    print_table(measured, loaded.random)
    if args.out is not None:
        about = {
            "ids": {"shape": list(texts.ids.shape), "sha256": hashlib.sha256(texts.ids.tobytes()).hexdigest()},
            "weights": loaded.about(),
        }
        write_json(
            args.out,
            {
                **about, "rows": measured, "machine": host.describe(), "device": device.type, "commit": tool_commit(),
                "command": " ".join(["python -m benchmarks.language", *argv]),
                "date": datetime.now(UTC).isoformat(timespec="seconds"),
            },
        )  # fmt: skip
        print(f"written to {args.out}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print the rows; returns the exit codes of `python -m deploy`."""
    given = list(sys.argv[1:] if argv is None else argv)
    return answered(lambda: _run(given))


if __name__ == "__main__":
    sys.exit(main())
