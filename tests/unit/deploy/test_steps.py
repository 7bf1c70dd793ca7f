"""What stages refuse."""

import pytest
import timm

from calib.errors import UserError
from calib.images.image_set import ImageSet
from calib.images.preprocess import Preprocessing
from deploy.steps import _check_labels, _outputs

PLAIN = Preprocessing(8, 8, 8, 8, "bilinear", (0.5,) * 3, (0.5,) * 3)


def test_a_class_that_a_classifier_has_no_output_for_is_refused():
    images = ImageSet("made up", PLAIN, (), labels=(0, 5))
    with pytest.raises(UserError, match="class 5, but the network has 5 outputs: expected classes 0 to 4"):
        _check_labels(images, 5)
    _check_labels(images, 6)


def test_a_network_that_computes_nan_is_refused_with_its_first_module():
    net = timm.create_model("test_resnet").eval()
    net.layer1[0].bn1.running_var[0] = -1e-3
    with pytest.raises(UserError, match=r"computes NaN or Inf, first in 'layer1\.0\.bn1'"):
        _outputs(net, (3, 64, 64))
