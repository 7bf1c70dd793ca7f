"""A recipe: which method with which options. It is read from a TOML file, in `deploy/recipes/` or anywhere else."""

import dataclasses
import importlib
import json
import math
import pkgutil
import re
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, UnionType
from typing import Any, get_args, get_origin

import calib.methods
from calib.attention import int8 as int8_attention
from calib.errors import UserError, suggestion
from calib.layerwise import float_layers, rounding_points
from calib.precision import INT8_ENGINE, Precision
from calib.scales import calibrate, equalise
from compensation import qwt
from compensation.star import finetune
from deploy.named_toml import named_path, read_toml, stems

FOLDER = Path(__file__).parent / "recipes"
# tables that name a stage
OPTIONAL = ("equalise", "attention", "keep_float", "int8_shortcuts", "int8_products", "compensate", "finetune")
NAME = r"[\w.-]*\w"  # "." and ".." would lead out of the folder for this recipe's packages


@dataclass(frozen=True)
class Recipe:
    """A resolved recipe, in which every option has a value."""

    name: str
    description: str
    precision: Precision
    equalise: equalise.Config | None  # None: no scale migration
    attention: int8_attention.Config | None  # None: attention in FP16
    calibrate: calibrate.Config
    method: str
    method_config: Any
    keep_float: float_layers.Config | None  # None: all layers that can be are quantized
    int8_shortcuts: rounding_points.Config | None  # None: what goes around a convolutional block stays in FP16
    int8_products: rounding_points.Config | None  # None: matrix products are written in FP16
    compensate: qwt.Config | None  # None: no branches
    finetune: finetune.Config | None  # None: branches keep the closed-form solution

    def to_json(self) -> dict[str, Any]:
        """The recipe as plain values, for the manifest."""
        return dataclasses.asdict(self)

    def to_toml(self) -> str:
        """The recipe as a .toml file that has every option; read again it is the same recipe."""
        tables: dict[str, Any] = {"precision": self.precision, "equalise": self.equalise, "attention": self.attention}
        tables |= {"calibrate": self.calibrate, "method": self.method_config}
        tables |= {key: getattr(self, key) for key in OPTIONAL if key not in tables}
        lines = [f"description = {json.dumps(self.description)}"]
        for title, options in tables.items():
            if options is not None:
                values = {"name": self.method} if title == "method" else {}
                values |= dataclasses.asdict(options)
                lines += ["", f"[{title}]"]
                # texts, numbers, truths and lists of them are written alike in JSON and TOML
                lines += [f"{key} = {json.dumps(value)}" for key, value in values.items() if value is not None]
        return "\n".join(lines) + "\n"

    def for_engine(self) -> "Recipe":
        """Return this recipe. Raises UserError if no engine can compute its precision, only the simulation."""
        if not self.precision.executable:
            given, wanted = (
                ", ".join(f"{name} = {value}" for name, value in dataclasses.asdict(each).items() if name != "weights")
                for each in (self.precision, INT8_ENGINE)
            )
            raise UserError(
                f"recipe '{self.name}' is simulated only: no INT8 kernel of TensorRT reads [precision] {given}; "
                f"expected {wanted}"
            )
        return self

    def limited(self, max_extra_kernels: int | None, max_extra_bytes: int | None) -> "Recipe":
        """A copy with those limits for branches that are not None. Raises UserError if the recipe has no branches."""
        limits = {"max_extra_kernels": max_extra_kernels, "max_extra_bytes": max_extra_bytes}
        given: dict[str, Any] = {name: limit for name, limit in limits.items() if limit is not None}
        if given and self.compensate is None:
            raise UserError(
                f"recipe '{self.name}' adds no branches to limit: expected one with [compensate], as int8_qwt"
            )
        return dataclasses.replace(self, compensate=self.compensate and dataclasses.replace(self.compensate, **given))


def recipe_names() -> tuple[str, ...]:
    """The names of the recipes that come with the tool."""
    return stems(FOLDER)


def method_module(name: str) -> ModuleType:
    """The module of a method in `calib/methods/`. Raises UserError with the names of those that exist."""
    known = [item.name for item in pkgutil.iter_modules(calib.methods.__path__)]
    if name not in known:
        raise UserError(f"unknown method '{name}': expected one of {', '.join(known)}.{suggestion(name, known)}")
    return importlib.import_module(f"calib.methods.{name}")


def _has_type(value: Any, expected: Any) -> bool:
    """Whether a value from a TOML file is of the type of a field: bool, int, float, str, or a tuple of one of these.

    A whole number will do for a float, and a list stands for a tuple. True and False are numbers in Python, but not in a
    recipe; NaN and infinity are refused, because no report or manifest can hold them.
    """
    if get_origin(expected) is tuple:
        item = get_args(expected)[0]  # of tuple[item, ...]
        return isinstance(value, list | tuple) and all(_has_type(each, item) for each in value)
    if isinstance(expected, UnionType):
        return any(_has_type(value, each) for each in get_args(expected))
    if expected in (int, float):
        allowed = (int, float) if expected is float else int
        return isinstance(value, allowed) and not isinstance(value, bool) and math.isfinite(value)
    return isinstance(value, expected)


def _type_name(expected: Any) -> str:
    if get_origin(expected) is tuple:
        return f"a list of {_type_name(get_args(expected)[0])}"
    return expected.__name__ if isinstance(expected, type) else str(expected)


def _table(values: Any, where: str) -> dict[str, Any]:
    if not isinstance(values, dict):
        raise UserError(f"{where}: expected a table of options, got {values!r}")
    return values


def _config(kind: type, values: Any, where: str) -> Any:
    """`kind(**values)`. Raises UserError for keys that are not fields, and for values of another type or range."""
    types = {field.name: field.type for field in dataclasses.fields(kind)}
    options = {}
    for key, value in _table(values, where).items():
        if key not in types:
            raise UserError(
                f"{where}: unknown option '{key}'; expected {', '.join(types) or 'none'}.{suggestion(key, types)}"
            )
        if not _has_type(value, types[key]):
            raise UserError(f"{where}: option '{key}' is {value!r}; expected {_type_name(types[key])}")
        options[key] = tuple(value) if isinstance(value, list) else value
    try:
        return kind(**options)
    except ValueError as error:
        raise UserError(f"{where}: {error}") from error


def recipe_from_tables(name: str, content: dict[str, Any], where: str) -> Recipe:
    """The recipe that tables of options describe.

    Raises UserError, which begins with `where` the tables come from, for an unknown key or a value of another type.
    """
    known = ("description", "precision", "calibrate", "method", *OPTIONAL)
    for key in content:
        if key not in known:
            raise UserError(f"{where}: unknown key '{key}'; expected {', '.join(known)}.{suggestion(key, known)}")

    def optional(key: str, kind: type) -> Any:
        return _config(kind, content[key], f"{where}, [{key}]") if key in content else None

    method = dict(_table(content.get("method", {}), f"{where}, [method]"))
    method_name = method.pop("name", "rtn")
    description = content.get("description", "")
    for key, value in (("[method] name", method_name), ("description", description)):
        if not isinstance(value, str):
            raise UserError(f"{where}: option '{key}' is {value!r}; expected str")
    return Recipe(
        name=name,
        description=description,
        precision=_config(Precision, content.get("precision", {}), f"{where}, [precision]"),
        equalise=optional("equalise", equalise.Config),
        attention=optional("attention", int8_attention.Config),
        calibrate=_config(calibrate.Config, content.get("calibrate", {}), f"{where}, [calibrate]"),
        method=method_name,
        method_config=_config(method_module(method_name).Config, method, f"{where}, [method]"),
        keep_float=optional("keep_float", float_layers.Config),
        int8_shortcuts=optional("int8_shortcuts", rounding_points.Config),
        int8_products=optional("int8_products", rounding_points.Config),
        compensate=optional("compensate", qwt.Config),
        finetune=optional("finetune", finetune.Config),
    )


def recipe_from_toml(path: Path) -> Recipe:
    """Read one recipe file. Its name without `.toml` is the name of the recipe and of the folder that a package gets.

    Raises UserError, naming the file, for a syntax error, an unknown key, a value of another type, or a name that is no
    folder name.
    """
    where = f"recipe '{path}'"
    if not re.fullmatch(NAME, path.stem):
        raise UserError(
            f"{where} is named '{path.stem}': expected letters, digits, '_', '-' and '.', no '.' at the end"
        )
    return recipe_from_tables(path.stem, read_toml(path, where), where)


def load_recipe(name: str) -> Recipe:
    """The recipe with this name, or in the TOML file with this path. Raises UserError with similar names."""
    return recipe_from_toml(named_path(name, FOLDER, "RECIPE"))
