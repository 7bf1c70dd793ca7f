"""The samples that branches are fitted on, where a recipe says at which value of an input."""

import pytest
import torch
from torch import nn

from calib.errors import UserError
from calib.images.batches import Half, Part
from calib.input_rows import join_inputs
from calib.inputs import Input, Inputs
from compensation.fitted_on import samples_where
from compensation.qwt import Config

INPUTS = Inputs((Input("latent", "float32", (3,)), Input("step", "int64", ())))


def network():
    net = nn.Identity()
    join_inputs(net, INPUTS)
    return net


def halves(*steps):
    """Halves whose parts have batches of two samples with these steps."""
    random = torch.Generator().manual_seed(0)
    parts = []
    for of_part in steps:
        rows = torch.cat([torch.randn(len(of_part), 3, generator=random), torch.tensor(of_part)[:, None]], 1)
        parts.append(Part(list(rows.split(2))))
    return [Half((parts[0], parts[1])), Half((parts[2], parts[3]))]


def test_samples_with_the_value_stay_in_their_part_in_order():
    given = halves([0.0, 5, 5, 0], [5.0, 0], [0.0, 0, 0], [5.0, 5, 0])
    found = samples_where(network(), given, "step", 0)
    for half, before in zip(found, given, strict=True):
        for part, all_of_it in zip(half.parts, before.parts, strict=True):
            rows = torch.cat(list(all_of_it))
            assert torch.equal(torch.cat(list(part)), rows[rows[:, 3] == 0])


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("time", 0, r"only_input = 'time': expected one of latent, step"),
        ("latent", 0, r"'latent' has 3 numbers per sample: expected one"),
        ("step", 7, r"only_value = 7: one of the four parts of the calibration samples has none"),
    ],
)
def test_what_no_sample_can_be_chosen_by_is_told(name, value, message):
    with pytest.raises(UserError, match=message):
        samples_where(network(), halves([0.0], [0.0], [0.0], [0.0]), name, value)


def test_a_network_of_images_has_no_input_to_choose_by():
    with pytest.raises(UserError, match="this one reads images"):
        samples_where(nn.Identity(), halves([0.0], [0.0], [0.0], [0.0]), "step", 0)


def test_a_value_without_the_name_of_its_input_is_refused():
    with pytest.raises(ValueError, match="only_value is 5 without only_input"):
        Config(only_value=5.0)
