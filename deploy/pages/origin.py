"""Where a package comes from: environment, settings, files, and the command that makes it again."""

import json

from calib.errors import UserError
from deploy.package import MANIFEST
from deploy.pages.contents import Contents
from deploy.pages.parts import Line, Row, Table
from deploy.pages.values import Values, clipped


def environment_rows(contents: Contents) -> tuple[Row, ...]:
    """Machine, time, memory and versions."""
    report, host = contents.report, contents.manifest.part("host")
    rows: list[Row] = [
        ("operating system", (host.text("os"),)),
        ("processor", (host.text("processor"), ", ", host.figure("cores"), " cores")),
        ("GPU", (f"{host.text('gpu')}, driver {host.text('driver')}" if host.holds("gpu") else "none",)),
        ("torch ran on", (report.text("device"),)),
        ("time", (report.figure("seconds", "total", spec=".0f", unit=" s"),)),
        ("time by stage", seconds_line(report)),
        ("peak memory", (report.figure("peak_rss_mb", spec=".0f", unit=" MB"),)),
        ("Python", (host.text("python"),)),
    ]
    packages = host.part("packages")
    known = [name for name in packages.names() if packages.holds(name)]
    return (*rows, ("packages", (", ".join(f"{clipped(name)} {packages.text(name)}" for name in known),)))


def seconds_line(report: Values) -> Line:
    """How long every stage took."""
    seconds = report.part("seconds")
    names = [name for name in seconds.names() if name != "total"]
    parts = [
        (f"{', ' if place else ''}{clipped(name)} ", seconds.figure(name, spec=".1f", unit=" s"))
        for place, name in enumerate(names)
    ]
    return tuple(part for pair in parts for part in pair)


def identity_rows(contents: Contents) -> tuple[Row, ...]:
    """What decides the package, by sha256."""
    manifest = contents.manifest
    weights = manifest.text("weights", "sha256") if manifest.holds("weights", "sha256") else "not known"
    images = ((f"{role} images", contents.report.text(role, "sha256")) for role in ("calibration", "evaluation"))
    rows = (("weights", weights), *images, (f"{MANIFEST} of this package", contents.id))
    return tuple((name, (value,)) for name, value in rows)


def files_table(contents: Contents) -> Table:
    """The files that the manifest records."""
    rows = [
        ((name,), (each.figure("bytes", spec=",.0f"),), (each.text("sha256"),))
        for name, each in contents.manifest.parts("files")
    ]
    return Table(("file", "bytes", "sha256"), tuple(rows))


def _shape(tensor: Values, which: str) -> Line:
    axes = [tensor.figure(which, axis, spec=".0f") for axis in range(tensor.count(which))]
    return tuple(part for axis in axes for part in (" x ", axis))[1:]


def interface_table(contents: Contents) -> Table:
    """Inputs and outputs of the engine, with the shapes of the least, the usual and the largest batch."""
    rows = []
    for kind in ("inputs", "outputs"):
        for _, tensor in contents.manifest.parts("io", kind):
            shapes = (_shape(tensor, which) for which in ("min", "opt", "max"))
            rows.append(((kind.removesuffix("s"),), (tensor.text("name"),), (tensor.text("dtype"),), *shapes))
    return Table(("", "name", "type", "least", "usual", "largest"), tuple(rows))


def settings_rows(contents: Contents) -> tuple[Row, ...]:
    """Recipe, preprocessing and settings of the engine, as JSON."""
    manifest = contents.manifest
    recipe = manifest.part("recipe")
    parts = {f"recipe: {name}": recipe.content[name] for name in recipe.names() if recipe.holds(name)}
    if manifest.holds("preprocessing"):  # named inputs have none
        parts["preprocessing"] = manifest.part("preprocessing").content
    parts["engine"] = manifest.part("engine", "settings").content
    return tuple((clipped(name), (clipped(json.dumps(value)),)) for name, value in parts.items())


def usual_batch(manifest: Values) -> int:
    """The batch size that the engine is tuned for. Raises UserError if it is less than 1."""
    batch = int(manifest.number("io", "inputs", 0, "opt", 0))
    if batch < 1:
        raise UserError(f"'{manifest.file}' has a usual batch of {batch}: expected 1 or more; build the package again")
    return batch


def command(report: Values) -> str | None:
    """The commands that make the package again; None in a report of an older version."""
    if not report.holds("command"):
        return None
    again = [report.text("rebuilt", "command")] if report.holds("rebuilt") else []
    return "\n".join([report.text("command"), *again])
