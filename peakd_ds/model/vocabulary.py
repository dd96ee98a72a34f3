"""Only tokens that occur: a stage trains the rows of the embedding table that its data uses, and no others.

A token of no row never gets a gradient, so its Adam moments stay zero, and all that AdamW does to its embedding is
weight decay, by one factor for all such tokens, which is made good when the stage is over. Until then they are neither
cleared, averaged over ranks, clipped, updated nor saved. Of a small student the table is most of the weights, and a
GLUE task of a few thousand rows uses a third to a half of it.

V tokens of the vocabulary, K of them used, H hidden size.
"""

import hashlib

import torch
import torch.nn.functional as F
from torch import Tensor, nn

TABLE = "embeddings.word_embeddings"


def digest(tokens: Tensor) -> str:
    """A short hash of the ids."""
    return hashlib.sha256(tokens.numpy().tobytes()).hexdigest()[:16]


class UsedEmbedding(nn.Embedding):
    """The embeddings of K tokens, found by their ids in the whole vocabulary. Another id is out of range."""

    row_of: Tensor

    def __init__(self, whole: nn.Embedding, tokens: Tensor):
        row_of = torch.full((whole.num_embeddings,), len(tokens))
        row_of[tokens] = torch.arange(len(tokens))
        padding = None if whole.padding_idx is None else int(row_of[whole.padding_idx])
        weight = whole.weight.detach()[tokens]
        super().__init__(
            weight.shape[0], weight.shape[1], padding_idx=padding if padding != len(tokens) else None, _weight=weight
        )
        self.register_buffer("row_of", row_of, persistent=False)

    def forward(self, input: Tensor) -> Tensor:
        """Ids of any shape -> the same with H."""
        return F.embedding(self.row_of[input], self.weight, self.padding_idx)


def trim(module: nn.Module, tokens: Tensor) -> dict[str, nn.Embedding]:
    """Leave the given tokens alone in a model's embedding table; its whole table, for `restore`, under its name."""
    whole = {
        name: part for name, part in module.named_modules() if name.endswith(TABLE) and isinstance(part, nn.Embedding)
    }
    for name, table in whole.items():
        module.set_submodule(name, UsedEmbedding(table, tokens))
    return whole


@torch.no_grad()
def restore(module: nn.Module, whole: dict[str, nn.Embedding], tokens: Tensor, decay: float) -> None:
    """Put the whole table back, the given tokens as they are trained, the others times `decay`, what AdamW's weight
    decay has left of them (Loshchilov and Hutter, arXiv 1711.05101: each step takes the share lr * weight_decay)."""
    for name, table in whole.items():
        table.weight.mul_(decay)
        table.weight[tokens] = module.get_parameter(f"{name}.weight")
        module.set_submodule(name, table)
