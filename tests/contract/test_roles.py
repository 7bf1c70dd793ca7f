"""No source image has two roles: what is fitted on some is tried on others, and those that judge never fit nor choose."""

from dataclasses import dataclass, field, replace

import pytest

from calib.images.batches import ROTATIONS, Half
from calib.images.image_set import image_sets
from calib.images.preprocess import Preprocessing
from calib.judge import held_out
from calib.methods import adaround
from calib.precision import Precision
from compensation.star import finetune
from deploy.recipe import recipe_from_tables
from deploy.stages import CalibrationImages, Simulator, halves_of
from tests.tiny import tiny_batches, tiny_halves, tiny_model

SMALL = Preprocessing(16, 16, 18, 18, "bilinear", (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))


@pytest.mark.parametrize("count", [24, 61])
def test_the_four_parts_share_no_source_image_and_hold_all_pictures(count):
    images, _ = image_sets(None, None, SMALL, count)
    contents = []

    def keep(part):
        contents.append([picture.content for picture in part.pictures])
        return list(part.batches(8))

    halves = halves_of(images, keep)
    assert sum(map(len, contents)) == count
    assert len(set().union(*contents)) == sum(len(set(each)) for each in contents) == 6, (
        "of six source images, in crops"
    )
    for part, of_picture in zip((part for half in halves for part in half.parts), contents, strict=True):
        assert sum(len(batch) for batch in part) == len(of_picture)
        pairs = set(zip(part.sources, of_picture, strict=True))
        assert len(pairs) == len(set(part.sources)) == len(set(of_picture)), "a source is a source image"


@dataclass
class Told:
    """Batches that tell when they are read."""

    batches: list
    name: str
    log: list = field(repr=False)

    def __iter__(self):
        self.log.append(self.name)
        return iter(self.batches)

    def __len__(self):
        return len(self.batches)


RECIPES = {
    "erq": {"method": {"name": "erq", "rows": 512}, "compensate": {"forms": ["dense"], "min_r2_per_kernel": 0.0}},
    "gptq": {"method": {"name": "gptq"}},
    "learned": {
        "method": {"name": "adaround", "iterations": 3},
        "compensate": {"forms": ["dense"], "min_r2_per_kernel": 0.0},
        "finetune": {"learning_rate": 1e-4},
    },
}


@pytest.mark.parametrize("recipe", RECIPES)
def test_through_all_stages_images_keep_their_roles(monkeypatch, recipe):
    log, looks, fits = [], [], {}

    def told(halves):
        return [
            Half(
                tuple(
                    replace(part, batches=Told(part.batches, f"{index} {number}", log))
                    for number, part in enumerate(half.parts)
                )
            )
            for index, half in enumerate(halves)
        ]

    def during(call, keep):
        def run(*args, **options):
            start = len(log)
            result = call(*args, **options)
            keep(args, set(log[start:]))
            return result

        return run

    monkeypatch.setattr(
        held_out, "add_errors", during(held_out.add_errors, lambda args, read: looks.append((args, read)))
    )
    for module in (adaround, finetune):
        keep = lambda _args, read, module=module: fits.update({module: read})  # noqa: E731
        monkeypatch.setattr(module, "candidates", during(module.candidates, keep))
    halves = told(tiny_halves(4))
    tables = {"calibrate": {"observer": "max"}, "precision": {"weights": 4, "inputs": 8, "first_last": 8}}
    model = replace(tiny_model("vit"), precision=Precision(4, 8, 8))
    Simulator(model, CalibrationImages(tiny_batches(1)[0][:1], halves)).run(
        recipe_from_tables(recipe, tables | RECIPES[recipe], "test")
    )
    judged = 0
    for (_, candidates, rotation, part, *_), read in looks:
        fitted = [half for half in range(2) if all(each.trials[rotation][half] is not None for each in candidates)]
        assert read == {f"{1 - half} {part}" for half in fitted}
        judged += part == ROTATIONS[rotation][1]
    assert judged >= 4, "bias correction and the method at least, in two rotations"
    assert fits.keys() == ({adaround, finetune} if recipe == "learned" else set())
    for read in fits.values():
        assert "1 1" not in read
        assert "0 0" in read
