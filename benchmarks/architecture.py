"""Draws which folder imports which: `python -m benchmarks.architecture` writes docs/architecture.svg.

The picture is made from the imports in the source. The packages stand on each other, and inside a package a box stands one
floor above the highest box that it imports, so every arrow runs downwards. An import from a lower package into a higher one,
or a circle of imports, ends with exit code 1 and the names of the files.

An arrow inside a package is left out of the drawing where other arrows lead to the same box; its imports count all the same.
"""

import ast
import html
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

ROOT = Path(__file__).parents[1]
PICTURE = ROOT / "docs/architecture.svg"
PACKAGES = ("calib", "compensation", "deploy", "benchmarks")  # from the lowest to the highest
COLOURS = {"calib": "#dbe9f6", "compensation": "#e3f2dc", "deploy": "#fdebd3", "benchmarks": "#ece2f4"}

Edges = Mapping[tuple[str, str], int]  # (who imports, what is imported) -> number of import statements


class UpwardsError(ValueError):
    """Imports that no order of floors allows; the text names them."""


def _is_typing(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING"


def _statements(node: ast.AST) -> Iterator[ast.Import | ast.ImportFrom]:
    """Yield the imports in `node`, those inside functions too, but none that only a type checker follows."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield child
        elif not _is_typing(child):
            yield from _statements(child)


def _file(root: Path, module: str) -> Path | None:
    path = root / module.replace(".", "/")
    return next((one for one in (path.with_suffix(".py"), path / "__init__.py") if one.exists()), None)


def imported_files(path: Path, root: Path) -> Iterator[Path]:
    """Yield the files of `root` that the file at `path` imports, one for each name where that is a module."""
    for node in _statements(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        else:
            inner = [(f"{node.module}.{alias.name}", node.module or "") for alias in node.names]
            modules = list(dict.fromkeys(name if _file(root, name) else outer for name, outer in inner))
        for module in modules:
            if module.split(".")[0] in PACKAGES and (found := _file(root, module)):
                yield found


def box_of(path: Path, root: Path) -> str:
    """Return the box of a file: the folder in its package, or the file itself where it lies in no folder of it."""
    return "/".join(path.relative_to(root).parts[:2])


def folder_imports(root: Path) -> tuple[list[str], dict[tuple[str, str], int]]:
    """Return (all boxes, the number of imports from one box into another)."""
    boxes: set[str] = set()
    edges: Counter[tuple[str, str]] = Counter()
    for package in PACKAGES:
        for path in sorted((root / package).rglob("*.py")):
            own = box_of(path, root)
            if path.stat().st_size:
                boxes.add(own)
            others = (box_of(file, root) for file in imported_files(path, root))
            edges.update((own, other) for other in others if other != own)
    boxes |= {box for edge in edges for box in edge}
    return sorted(boxes), dict(sorted(edges.items()))


def _package(box: str) -> str:
    return box.split("/")[0]


def floors(boxes: Sequence[str], edges: Edges) -> dict[str, int]:
    """Return the floor of every box in its package: the longest chain of imports under it there.

    Raises UpwardsError for an import into a higher package, or boxes that import each other in a circle.
    """
    for (source, target), count in edges.items():
        if PACKAGES.index(_package(source)) < PACKAGES.index(_package(target)):
            raise UpwardsError(f"{source} imports {target} ({count} times), which stands above it")
    below = {box: {t for s, t in edges if s == box and _package(t) == _package(box)} for box in boxes}
    found: dict[str, int] = {}
    while left := [box for box in boxes if box not in found]:
        ready = [box for box in left if below[box] <= found.keys()]
        if not ready:
            raise UpwardsError(f"imports run in a circle among {', '.join(left)}")
        found |= {box: max((found[other] + 1 for other in below[box]), default=0) for box in ready}
    return found


@dataclass
class Node:
    """A box of the drawing, or the place where an arrow passes a floor (no `lines`). `x`: its middle, in pixels."""

    lines: tuple[str, ...]
    floor: int
    width: float
    x: float = 0.0
    below: list["Node"] = field(default_factory=list)
    above: list["Node"] = field(default_factory=list)


@dataclass
class Arrow:
    """`path`: the nodes it touches from its source downwards. `count`: imports."""

    path: list[Node]
    count: int


CHARACTER, LINE, BOX, GAP, SPACE, PASS, PORT = 7.4, 16, 58, 62, 22, 22, 30  # pixels
BADGE, HEAD = 24, 16  # below a box its arrows run straight down this far, and above the box they point to
LANE, TITLE, EDGE = 40, 34, 24


def _lines(names: Sequence[str]) -> tuple[str, ...]:
    """Return at most three lines of a box; the names of files stand in columns."""
    per_line = -(-len(names) // 3)
    return tuple(", ".join(names[start : start + per_line]) for start in range(0, len(names), per_line))


def _merged(
    package: str, boxes: Sequence[str], floor_of: Mapping[str, int], edges: Edges
) -> tuple[dict[str, str], Edges]:
    """Return (the name of the drawn box of every box, the arrows between those): the files of one floor share a box."""
    files: dict[int, list[str]] = {}
    for box in boxes:
        if box.endswith(".py"):
            files.setdefault(floor_of[box], []).append(box.removeprefix(f"{package}/").removesuffix(".py"))
    drawn = {
        box: "\n".join(_lines(files[floor_of[box]])) if box.endswith(".py") else f"{box.removeprefix(f'{package}/')}/"
        for box in boxes
    }
    arrows: Counter[tuple[str, str]] = Counter()
    for (source, target), count in edges.items():
        if source in drawn and target in drawn:
            arrows[drawn[source], drawn[target]] += count
    return drawn, arrows


def _without_shortcuts(arrows: Edges) -> Edges:
    """Return the arrows whose target is reached on no longer way."""
    below: dict[str, set[str]] = {}
    for source, target in arrows:
        below.setdefault(source, set()).add(target)

    def reached(box: str) -> set[str]:
        return {box}.union(*(reached(other) for other in below.get(box, ())))

    return {
        (source, target): count
        for (source, target), count in arrows.items()
        if not any(target in reached(other) for other in below[source] - {target})
    }


def _spread(row: Sequence[Node], wanted: Sequence[float]) -> None:
    """Give the nodes of a floor, in order, places as near to those `wanted` as their widths allow."""
    apart = [(one.width + other.width) / 2 + SPACE for one, other in pairwise(row)]
    right = list(wanted)
    for index, least in enumerate(apart):
        right[index + 1] = max(right[index + 1], right[index] + least)
    left = list(wanted)
    for index, least in reversed(list(enumerate(apart))):
        left[index] = min(left[index], left[index + 1] - least)
    for node, one, other in zip(row, left, right, strict=True):
        node.x = (one + other) / 2


def _mean(nodes: Sequence[Node], default: float) -> float:
    return sum(node.x for node in nodes) / len(nodes) if nodes else default


def _arrange(rows: Sequence[list[Node]]) -> None:
    """Order the nodes of every floor so that arrows cross little, and place them."""
    for row in rows:
        _spread(row, [0.0] * len(row))
    for sweep in range(24):
        down = sweep % 2 == 0
        for row in reversed(rows) if down else rows:
            wanted = {id(node): _mean(node.above if down else node.below, node.x) for node in row}
            row.sort(key=lambda node: wanted[id(node)])
            _spread(row, [wanted[id(node)] for node in row])
    for sweep in range(12):
        for row in reversed(rows) if sweep % 2 else rows:
            _spread(row, [_mean([*node.above, *node.below], node.x) for node in row])


@dataclass
class Storey:
    """A package as drawn: its floors from the lowest to the highest, its arrows, its size in pixels."""

    package: str
    rows: list[list[Node]]
    arrows: list[Arrow]
    width: float
    height: float


def _storey(package: str, boxes: Sequence[str], floor_of: Mapping[str, int], edges: Edges) -> Storey:
    drawn, arrows = _merged(package, boxes, floor_of, edges)
    shown = _without_shortcuts(arrows)
    floor_by_name = {name: floor_of[box] for box, name in drawn.items()}
    out, into = Counter(source for source, _ in shown), Counter(target for _, target in shown)
    nodes = {
        name: Node(
            lines := tuple(name.split("\n")),
            floor,
            max(max(map(len, lines)) * CHARACTER + 20, PORT * max(out[name], into[name]), 70),
        )
        for name, floor in sorted(floor_by_name.items())
    }
    rows: list[list[Node]] = [[] for _ in range(max(floor_by_name.values()) + 1)]
    for node in nodes.values():
        rows[node.floor].append(node)
    drawn_arrows = []
    for (source, target), count in sorted(shown.items()):
        path = [nodes[source]]
        for floor in range(nodes[source].floor - 1, nodes[target].floor, -1):
            path.append(Node((), floor, PASS))
            rows[floor].append(path[-1])
        path.append(nodes[target])
        for upper, lower in pairwise(path):
            upper.below.append(lower)
            lower.above.append(upper)
        drawn_arrows.append(Arrow(path, count))
    _arrange(rows)
    least = min(node.x - node.width / 2 for row in rows for node in row)
    for row in rows:
        for node in row:
            node.x += EDGE - least
    width = max(node.x + node.width / 2 for row in rows for node in row) + EDGE
    height = TITLE + len(rows) * BOX + (len(rows) - 1) * GAP + EDGE
    return Storey(package, rows, drawn_arrows, width, height)


def _port(node: Node, others: Sequence[Node], other: Node) -> float:
    """Return where on `node` the arrow to or from `other`, one of `others`, starts or ends."""
    if not node.lines:
        return node.x
    order = sorted(others, key=lambda each: each.x)
    place = next(index for index, each in enumerate(order) if each is other)
    return node.x + (place - (len(order) - 1) / 2) * PORT


def _text(x: float, y: float, text: str, size: int = 12, weight: str = "normal", anchor: str = "middle") -> str:
    return (
        f'<text x="{x:.0f}" y="{y:.0f}" font-size="{size}" font-weight="{weight}" text-anchor="{anchor}">'
        f"{html.escape(text)}</text>"
    )


def _badge(x: float, y: float, count: int) -> str:
    pill = f'<rect x="{x - 12:.0f}" y="{y - 8:.0f}" width="24" height="16" rx="8" fill="white"/>'
    return pill + _text(x, y + 4, str(count), 11)


def _storey_svg(storey: Storey, top: float, width: float) -> Iterator[str]:
    """Yield the elements of a package whose upper edge is at `top`."""

    def y(floor: int) -> float:
        return top + TITLE + (len(storey.rows) - 1 - floor) * (BOX + GAP)

    yield (
        f'<rect x="10" y="{top:.0f}" width="{width:.0f}" height="{storey.height:.0f}" rx="10" '
        f'fill="{COLOURS[storey.package]}"/>'
    )
    yield _text(22, top + 23, f"{storey.package}/", 16, "bold", "start")
    shift = 10 + (width - storey.width) / 2
    for arrow in storey.arrows:
        points: list[tuple[float, float]] = []
        for upper, lower in pairwise(arrow.path):
            start, end = _port(upper, upper.below, lower) + shift, _port(lower, lower.above, upper) + shift
            below, above = y(upper.floor) + BOX, y(lower.floor)
            points += [(start, below), (start, below + BADGE), (end, above - HEAD), (end, above)]
        line = " ".join(f"{px:.0f},{py:.0f}" for px, py in points)
        yield f'<polyline points="{line}" fill="none" stroke="#666" marker-end="url(#head)"/>'
        yield _badge(points[0][0], points[0][1] + 12, arrow.count)
    for row in storey.rows:
        for node in (each for each in row if each.lines):
            left, up = node.x - node.width / 2 + shift, y(node.floor)
            yield (
                f'<rect x="{left:.0f}" y="{up:.0f}" width="{node.width:.0f}" height="{BOX}" rx="5" fill="white" '
                f'stroke="#444"/>'
            )
            first = up + BOX / 2 + 4 - (len(node.lines) - 1) * LINE / 2
            weight = "bold" if node.lines[0].endswith("/") else "normal"
            for index, line in enumerate(node.lines):
                yield _text(node.x + shift, first + index * LINE, line, weight=weight)


def picture(root: Path = ROOT) -> str:
    """Return the SVG of the packages in `root`. Raises UpwardsError where an arrow would run upwards or in a circle."""
    boxes, edges = folder_imports(root)
    floor_of = floors(boxes, edges)
    storeys = []
    for package in reversed(PACKAGES):
        own = [box for box in boxes if _package(box) == package]
        storeys.append(_storey(package, own, floor_of, edges))
    between: Counter[tuple[str, str]] = Counter()
    for (source, target), count in edges.items():
        if _package(source) != _package(target):
            between[_package(source), _package(target)] += count
    width = max(storey.width for storey in storeys)
    tops, top = {}, 10.0
    for storey in storeys:
        tops[storey.package] = (top, top + storey.height)
        top += storey.height + EDGE
    parts: list[str] = []
    for storey in storeys:
        parts += _storey_svg(storey, tops[storey.package][0], width)
    order = list(reversed(PACKAGES))
    # the shortest arrows stand nearest to the packages
    pairs = sorted(between, key=lambda pair: (order.index(pair[1]) - order.index(pair[0]), order.index(pair[0])))
    right = 10 + width
    for lane, (source, target) in enumerate(pairs):
        leaving = sorted((t for s, t in pairs if s == source), key=order.index)
        arriving = sorted((s for s, t in pairs if t == target), key=order.index, reverse=True)
        x = right + LANE * (lane + 1)
        start = tops[source][1] - 22 - 26 * leaving.index(target)
        end = tops[target][0] + 22 + 26 * arriving.index(source)
        parts.append(
            f'<polyline points="{right:.0f},{start:.0f} {x:.0f},{start:.0f} {x:.0f},{end:.0f} {right:.0f},{end:.0f}" '
            f'fill="none" stroke="#666" stroke-width="1.5" marker-end="url(#head)"/>'
        )
        parts.append(_badge(x, (start + end) / 2, between[source, target]))
    whole = f"{right + LANE * (len(pairs) + 1):.0f}", f"{top:.0f}"
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{whole[0]}" height="{whole[1]}" '
            f'viewBox="0 0 {whole[0]} {whole[1]}" font-family="Helvetica, Arial, sans-serif">',
            "<title>Which folder imports which, and how often</title>",
            '<defs><marker id="head" markerWidth="9" markerHeight="8" refX="8" refY="4" orient="auto">'
            '<path d="M0,0 L9,4 L0,8 z" fill="#666"/></marker></defs>',
            f'<rect width="{whole[0]}" height="{whole[1]}" fill="white"/>',
            *parts,
            "</svg>",
            "",
        ]
    )


def main() -> int:
    """Write the picture; returns the exit code."""
    try:
        drawn = picture()
    except UpwardsError as error:
        print(f"failed: {error}", file=sys.stderr)
        return 1
    PICTURE.parent.mkdir(exist_ok=True)
    PICTURE.write_text(drawn)
    return 0


if __name__ == "__main__":
    sys.exit(main())
