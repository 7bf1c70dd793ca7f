"""The rows of the papers on language models: what each rounds, as a recipe.

QwT, section 4.5 and table 8: LLaMA3-8B with weights of 4 bits in groups of 128, asymmetric, inputs in 16 bits. The paper
starts from GPTQ with reordered columns; here from rounding to nearest.

AdaQTransform, table 7: OPT with weights and inputs of 8 or 6 bits, on SmoothQuant's scales. The paper quantizes weights per
channel and activations per layer, and says nothing else of these rows. So do we: the scale of a layer's input is that of the
largest value that calibration saw, one per layer, as engines have it. On SmoothQuant's scales, biases make up for the mean
error of rounded weights, as they do in front of `adaq` and `adaqtransform`. Attention and the head stay in float.
SmoothQuant's scales are of the inputs' ranges alone (exponent 0.5), where SmoothQuant divides by those of the weights too.
They move at every place that the structure allows, not behind norms alone. `adaq` is the closed form of
calib/methods/adaq.py; `adaqtransform` learns, 120 iterations a block of 8 texts, where the paper takes 20 000 of 32 images.
"""

from dataclasses import replace
from typing import Any

import torch

from benchmarks.language.figures import judge
from benchmarks.language.networks import Loaded
from benchmarks.language.texts import Texts, rows
from calib.errors import UserError, suggestion
from calib.network.qdq import quantized_net
from calib.quant_model import QuantModel
from deploy.recipe import Recipe, recipe_from_tables
from deploy.stages import CalibrationImages, Simulator

FLOAT = "float"
SCALES = {"observer": "max"}
W4 = {"precision": {"weights": 4, "inputs": 32, "weight_group": 128}, "calibrate": SCALES}
QWT = {"compensate": {"forms": ["dense"], "min_r2_per_kernel": 0.0}}
LEARNED = {"method": {"name": "adaround", "iterations": 120, "batch": 8, "drop": 0.5}}


def _smoothquant(bits: int) -> dict[str, Any]:
    return {
        "precision": {"weights": bits, "inputs": bits},
        "equalise": {"exponents": [0.5], "shift": False},
        "calibrate": SCALES,
        "method": {"name": "rtn", "bias_correction": True},
    }


ROWS: dict[str, dict[str, Any]] = {  # what neighbours begin with alike is computed once
    FLOAT: {},
    "w4_g128": W4,
    "w4_g128_qwt": W4 | QWT,
    "naive_8": {"calibrate": SCALES},
    "smoothquant_8": _smoothquant(8),
    "smoothquant_8_adaq": _smoothquant(8) | {"method": {"name": "adaq"}},
    "smoothquant_8_adaqtransform": _smoothquant(8) | LEARNED,
    "smoothquant_6": _smoothquant(6),
    "smoothquant_6_adaq": _smoothquant(6) | {"method": {"name": "adaq"}},
    "smoothquant_6_adaqtransform": _smoothquant(6) | LEARNED,
}


def chosen_rows(names: str) -> tuple[str, ...]:
    """Return the rows named in a list with commas, float first; all of them for "". Raises UserError for another name."""
    given = [name for name in names.replace(",", " ").split() if name != FLOAT]
    for name in given:
        if name not in ROWS:
            raise UserError(
                f"--rows: unknown row '{name}': expected some of {', '.join(ROWS)}.{suggestion(name, ROWS)}"
            )
    return tuple(name for name in ROWS if name == FLOAT or name in given or not names.strip())


def recipe(name: str) -> Recipe:
    """Return the recipe of a row that rounds."""
    return recipe_from_tables(name, ROWS[name], f"row '{name}'")


class Bench:
    """A language model and the texts that calibrate and judge its rows."""

    def __init__(self, loaded: Loaded, texts: Texts, device: torch.device) -> None:
        self.loaded, self.texts, self.device = loaded, texts, device
        example = rows(texts.calibrating[:1], torch.device("cpu"))
        images = CalibrationImages(example, texts.halves(device), device=device)
        self.simulator = Simulator(QuantModel.of("language", loaded.net), images)

    def measure(self, name: str) -> dict[str, Any]:
        """Return the figures of a row and what its stages did, as plain values."""
        net = self.loaded.net
        if name == FLOAT:
            figures = judge(net, net, self.texts.judged, torch.device("cpu"))
            return {"row": name, "figures": figures.to_json(), "recipe": None, "stages": []}
        chosen = recipe(name)
        model = self.simulator.run(chosen)
        figures = judge(model.float_net, quantized_net(model), self.texts.judged, self.device)
        stages = [replace(record, details={}).to_json() for record in model.history]
        return {"row": name, "figures": figures.to_json(), "recipe": chosen.to_json(), "stages": stages}
