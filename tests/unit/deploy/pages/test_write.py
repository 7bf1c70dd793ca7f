"""A damaged package is one line, and the package itself is left as it is."""

import copy
import itertools
import json

import numpy as np
import pytest

from calib.errors import UserError
from deploy.cli import main
from deploy.package import FILES, GOLDEN, MANIFEST
from deploy.pages import write
from deploy.pages.write import write_pages
from deploy.verify import file_faults
from tests.unit.deploy.pages.packages import KERNEL_LISTS, golden, manifest_of, read_report, write_package


def refusal(folder):
    """What `write_pages` refuses a package with, which is one line and leaves no file."""
    with pytest.raises(UserError) as refused:
        write_pages(folder)
    assert "\n" not in str(refused.value)
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    return str(refused.value)


def test_both_files_lie_beside_the_package_which_stays_whole(tmp_path, capsys):
    folder = write_package(tmp_path / "int8")
    assert main(["report", str(folder)]) == 0
    page, card = tmp_path / "int8.report.html", tmp_path / "int8.MODEL_CARD.md"
    assert capsys.readouterr().out == f"written to {page}\nwritten to {card}\n"
    assert page.read_text().startswith("<!doctype html>")
    assert card.read_text().startswith("---\n")
    assert file_faults(folder) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["int8", card.name, page.name]


def test_the_folder_itself_may_be_given_as_a_dot(tmp_path, monkeypatch):
    monkeypatch.chdir(write_package(tmp_path / "int8"))
    assert write_pages(type(tmp_path)("."))[0] == tmp_path / "int8.report.html"


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named(tmp_path, name):
    folder = write_package(tmp_path / "p")
    (folder / name).unlink()
    assert name in refusal(folder)


@pytest.mark.parametrize("name", [name for name in FILES if name != MANIFEST])
def test_a_changed_file_is_named(tmp_path, name, capsys):
    folder = write_package(tmp_path / "p")
    (folder / name).write_bytes(b"y")
    assert f"{name} has changed since it was built" in refusal(folder)
    assert main(["report", str(folder)]) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_no_package_is_told_with_what_to_do(tmp_path, capsys):
    assert main(["report", "--out", str(tmp_path), "--model", "vit_s"]) == 2
    assert "build one with make engine" in capsys.readouterr().err


def test_texts_that_no_encoding_holds_are_shown_all_the_same(tmp_path):
    report = read_report()
    report["model"] = "\ud800\x00"
    report["fidelity"]["outputs"] = {"\ud800": 1.0, "b": 2.0}
    for path in write_pages(write_package(tmp_path / "p", report)):
        assert "\ufffd" in path.read_text(encoding="utf-8")


def test_golden_images_have_to_be_numbers(tmp_path):
    arrays = golden()
    arrays["images"][0, 0, 0, 0] = np.nan
    assert f"{GOLDEN}' holds NaN or Inf" in refusal(write_package(tmp_path / "p", arrays=arrays))


@pytest.mark.parametrize("batch", [0, -8])
def test_a_batch_of_nothing_is_refused(tmp_path, batch):
    assert "expected 1 or more" in refusal(
        write_package(tmp_path / "p", manifest=manifest_of(read_report(), batch=batch))
    )


@pytest.mark.parametrize(
    "wrong",
    [{"dtype": ["int8"]}, {"dims": [-1]}, {"dims": [1 << 40, 1 << 40]}, {"dims": [2] * 99}, {"dims": ["4"]}, {"name": None},
     {"other": 1}],
    ids=str,
)  # fmt: skip
def test_kernels_that_are_none_are_refused(tmp_path, wrong):
    kernels = copy.deepcopy(KERNEL_LISTS)
    kernels["int8"][0]["reads"][0] |= wrong
    assert "is not a list of kernels" in refusal(write_package(tmp_path / "p", kernels=kernels))


def test_too_much_for_a_page_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(write, "MAX_BYTES", 10_000)
    assert "expected 10000 at most" in refusal(write_package(tmp_path / "p"))


def test_a_place_that_cannot_be_written_is_one_line(tmp_path):
    folder = write_package(tmp_path / "p")
    (tmp_path / "p.report.html").mkdir()
    with pytest.raises(UserError, match=r"p\.report\.html' cannot be written \(Is a directory\)"):
        write_pages(folder)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["p", "p.report.html"]


def places(value, depth, at=()):
    """Where `value` holds anything, down to `depth`; of lists the first."""
    if at:
        yield at
    if depth and isinstance(value, dict):
        for key, each in value.items():
            yield from places(each, depth - 1, (*at, key))
    elif depth and isinstance(value, list) and value:
        yield from places(value[0], depth - 1, (*at, 0))


def replaced(content, at, value):
    content = copy.deepcopy(content)
    inner = content
    for key in at[:-1]:
        inner = inner[key]
    inner[at[-1]] = value
    return content


@pytest.mark.parametrize("value", [None, -1, "x", [], {}], ids=json.dumps)
def test_whatever_a_file_holds_is_a_page_or_one_line(tmp_path, monkeypatch, value):
    for name in ("bars_chart", "pairs_chart", "steps_chart", "errors_chart"):
        monkeypatch.setattr(f"deploy.pages.pictures.{name}", lambda *_: "data:,")
    report = read_report()
    report["branches"] = dict(itertools.islice(report["branches"].items(), 2))
    report["history"][-1]["details"] = {
        "tried": {"b": [next(iter(report["branches"].values()))]},
        "cost_db": {"l": 1.0},
    }
    manifest = manifest_of(report)
    written = [(replaced(report, at, value), manifest) for at in places(report, 4)]
    written += [(report, replaced(manifest, at, value)) for at in places(manifest, 5)]
    refusals = []
    for number, (one, other) in enumerate(written):
        try:
            write_pages(write_package(tmp_path / f"p{number}", one, manifest=other))
        except UserError as error:
            refusals.append(str(error))
    assert 0 < len(refusals) < len(written)
    assert not [line for line in refusals if "\n" in line]
