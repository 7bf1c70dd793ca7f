"""The card is read by the hub's own library, and by a YAML parser that knows nothing of it."""

import re

import pytest
import yaml
from huggingface_hub import ModelCard

from calib.errors import UserError
from deploy.pages.card import markdown, model_card
from deploy.pages.contents import read_contents
from tests.unit.deploy.pages.packages import CNN, QWT, RESULTS, manifest_of, read_report, write_package

EVIL = "a|b\n---\n# title <script>x</script> [l](javascript:x) `y` ![i](http://evil) {{7*7}} ```"


def card_of(folder):
    return model_card(read_contents(folder))


def front_matter(card):
    _, head, text = re.split(r"^---\n", card, maxsplit=2, flags=re.MULTILINE)
    return yaml.safe_load(head), text


@pytest.mark.parametrize("result", RESULTS, ids=lambda path: path.stem)
def test_the_front_matter_holds_the_figures_of_the_report(tmp_path, result):
    report = read_report(result)
    card = card_of(write_package(tmp_path / "p", report))
    head, _ = front_matter(card)
    (found,) = head["model-index"]
    metrics = {metric["type"]: metric["value"] for metric in found["results"][0]["metrics"]}
    assert metrics["sqnr_db"] == report["fidelity"]["sqnr_db"]
    assert metrics["cosine"] == report["fidelity"]["cosine"]
    assert metrics.get("top1") == report["fidelity"]["top1"]
    assert found["results"][0]["dataset"]["name"] == report["evaluation"]["source"]
    assert ModelCard(card).data.eval_results[0].metric_value == report["fidelity"]["sqnr_db"]


@pytest.mark.parametrize(("task", "tag"), [("classifier", "image-classification"), ("values", None)])
def test_the_tag_is_that_of_the_task(tmp_path, task, tag):
    head, _ = front_matter(card_of(write_package(tmp_path / "p", manifest=manifest_of(read_report(), task))))
    assert head.get("pipeline_tag") == tag


def test_the_text_tells_numbers_with_intervals_the_command_and_the_digests(tmp_path):
    report = read_report(QWT)
    report["command"] = "python -m deploy engine --model dinov2_s --calib 'my images'"
    folder = write_package(tmp_path / "p", report)
    contents, card = read_contents(folder), card_of(folder)
    fidelity, speed = report["fidelity"], report["speed"]["ort_cpu"]
    low, high = fidelity["sqnr_interval_db"]
    assert f"{fidelity['sqnr_db']:.1f} dB (95 %: {low:.1f} to {high:.1f}) on {fidelity['count']} images" in card
    assert f"{speed['ratio']:.2f}x float (95 %: {speed['low']:.2f} to {speed['high']:.2f})" in card
    assert f"```sh\n{report['command']}\n```" in card
    for digest in (contents.id, report["calibration"]["sha256"], report["evaluation"]["sha256"]):
        assert digest in card
    for warning in report["warnings"]:
        assert markdown(warning) in card
    assert "No figure here is of the engine's own outputs" in card


def test_a_report_of_an_older_version_has_no_command(tmp_path):
    report = read_report(CNN)
    del report["command"]
    card = card_of(write_package(tmp_path / "p", report))
    assert "does not record the command" in card
    assert "```" not in card


def test_nothing_of_a_package_becomes_a_mark(tmp_path):
    report = read_report()
    report |= {"model": EVIL, "weights_source": EVIL, "warnings": [EVIL], "command": f"python {EVIL}"}
    report["evaluation"]["source"] = EVIL
    card = card_of(write_package(tmp_path / "p", report))
    head, text = front_matter(card)
    assert head["model-index"][0]["name"].count("evil") == 1
    assert re.findall(r"^# .*", text, re.MULTILINE) == [f"# {markdown(EVIL)}, recipe {markdown(report['recipe'])}"]
    prose, fenced, rest = text.split("```sh\n")[0], *text.split("```sh\n")[1].split("\n```\n", 1)
    assert "\n" not in fenced
    for part in (prose, rest):
        assert not re.search(r"(?<!\\)(<|`|\]|\[)", part)
    rows = [line for line in prose.splitlines() if line.startswith("|")]
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in rows} <= {3, 7}


def test_a_command_that_would_close_its_block_is_refused(tmp_path):
    with pytest.raises(UserError, match="begins with '`'"):
        card_of(write_package(tmp_path / "p", read_report() | {"command": "``` x"}))
