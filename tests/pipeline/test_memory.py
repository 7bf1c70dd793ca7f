"""Peak memory of calibration does not follow the number of images."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
LAZY = """
import sys
import torch

class Lazy:
    # batches of 16 random images, made when they are asked for
    def __init__(self, images, seed, size):
        self.images, self.seed, self.size = images, seed, size
    def __len__(self):
        return self.images // 16
    def __iter__(self):
        generator = torch.Generator().manual_seed(self.seed)
        return (torch.randn(16, 3, self.size, self.size, generator=generator) for _ in range(len(self)))

torch.set_num_threads(1)
"""
CALIBRATE = """
from calib.scales.calibrate import Config, calibrate
from calib.scales.equalise import Config as EqualiseConfig, equalise
from calib.network.fp16_range import fp16_range
from tests.tiny import SIZE, tiny_model

model = tiny_model("vit")
folds = [Lazy(int(sys.argv[1]) // 2, seed, SIZE) for seed in (1, 2)]
model = calibrate(equalise(model, folds, EqualiseConfig()), folds, Config())
fp16_range(model.net, folds[0])
"""
COMPENSATE = """
import timm
from calib.scales.calibrate import Config as CalibrateConfig, calibrate
from calib.families import family_of
from calib.methods import rtn
from calib.quant_model import QuantModel
from compensation.qwt import Config, compensate

# 256 tokens of 192 channels: a block reads 0.2 MB per image, four times the image
net = timm.create_model("vit_tiny_patch16_224", img_size=64, patch_size=4, depth=2).eval()
model = QuantModel.of("vit", net, family_of(net))
folds = [Lazy(int(sys.argv[1]) // 2, seed, 64) for seed in (1, 2)]
model = calibrate(model, [Lazy(16, 3, 64)], CalibrateConfig("max"))
model = rtn.reduce_error(model, [], rtn.Config())
compensate(model, folds, Config(forms=("dense",), rows=1024, kernel_price=0.0, min_gain_db=-1e9, carry=sys.argv[2]))
"""
# Not getrusage: its peak is inherited from the process that forked, which may be larger than all that follows.
PEAK = """
(peak,) = (line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM:"))
print(peak)
"""


def peak_rss(script: str, images: int, *arguments: str) -> int:
    command = [sys.executable, "-c", LAZY + script + PEAK, str(images), *arguments]
    # what is freed goes back at once: glibc otherwise keeps blocks below 32 MB, and reuses them or not
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "262144"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    return int(done.stdout)


def test_sixty_four_times_the_images_take_no_more_memory():
    few, many = peak_rss(CALIBRATE, 64), peak_rss(CALIBRATE, 4096)
    print(f"peak RSS: {few} kB with 64 images, {many} kB with 4096")
    assert many <= 1.05 * few  # 40 MB, of which the allocator takes 27; all images are 50 MB


@pytest.mark.parametrize(("carry", "flat"), [("memory", False), ("disk", True), ("recompute", True)])
def test_four_times_the_images_take_branches_no_more_memory_unless_inputs_are_kept_there(carry, flat):
    few, many = peak_rss(COMPENSATE, 128, carry), peak_rss(COMPENSATE, 512, carry)
    print(f"peak RSS, {carry}: {few} kB with 128 images, {many} kB with 512")
    # inputs and outputs of a block are 151 MB for 384 images
    assert (many - few <= 75_000) == flat
