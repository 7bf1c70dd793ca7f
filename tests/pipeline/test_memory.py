"""Peak memory of calibration does not follow the number of images."""

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
SCRIPT = """
import resource, sys
import torch
from calib.calibrate import Config, calibrate
from calib.equalise import Config as EqualiseConfig, equalise
from calib.fp16_range import fp16_range
from tests.tiny import SIZE, tiny_model

class Lazy:
    # batches of 16 random images, made when they are asked for
    def __init__(self, images, seed):
        self.images, self.seed = images, seed
    def __len__(self):
        return self.images // 16
    def __iter__(self):
        generator = torch.Generator().manual_seed(self.seed)
        return (torch.randn(16, 3, SIZE, SIZE, generator=generator) for _ in range(len(self)))

torch.set_num_threads(1)
model = tiny_model("vit")
folds = [Lazy(int(sys.argv[1]) // 2, seed) for seed in (1, 2)]
model = calibrate(equalise(model, folds, EqualiseConfig()), folds, Config())
fp16_range(model.net, folds[0])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def peak_rss(images: int) -> int:
    command = [sys.executable, "-c", SCRIPT, str(images)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return int(done.stdout)


def test_sixty_four_times_the_images_take_no_more_memory():
    few, many = peak_rss(64), peak_rss(4096)
    print(f"peak RSS: {few} kB with 64 images, {many} kB with 4096")
    assert many <= 1.01 * few  # 8 MB; the images of one fold alone are 25 MB
