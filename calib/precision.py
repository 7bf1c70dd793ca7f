"""How many bits the weights and inputs of each layer have.

An engine computes 8-bit weights with 8-bit inputs, and the first and last layers in FP16. Every other choice is simulated.
"""

from dataclasses import dataclass

UNROUNDED = 32  # stands for inputs that are not quantized: weight-only quantization
ATTENTIONS = ("float", "uniform", "log_sqrt2", "twin")
GELUS = ("uniform", "twin")


@dataclass(frozen=True)
class Precision:
    """The number formats of a network: bits of weights and of layer inputs, and the grids of attention and GELU.

    `weights`: 2 to 8. `inputs`: 2 to 8, or UNROUNDED. `first_last`: bits of weights and inputs in the first and last
    layers; 0 leaves these layers in float, as an engine leaves them in FP16. `zero_points`: whether inputs have
    asymmetric ranges. `attention`: the grid of softmax outputs in a simulation, one of ATTENTIONS; query, key and value
    then have the grid of layer inputs. (The engine's INT8 attention is the recipe's [attention].) `gelu`: the grid of
    layer inputs behind a GELU, one of GELUS. `weight_group`: how many input channels of an output channel share a scale and
    a zero point in its weight (calib/grids.py, WeightGroups); None: all of them share a scale. Raises ValueError for any
    other value.

    QwT's figures for ResNets at "4/4" and "6/6" are weights = 4 or 6 with inputs = 8: its code forces the inputs of
    convolutions to 8 bits.
    """

    weights: int = 8
    inputs: int = 8
    first_last: int = 0
    zero_points: bool = False
    attention: str = "float"
    gelu: str = "uniform"
    weight_group: int | None = None

    def __post_init__(self) -> None:
        for name, bits, others in (
            ("weights", self.weights, ()),
            ("inputs", self.inputs, (UNROUNDED,)),
            ("first_last", self.first_last, (0,)),
        ):
            if bits not in (*range(2, 9), *others):
                raise ValueError(f"{name} {bits} is not one of {', '.join(map(str, (*range(2, 9), *others)))} bits")
        for name, grid, known in (("attention", self.attention, ATTENTIONS), ("gelu", self.gelu, GELUS)):
            if grid not in known:
                raise ValueError(f"{name} '{grid}' is not one of {', '.join(known)}")
        if self.weight_group is not None and self.weight_group < 1:
            raise ValueError(f"weight_group {self.weight_group} is not a number of input channels of 1 or more")
        if self.gelu == "twin" and (self.zero_points or self.inputs == UNROUNDED):
            raise ValueError("gelu 'twin' is for inputs that round without zero points")

    @property
    def executable(self) -> bool:
        """Whether a TensorRT engine can compute it. Weights of fewer bits can run, because they fit into INT8."""
        return self == Precision(weights=self.weights)


INT8_ENGINE = Precision()


@dataclass(frozen=True)
class LayerBits:
    """The bits of the weight and of the input of one layer."""

    weight: int
    input: int
