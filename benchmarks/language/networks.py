"""Language models as the stages read them: OPT and LLaMA of transformers, from a folder or small with random weights."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from calib.errors import UserError, first_line, suggestion
from calib.input_rows import join_inputs
from calib.inputs import Input, Inputs
from calib.outputs import join_outputs
from calib.store.kept_files import nets_sha256

KINDS = ("llama", "opt")  # what transformers calls them
SMALL: dict[str, dict[str, Any]] = {  # two blocks, two groups of 128 input channels in every layer
    "small_llama": {
        "model_type": "llama", "vocab_size": 100, "hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    },
    "small_opt": {
        "model_type": "opt", "vocab_size": 100, "hidden_size": 256, "ffn_dim": 256, "num_hidden_layers": 2,
        "num_attention_heads": 4, "word_embed_proj_dim": 256, "max_position_embeddings": 64,
    },
}  # fmt: skip


class Language(nn.Module):
    """All tokens of texts at once. The head and the embedding stay in float: they are the last layer and a table."""

    returns_tokens = True

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, input_ids: Tensor) -> Tensor:
        """Compute the logits (N, T, vocabulary) of `input_ids` (N, T), texts without anything that fills them up."""
        return self.net(input_ids=input_ids, use_cache=False).logits


@dataclass(frozen=True)
class Loaded:
    """A language model. `vocabulary`: how many tokens it knows; `longest`: tokens of the longest text that it reads."""

    name: str
    net: Language
    vocabulary: int
    longest: int
    random: bool

    def about(self) -> dict[str, Any]:
        """Where the weights are from, as plain values."""
        return {"source": self.name, "random": self.random, "sha256": nets_sha256({"net": self.net})}


def _small(transformers: Any, name: str) -> nn.Module:
    config = dict(SMALL[name])
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(config.pop("model_type"), **config), attn_implementation="sdpa"
    )


def _of_folder(transformers: Any, folder: Path) -> nn.Module:
    """Raise UserError for a folder that holds no OPT or LLaMA, or not all of its weights."""
    expected = "expected a folder of an OPT or a LLaMA that from_pretrained reads"
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    try:
        kind = transformers.AutoConfig.from_pretrained(folder, local_files_only=True).model_type
        if kind not in KINDS:
            raise UserError(f"'{folder}' holds a network of the kind '{kind}': {expected}")
        net, told = transformers.AutoModelForCausalLM.from_pretrained(
            folder, local_files_only=True, dtype=torch.float32, attn_implementation="sdpa", output_loading_info=True
        )
    except UserError:
        raise
    except Exception as error:  # what the files of a folder make transformers raise is of any kind
        raise UserError(
            f"'{folder}' cannot be read ({type(error).__name__}: {first_line(error, 150)}): {expected}"
        ) from error
    for what in ("missing_keys", "mismatched_keys"):
        if told[what]:
            wrong = sorted(map(str, told[what]))
            raise UserError(f"'{folder}' lacks {len(wrong)} weights, the first is {wrong[0]}: {expected}")
    return net


def load(name: str, tokens: int) -> Loaded:
    """Return the language model of a folder, or one of SMALL, which reads rows of `tokens` ids as float32 (N, tokens).

    Raises UserError if there is none, or if it does not read as many tokens.
    """
    try:
        import transformers
    except ImportError as error:
        raise UserError(
            "no package transformers: expected it for language models; run pip install transformers==5.24.0"
        ) from error
    if name not in SMALL and not Path(name).is_dir():
        raise UserError(f"no folder '{name}': expected one, or {' or '.join(SMALL)}.{suggestion(name, SMALL)}")
    found: Any = _small(transformers, name) if name in SMALL else _of_folder(transformers, Path(name))
    config = found.config
    if tokens > config.max_position_embeddings:
        raise UserError(
            f"'{name}' reads at most {config.max_position_embeddings} tokens: expected shorter texts than {tokens} in --ids"
        )
    net = Language(found).eval().requires_grad_(False)
    join_inputs(net, Inputs((Input("input_ids", "int64", (tokens,)),)))
    join_outputs(net, torch.zeros(2, tokens))
    return Loaded(name, net, config.vocab_size, config.max_position_embeddings, name in SMALL)
