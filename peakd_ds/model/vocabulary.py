"""The embedding table of the tokens in use: a stage trains only the rows of the table that its data reads.

A token that occurs in no row never gets a gradient, so its Adam moments stay zero, and AdamW changes its embedding by
weight decay alone, by one factor for all such tokens. `restore` applies that factor when the stage is over. Until then
these rows are not cleared, averaged over ranks, clipped, updated or saved. The table is most of a small student's
weights, and a GLUE task of a few thousand rows uses a third to a half of it.

V tokens of the vocabulary, K of them in use, H hidden size.
"""

import hashlib

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel


def digest(tokens: Tensor) -> str:
    """A short hash of token ids."""
    return hashlib.sha256(tokens.numpy().tobytes()).hexdigest()[:16]


class UsedEmbedding(nn.Embedding):
    """The embeddings of K tokens, looked up by their ids in the full vocabulary; other ids are out of range."""

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
        """Token ids [...] -> embeddings [..., H]."""
        return F.embedding(self.row_of[input], self.weight, self.padding_idx)


def trim(module: nn.Module, tokens: Tensor) -> dict[str, nn.Embedding]:
    """Keep only the given tokens in a model's embedding tables; returns the full tables by name, for `restore`."""
    tables = {id(part.get_input_embeddings()) for part in module.modules() if isinstance(part, PreTrainedModel)}
    whole = {
        name: part for name, part in module.named_modules() if id(part) in tables and isinstance(part, nn.Embedding)
    }
    for name, table in whole.items():
        module.set_submodule(name, UsedEmbedding(table, tokens))
    return whole


@torch.no_grad()
def restore(module: nn.Module, whole: dict[str, nn.Embedding], tokens: Tensor, decay: float) -> None:
    """Put the full tables back: the given tokens as trained, the others times `decay`.

    Each step of AdamW's weight decay removes the share lr * weight_decay (Loshchilov and Hutter, arXiv 1711.05101).
    """
    for name, table in whole.items():
        table.weight.mul_(decay)
        table.weight[tokens] = module.get_parameter(f"{name}.weight")
        module.set_submodule(name, table)
