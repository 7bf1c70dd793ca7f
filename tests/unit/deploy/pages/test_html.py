"""The page says what the files of the package say, needs nothing beside it, and runs nothing of what it shows.

Oracles: the JSON files as they lie in the package, read with `json` alone, and the page as an HTML parser reads it.
"""

import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from deploy.pages.contents import read_contents
from deploy.pages.html import html_page
from deploy.pages.write import MAX_BYTES
from tests.unit.deploy.pages.packages import CNN, KERNEL_LISTS, RESULTS, golden, manifest_of, read_report, write_package

FACTORS = {" MB": 1e-6, "%": 100.0}  # by the unit that is shown, where the file holds another one
SHOWN = (
    "fidelity/sqnr_db", "fidelity/sqnr_interval_db/0", "fidelity/sqnr_interval_db/1", "fidelity/cosine", "fidelity/count",
    "fidelity/top1_agreement", "speed/ort_cpu/ratio", "speed/ort_cpu/low", "speed/ort_cpu/high", "bytes/float_onnx",
    "bytes/model.engine", "engine/planned", "waterfall/1/gain_db", "branches/blocks.0/r2_cv", "coverage/outside/0/fraction",
    "coverage/spread/median", "parity/torch_vs_ort_rel_l2", "seconds/total", "peak_rss_mb", "calibration/count",
)  # fmt: skip


class Page(HTMLParser):
    """What the page consists of: tags with attributes, figures (attributes, text), all text, the style."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.figures, self.text, self.style = [], [], "", ""
        self.open = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.open.append(tag)
        if tag == "data":
            self.figures.append([dict(attrs), ""])

    def handle_endtag(self, tag):
        while self.open and self.open.pop() != tag:  # tags without an end, as img
            pass

    def handle_data(self, data):
        if "style" in self.open:
            self.style += data
            return
        self.text += data
        if "data" in self.open:
            self.figures[-1][1] += data


def page_of(folder):
    return Page(html_page(read_contents(folder)))


def at(folder, source):
    """The number that a source names, or None where it names a file or a part of it."""
    file, _, pointer = source.partition("#")
    if not pointer:
        return None
    found = json.loads((folder / file).read_text())
    for key in pointer.split("/")[1:]:
        found = found[int(key) if isinstance(found, list) else key.replace("~1", "/").replace("~0", "~")]
    return found if isinstance(found, int | float) else None


def rounded(text):
    """(the number in a text, half a unit of its last digit, what its unit multiplies by)."""
    number, unit = re.fullmatch(r"([+-]?[\d,]*\.?\d+(?:e[+-]\d+)?)(.*)", text).groups()
    mantissa, _, exponent = number.replace(",", "").partition("e")
    return float(number.replace(",", "")), 0.5 * 10 ** (int(exponent or 0) - len(mantissa.partition(".")[2])), unit


@pytest.mark.parametrize("result", RESULTS, ids=lambda path: path.stem)
def test_every_figure_is_that_of_its_file(tmp_path, result):
    folder = write_package(tmp_path / "p", read_report(result))
    checked = 0
    for attributes, text in page_of(folder).figures:
        value, (shown, half, unit) = float(attributes["value"]), rounded(text)
        held = at(folder, attributes["data-source"])
        if held is not None:
            assert value == held, attributes
            checked += 1
        in_bytes = unit == " MB" and "/bytes/" in attributes["data-source"]
        factor = FACTORS.get(unit, 1.0) if in_bytes or unit == "%" else 1.0
        assert abs(shown - value * factor) <= half * 1.001, (text, value)
    assert checked > 60


def test_the_figures_that_matter_are_there(tmp_path):
    found = {attributes["data-source"] for attributes, _ in page_of(write_package(tmp_path / "p")).figures}
    assert {f"report.json#/{pointer}" for pointer in SHOWN} <= found


def test_a_figure_follows_its_file(tmp_path):
    report = read_report()
    report["fidelity"]["sqnr_db"] = 12.34
    assert "12.3 dB" in page_of(write_package(tmp_path / "p", report)).text
    assert "12.3 dB" not in page_of(write_package(tmp_path / "q")).text


def moved(kernels, batch):
    """MB per image, summed by hand."""
    sizes = {"int8": 1, "fp16": 2}
    every = [tensor for kernel in kernels for tensor in (*kernel["reads"], *kernel["writes"])]
    parts = [np.prod(one["dims"]) * sizes[one["dtype"]] * (batch if one["grows"] else 1) for one in every]
    return sum(parts) / batch / 1e6


def test_kernels_and_bytes_are_those_of_the_kernel_lists(tmp_path):
    report, kernels = read_report(), {**KERNEL_LISTS, "int8": KERNEL_LISTS["int8"] * 1000}
    page = page_of(write_package(tmp_path / "p", report, kernels, manifest=manifest_of(report, batch=4)))
    shown = {(float(each["value"]), text) for each, text in page.figures if each["data-source"] == "kernels.json"}
    values = [value for value, _ in shown]
    gemms = [kernel for kernel in kernels["int8"] if kernel["kind"] == "gemm"]
    for some in (kernels["int8"], kernels["fp16"], gemms):
        assert len(some) in values
        assert any(value == pytest.approx(moved(some, 4)) for value in values)
    assert (2000.0, "2000") in shown


def test_kernels_that_tell_no_sizes_are_counted_alone(tmp_path):
    bare = [{**kernel, "reads": [], "writes": []} for kernel in KERNEL_LISTS["int8"]]
    lists = {"int8": bare, "fp16": None, "why_no_twin": "onnxruntime has no FP16 kernels on a CPU"}
    page = page_of(write_package(tmp_path / "p", kernels=lists))
    shown = [float(each["value"]) for each, _ in page.figures if each["data-source"] == "kernels.json"]
    assert shown == [2.0, 1.0, 3.0]
    assert "They do not tell what they read and write." in page.text
    assert "MB per image" not in page.text.partition("They do not tell")[2]


@pytest.mark.parametrize(
    ("engine", "expected"),
    [
        ({"backend": "tensorrt_rtx", "planned": 50, "int8_convs": 49}, "1 of 50 layers proven, 49 planned only"),
        ({"backend": "tensorrt", "planned": 50, "int8_convs": 49}, "50 of 50 layers proven"),
        ({"backend": "tensorrt", "planned": 50, "lost": ["a"]}, "49 of 50 layers proven, 1 in no INT8 kernel"),
        ({"backend": "tensorrt", "planned": 50, "unproven": 3}, "3 products of unknown type"),
    ],
)
def test_proven_planned_and_unknown_are_told_apart(tmp_path, engine, expected):
    report = read_report(CNN)
    report["engine"] |= {"int8_convs": 0, "lost": [], "unproven": 0, **engine}
    text = page_of(write_package(tmp_path / "p", report)).text
    assert expected in text
    assert ("planned only" in text) == ("planned only" in expected)


def test_the_answers_to_the_golden_images_are_those_of_both_networks(tmp_path):
    arrays = golden()
    arrays["float_output"][0] = [0, 0, 9, 0, 0, 0]
    arrays["simulated_output"][0] = [0, 9, 0, 0, 0, 0]
    report = read_report(CNN)
    page = page_of(write_package(tmp_path / "p", report, arrays=arrays, manifest=manifest_of(report, "classifier")))
    probability = np.exp(9) / (np.exp(9) + 5)
    assert f"float class 2 ({probability:.1%})INT8 class 1 ({probability:.1%})" in page.text.replace("\n", "")
    exact, found = arrays["float_output"][1].astype(float), arrays["simulated_output"][1].astype(float)
    assert f"SQNR {10 * np.log10((exact**2).sum() / ((exact - found) ** 2).sum()):.1f} dB" in page.text
    assert "float class" not in page_of(write_package(tmp_path / "q", report)).text


ALLOWED = {
    "html", "head", "meta", "title", "style", "body", "h1", "h2", "div", "p", "ul", "li", "table", "thead", "tbody", "tr",
    "th", "td", "data", "span", "figure", "figcaption", "img", "br", "pre", "code", "footer",
}  # fmt: skip
HOSTILE = "<script>alert(1)</script>\" onerror='x' $\\frac{ {{7*7}} </style> <img src=http://evil/x>"


def hostile(value):
    """`value` with the same structure and every text and name hostile, but for names and texts that decide something."""
    if isinstance(value, dict):
        return {key: hostile(each) for key, each in value.items()}
    if isinstance(value, list):
        return [hostile(each) for each in value]
    return HOSTILE if isinstance(value, str) else value


def poisoned(tmp_path):
    report = hostile(read_report())
    for key in ("branches", "float_layers", "kept_float"):
        report[key] = {f"{HOSTILE}.{name}": each for name, each in report[key].items()}
    report["history"][0]["details"] = {"cost_db": {HOSTILE: 1.0}}
    report["fidelity"]["outputs"] = {HOSTILE: 1.0, "other": 2.0}
    manifest = hostile(manifest_of(report))
    kernels = json.loads(
        json.dumps(KERNEL_LISTS).replace('"layers": ["a/MatMul"]', f'"layers": [{json.dumps(HOSTILE)}]')
    )
    kernels["int8"][0]["name"] = HOSTILE
    return write_package(tmp_path / "<b>&", report, kernels, manifest=manifest)


def test_nothing_of_a_package_becomes_a_tag_an_attribute_or_a_template(tmp_path):
    page = page_of(poisoned(tmp_path))
    assert {tag for tag, _ in page.tags} <= ALLOWED
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]
    assert page.text.count(" ".join(HOSTILE.split())) > 20, "it is shown as it is"
    assert "evil" not in page.style


@pytest.mark.parametrize("poison", [False, True])
def test_the_page_needs_nothing_beside_it(tmp_path, poison):
    text = html_page(read_contents(poisoned(tmp_path) if poison else write_package(tmp_path / "p")))
    page = Page(text)
    sources = [attributes[name] for _, attributes in page.tags for name in ("src", "href") if name in attributes]
    assert sources
    assert all(re.match(r"data:image/(svg\+xml|jpeg);base64,[\w+/=]+$", source) for source in sources)
    assert not re.search(r"url\(|@import|http", page.style)
    policy = next(each["content"] for tag, each in page.tags if tag == "meta" and "http-equiv" in each)
    assert policy == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


@pytest.mark.parametrize("result", RESULTS, ids=lambda path: path.stem)
def test_a_real_report_stays_below_the_limit(tmp_path, result):
    arrays = golden(8)
    arrays["images"] = np.random.default_rng(0).normal(size=(8, 3, 224, 224)).astype(np.float32)  # noise packs worst
    page = html_page(read_contents(write_package(tmp_path / "p", read_report(result), arrays=arrays)))
    assert len(page.encode()) < MAX_BYTES / 2


def test_the_same_package_gives_the_same_page(tmp_path):
    folder = write_package(tmp_path / "p")
    assert html_page(read_contents(folder)) == html_page(read_contents(folder))
