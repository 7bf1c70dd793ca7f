"""Peak memory of calibration does not follow the number of images."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
CALIBRATE = """
import sys
import torch
from calib.images.batches import Half, Part
from calib.scales.calibrate import Config, calibrate
from calib.scales.equalise import Config as EqualiseConfig, equalise
from calib.network.fp16_range import fp16_range
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
parts = [Part(Lazy(int(sys.argv[1]) // 4, seed)) for seed in range(4)]
halves = [Half(tuple(parts[:2])), Half(tuple(parts[2:]))]
model = calibrate(equalise(model, halves, EqualiseConfig()), halves, Config())
fp16_range(model.net, halves[0])
"""
# Not getrusage: its peak is inherited from the process that forked, which may be larger than all that follows.
PEAK = """
(peak,) = (line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM:"))
print(peak)
"""


def peak_rss(images: int) -> int:
    command = [sys.executable, "-c", CALIBRATE + PEAK, str(images)]
    # what is freed goes back at once: glibc otherwise keeps blocks below 32 MB, and reuses them or not
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "262144"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    return int(done.stdout)


def test_sixty_four_times_the_images_take_no_more_memory():
    few, many = peak_rss(64), peak_rss(4096)
    print(f"peak RSS: {few} kB with 64 images, {many} kB with 4096")
    assert many <= 1.05 * few  # 40 MB, of which the allocator takes 27; all images are 50 MB
