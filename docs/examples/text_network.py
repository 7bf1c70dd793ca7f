"""A sentence encoder of transformers, which takes ids and a mask: MODULE=docs/examples/text_network.py:Sentence."""

from torch import Tensor, nn
from transformers import BertConfig, BertModel


class Sentence(nn.Module):
    """One vector per sentence, the mean over its tokens. `from_pretrained("folder")` for the configuration loads weights."""

    def __init__(self) -> None:
        super().__init__()
        self.net = BertModel(BertConfig(), add_pooling_layer=False)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Compute (B, width) of `input_ids` (B, tokens), whose padding has the mark 0 in `attention_mask` (B, tokens)."""
        states = self.net(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        read = attention_mask[:, :, None].to(states.dtype)
        return (states * read).sum(1) / read.sum(1)
