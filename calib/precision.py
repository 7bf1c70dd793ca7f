"""Bits of weights and inputs by layer. An engine runs 8 and 8, first and last layers in FP16; the rest is simulated."""

from dataclasses import dataclass

UNROUNDED = 32  # bits of inputs that stay as they are: weight-only quantization
ATTENTIONS = ("float", "uniform", "log_sqrt2", "twin")
GELUS = ("uniform", "twin")


@dataclass(frozen=True)
class Precision:
    """Bits of weights and of what layers read.

    `first_last`: bits of both in the first and last layers, which an engine leaves in FP16 (0: so does the simulation).
    `zero_points`: whether inputs have asymmetric ranges. `attention`: what softmax outputs round to in a simulation;
    query, key and value then round as inputs do. (The recipe's [attention] is the engine's INT8 attention.) `gelu`: the grid
    of what layers behind a GELU read.

    QwT's figures for ResNets at "4/4" and "6/6" are weights = 4 or 6, inputs = 8: its code forces inputs of convolutions
    to 8 bits.
    """

    weights: int = 8
    inputs: int = 8
    first_last: int = 0
    zero_points: bool = False
    attention: str = "float"
    gelu: str = "uniform"

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
        if self.gelu == "twin" and (self.zero_points or self.inputs == UNROUNDED):
            raise ValueError("gelu 'twin' is for inputs that round without zero points")

    @property
    def executable(self) -> bool:
        """Whether a TensorRT engine computes it: fewer bits of a weight fit into its INT8."""
        return self == Precision(weights=self.weights)


INT8_ENGINE = Precision()


@dataclass(frozen=True)
class LayerBits:
    """Bits of one layer's weight and input."""

    weight: int
    input: int
