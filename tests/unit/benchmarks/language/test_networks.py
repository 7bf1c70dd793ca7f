"""Language models of folders, and what is no language model."""

import json

import pytest
import torch

from benchmarks.language.figures import logits_of
from benchmarks.language.networks import SMALL, load
from calib.errors import UserError

transformers = pytest.importorskip("transformers")

TOKENS = 8
IDS = torch.arange(2 * TOKENS).reshape(2, TOKENS)


@pytest.fixture(scope="module", params=["opt", "llama"])
def folder(request, tmp_path_factory):
    """A tiny network of each kind, as from_pretrained reads it."""
    given = {key: value for key, value in SMALL[f"small_{request.param}"].items() if key != "model_type"}
    config = transformers.AutoConfig.for_model(request.param, **given | {"num_hidden_layers": 1})
    torch.manual_seed(1)
    place = tmp_path_factory.mktemp(request.param)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(place)
    return place


def test_a_folder_is_read_as_its_network_tells(folder):
    found = load(str(folder), TOKENS)
    net = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        expected = net(input_ids=IDS).logits
        logits = logits_of(found.net, IDS.float())
        shorter = found.net.net(input_ids=IDS[:, :-1]).logits
    torch.testing.assert_close(torch.from_numpy(logits), expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(shorter, expected[:, :-1], atol=1e-5, rtol=1e-4)  # no token sees the ones behind it
    assert (found.vocabulary, found.longest, found.random) == (100, 64, False)
    assert len(found.about()["sha256"]) == 64


def test_a_folder_that_lacks_weights_is_refused(folder, tmp_path):
    from safetensors.torch import load_file, save_file

    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    weights = load_file(folder / "model.safetensors")
    lost = next(name for name in weights if name.endswith("v_proj.weight"))
    save_file(
        {name: value for name, value in weights.items() if name != lost},
        tmp_path / "model.safetensors",
        {"format": "pt"},
    )
    with pytest.raises(UserError, match=r"lacks 1 weights, the first is .*v_proj\.weight: expected a folder"):
        load(str(tmp_path), TOKENS)


def test_other_networks_and_folders_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"no folder 'small_lama': expected one, or .*Did you mean 'small_llama'"):
        load("small_lama", TOKENS)
    with pytest.raises(UserError, match="cannot be read"):
        load(str(tmp_path), TOKENS)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    with pytest.raises(UserError, match="holds a network of the kind 'gpt2': expected a folder of an OPT or a LLaMA"):
        load(str(tmp_path), TOKENS)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "opt"}))
    with pytest.raises(UserError, match="cannot be read") as caught:
        load(str(tmp_path), TOKENS)
    assert "\n" not in str(caught.value)


def test_longer_texts_than_a_network_reads_are_refused():
    with pytest.raises(UserError, match="'small_opt' reads at most 64 tokens: expected shorter texts than 65"):
        load("small_opt", 65)
