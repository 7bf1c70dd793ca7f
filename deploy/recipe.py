"""A recipe: which method with which options, read from a TOML file in `deploy/recipes/` or from anywhere."""

import dataclasses
import importlib
import pkgutil
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import calib.methods
from calib.attention import int8 as int8_attention
from calib.errors import UserError, nearest
from calib.precision import INT8_ENGINE, Precision
from calib.scales import calibrate, equalise
from compensation import qwt
from compensation.star import finetune
from deploy.named_toml import named_path, read_toml, stems

FOLDER = Path(__file__).parent / "recipes"


@dataclass(frozen=True)
class Recipe:
    """The resolved recipe: every option has its value."""

    name: str
    description: str
    precision: Precision
    equalise: equalise.Config | None  # None: channels keep their scales
    attention: int8_attention.Config | None  # None: attention in FP16
    calibrate: calibrate.Config
    method: str
    method_config: Any
    compensate: qwt.Config | None  # None: no branches
    finetune: finetune.Config | None  # None: branches stay as the closed form gives them

    def to_json(self) -> dict[str, Any]:
        """Plain values for the manifest."""
        return dataclasses.asdict(self)

    def for_engine(self) -> "Recipe":
        """This recipe. Raises UserError if it is for the simulator alone."""
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
        """A copy with these limits for branches, where given. Raises UserError if the recipe has no branches."""
        limits = {"max_extra_kernels": max_extra_kernels, "max_extra_bytes": max_extra_bytes}
        given: dict[str, Any] = {name: limit for name, limit in limits.items() if limit is not None}
        if given and self.compensate is None:
            raise UserError(
                f"recipe '{self.name}' adds no branches to limit: expected one with [compensate], as int8_qwt"
            )
        return dataclasses.replace(self, compensate=self.compensate and dataclasses.replace(self.compensate, **given))


def recipe_names() -> tuple[str, ...]:
    """Names of the recipes that come with the tool."""
    return stems(FOLDER)


def method_module(name: str) -> ModuleType:
    """The file of a method in `calib/methods/`. Raises UserError naming what exists."""
    known = [item.name for item in pkgutil.iter_modules(calib.methods.__path__)]
    if name not in known:
        raise UserError(f"unknown method '{name}': expected one of {', '.join(known)}.{nearest(name, known)}")
    return importlib.import_module(f"calib.methods.{name}")


def _config(kind: type, values: Any, where: str) -> Any:
    """`kind(**values)`, refusing keys that are not fields and values of another type."""
    if not isinstance(values, dict):
        raise UserError(f"{where}: expected a table of options, got {values!r}")
    fields = {field.name: field for field in dataclasses.fields(kind)}
    values = {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
    for key, value in values.items():
        if key not in fields:
            raise UserError(
                f"{where}: unknown option '{key}'; expected {', '.join(fields) or 'none'}.{nearest(key, fields)}"
            )
        allowed = fields[key].type
        if isinstance(allowed, type) and not isinstance(value, int | float if allowed is float else allowed):
            raise UserError(f"{where}: option '{key}' is {value!r}; expected {allowed.__name__}")
    try:
        return kind(**values)
    except ValueError as error:
        raise UserError(f"{where}: {error}") from error


def recipe_from_tables(name: str, content: dict[str, Any], where: str) -> Recipe:
    """The recipe that tables of options give; `where` they are from goes into the UserError for an unknown key."""
    known = ("description", "precision", "equalise", "attention", "calibrate", "method", "compensate", "finetune")
    for key in content:
        if key not in known:
            raise UserError(f"{where}: unknown key '{key}'; expected {', '.join(known)}.{nearest(key, known)}")

    def optional(key: str, kind: type) -> Any:
        return _config(kind, content[key], f"{where}, [{key}]") if key in content else None

    method = dict(content.get("method", {}))
    method_name = method.pop("name", "rtn")
    return Recipe(
        name=name,
        description=str(content.get("description", "")),
        precision=_config(Precision, content.get("precision", {}), f"{where}, [precision]"),
        equalise=optional("equalise", equalise.Config),
        attention=optional("attention", int8_attention.Config),
        calibrate=_config(calibrate.Config, content.get("calibrate", {}), f"{where}, [calibrate]"),
        method=method_name,
        method_config=_config(method_module(method_name).Config, method, f"{where}, [method]"),
        compensate=optional("compensate", qwt.Config),
        finetune=optional("finetune", finetune.Config),
    )


def recipe_from_toml(path: Path) -> Recipe:
    """Read one recipe file. Raises UserError for a syntax error or an unknown key, naming the file."""
    where = f"recipe '{path}'"
    return recipe_from_tables(path.stem, read_toml(path, where), where)


def load_recipe(name: str) -> Recipe:
    """A recipe by its name or by the path of a TOML file. Raises UserError with the nearest names."""
    return recipe_from_toml(named_path(name, FOLDER, "RECIPE"))
