"""The picture of the folders is up to date, and what it is made from is read and checked as it should be."""

import itertools
import xml.etree.ElementTree as ElementTree

import pytest

from benchmarks import architecture
from benchmarks.architecture import PICTURE, UpwardsError, floors, folder_imports, picture
from tests.docs.pages import ROOT

SVG = "{http://www.w3.org/2000/svg}"


def test_the_picture_is_up_to_date():
    assert PICTURE.read_text() == picture(ROOT), "run `python -m benchmarks.architecture`"


def test_every_folder_has_its_line():
    boxes, _ = folder_imports(ROOT)
    text = (ROOT / "docs/architecture.md").read_text()
    missing = [box for box in boxes if not box.endswith(".py") and f"| `{box}/` |" not in text]
    assert missing == []


def boxes_of(svg):
    """(left, top, right, bottom) of the white boxes with a border, and of the whole picture."""
    root = ElementTree.fromstring(svg)
    found = [each for each in root.iter(f"{SVG}rect") if each.get("stroke")]
    sides = [[float(each.get(name)) for name in ("x", "y", "width", "height")] for each in found]
    return [(x, y, x + w, y + h) for x, y, w, h in sides], (float(root.get("width")), float(root.get("height")))


def test_no_two_boxes_overlap_and_none_is_cut_off():
    boxes, (width, height) = boxes_of(picture(ROOT))
    assert len(boxes) > 20
    for index, (left, top, right, bottom) in enumerate(boxes):
        assert min(left, top) > 0
        assert right < width
        assert bottom < height
        for other in boxes[:index]:
            assert right < other[0] or other[2] < left or bottom < other[1] or other[3] < top


def test_no_arrow_crosses_a_box():
    svg = picture(ROOT)
    boxes, _ = boxes_of(svg)
    for line in ElementTree.fromstring(svg).iter(f"{SVG}polyline"):
        points = [tuple(map(float, point.split(","))) for point in line.get("points").split()]
        for (x, y), (to_x, to_y) in itertools.pairwise(points):
            for step in range(1, 20):
                at_x, at_y = x + (to_x - x) * step / 20, y + (to_y - y) * step / 20
                assert not any(left < at_x < right and top < at_y < bottom for left, top, right, bottom in boxes)


def written(root, files):
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


TREE = {
    "calib/errors.py": "x = 1\n",
    "calib/images/read.py": "from calib.errors import x\nfrom calib import errors\n",
    "deploy/run.py": "def run():\n    from calib.images import read\n    return read\n",
}


def test_imports_are_counted_between_folders_and_files(tmp_path):
    boxes, edges = folder_imports(written(tmp_path, TREE))
    assert boxes == ["calib/errors.py", "calib/images", "deploy/run.py"]
    assert edges == {("calib/images", "calib/errors.py"): 2, ("deploy/run.py", "calib/images"): 1}
    assert floors(boxes, edges) == {"calib/errors.py": 0, "calib/images": 1, "deploy/run.py": 0}


def test_imports_for_types_alone_do_not_count(tmp_path):
    typing = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from deploy.run import run\n"
    _, edges = folder_imports(written(tmp_path, {**TREE, "calib/errors.py": typing}))
    assert ("calib/errors.py", "deploy/run.py") not in edges


@pytest.mark.parametrize(
    ("files", "named"),
    [
        (
            {"calib/errors.py": "import deploy.run\n"},
            "calib/errors.py imports deploy/run.py .1 times., which stands above",
        ),
        ({"calib/errors.py": "import calib.images.read\n"}, "in a circle among calib/errors.py, calib/images"),
    ],
)
def test_an_arrow_upwards_ends_the_command_by_name(tmp_path, monkeypatch, capsys, files, named):
    root = written(tmp_path, {**TREE, **files})
    with pytest.raises(UpwardsError, match=named):
        picture(root)

    def drawn():
        return picture(root)

    monkeypatch.setattr(architecture, "picture", drawn)
    monkeypatch.setattr(architecture, "PICTURE", tmp_path / "docs/architecture.svg")
    assert architecture.main() == 1
    assert capsys.readouterr().err.startswith("failed: ")
    assert not (tmp_path / "docs").exists()
