"""The tables of papers as data, one file per paper in `benchmarks/tables/`: published numbers, and the rows we measure.

A line of [ours] is a recipe without its bits, and the bits it runs at: "4/6" quantizes weights to 4 bits and inputs to 6
bits; inputs of 32 bits are not quantized.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from calib.errors import UserError, suggestion
from deploy.named_toml import named_path, read_toml, stems
from deploy.recipe import Recipe, recipe_from_tables

FOLDER = Path(__file__).parent
KEYS = ("title", "source", "notes", "first_last", "models", "float", "published", "ours", "not_run")
KEYS_NOT_RUN = ("network", "where", "figures", "why", "rows")
MISSING = "-"  # stands for a number that the paper does not give
FLOAT_BITS = "32/32"


@dataclass(frozen=True)
class Published:
    """A row of the paper: model -> top-1 accuracy on ImageNet in %, for the models that the paper gives."""

    bits: str
    method: str
    top1: dict[str, float]


@dataclass(frozen=True)
class NotRun:
    """What the paper gives for a network that `make table` does not run, and `why` it does not.

    `where`: its table in the paper. `figures`: what the numbers of a row are. `rows`: bits, method, one number per figure,
    None for one that the paper does not give.
    """

    network: str
    where: str
    figures: tuple[str, ...]
    why: str
    rows: tuple[tuple[str, str, tuple[float | None, ...]], ...]


@dataclass(frozen=True)
class Experiment:
    """A row that we measure."""

    bits: str
    method: str
    recipe: Recipe


@dataclass(frozen=True)
class Table:
    """The table of one paper. `published` begins with the float networks; `experiments` are ordered by bits."""

    name: str
    title: str
    source: str
    notes: tuple[str, ...]
    models: tuple[str, ...]
    published: tuple[Published, ...]
    experiments: tuple[Experiment, ...]
    not_run: tuple[NotRun, ...] = ()


def table_names() -> tuple[str, ...]:
    """The names of the papers that come with the tool."""
    return stems(FOLDER)


def _precision(bits: str, first_last: int, where: str) -> dict[str, int]:
    weights, _, inputs = bits.partition("/")
    if not (weights.isdigit() and inputs.isdigit()):
        raise UserError(f"{where}: bits '{bits}' are not of the form weights/inputs, as 4/6")
    return {"weights": int(weights), "inputs": int(inputs), "first_last": first_last}


def _published(bits: str, method: str, numbers: Sequence[Any], models: Sequence[str], where: str) -> Published:
    if len(numbers) != len(models):
        raise UserError(
            f"{where}: '{method}' at {bits} has {len(numbers)} numbers; expected {len(models)}, one per model"
        )
    given = {model: number for model, number in zip(models, numbers, strict=True) if number != MISSING}
    if wrong := [number for number in given.values() if not isinstance(number, int | float) or not 0 <= number <= 100]:
        raise UserError(f"{where}: '{method}' at {bits} has {wrong[0]!r}; expected % or '{MISSING}'")
    return Published(bits, method, given)


def _not_run(given: Any, where: str) -> NotRun:
    if not isinstance(given, dict) or {*given} != {*KEYS_NOT_RUN}:
        raise UserError(f"{where}: a [[not_run]] has {', '.join(given)}; expected {', '.join(KEYS_NOT_RUN)}")
    figures, rows = given["figures"], []
    for bits, method, *numbers in given["rows"]:
        if len(numbers) != len(figures) or not all(
            isinstance(each, int | float) or each == MISSING for each in numbers
        ):
            raise UserError(
                f"{where}: {given['network']}, '{method}' at {bits} has {numbers}; expected {len(figures)} numbers or "
                f"'{MISSING}': {', '.join(figures)}"
            )
        rows.append((bits, method, tuple(None if each == MISSING else each for each in numbers)))
    return NotRun(given["network"], given["where"], tuple(figures), given["why"], tuple(rows))


def _experiments(lines: dict[str, Any], first_last: int, where: str) -> tuple[Experiment, ...]:
    """All rows of the first bits, then of the next: recipes of the same bits share their first stages."""
    found = []
    for method, line in lines.items():
        if not isinstance(line, dict) or not isinstance(line.get("bits"), list):
            raise UserError(
                f"{where}, '{method}': expected the tables of a recipe and bits = [\"4/4\", ...], got {line!r}"
            )
        options = {key: value for key, value in line.items() if key != "bits"}
        for bits in line["bits"]:
            precision = {**_precision(bits, first_last, where), **options.get("precision", {})}
            recipe = recipe_from_tables(method, {**options, "precision": precision}, f"{where}, '{method}'")
            found.append(Experiment(bits, method, recipe))
    order = list(dict.fromkeys(each.bits for each in found))
    return tuple(sorted(found, key=lambda each: order.index(each.bits)))


def table_from_toml(path: Path) -> Table:
    """Read one file. Raises UserError, naming the file, for a syntax error, an unknown key or a wrong number of figures."""
    where = f"table '{path}'"
    content = read_toml(path, where)
    for key in content:
        if key not in KEYS:
            raise UserError(f"{where}: unknown key '{key}'; expected {', '.join(KEYS)}.{suggestion(key, KEYS)}")
    if missing := [key for key in ("title", "models", "float", "ours") if key not in content]:
        raise UserError(f"{where} has no '{missing[0]}'; expected {', '.join(KEYS)}")
    models = content["models"]
    rows = [_published(FLOAT_BITS, "float", content["float"], models, where)]
    for bits, methods in content.get("published", {}).items():
        rows += [_published(bits, method, numbers, models, where) for method, numbers in methods.items()]
    return Table(
        name=path.stem,
        title=content["title"],
        source=content.get("source", ""),
        notes=tuple(content.get("notes", ())),
        models=tuple(models),
        published=tuple(rows),
        experiments=_experiments(content["ours"], content.get("first_last", 8), where),
        not_run=tuple(_not_run(each, where) for each in content.get("not_run", ())),
    )


def load_table(name: str) -> Table:
    """The table of the paper with this name, or in the TOML file with this path. Raises UserError with similar names."""
    return table_from_toml(named_path(name, FOLDER, "PAPER"))
