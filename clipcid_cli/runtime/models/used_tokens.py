"""Training only the token embeddings that the data uses.

Most of a small CLIP's parameters are token embeddings, and most tokens never occur in a small data set. AdamW only scales
the row of such a token, by 1 − lr·wd each step, yet updating the whole table took 86 ms of a step's 1.4 s (processor time
of a 14 M student, batches of 64). Here the rows in use are trained in a table of their own, and one factor stands for what
has become of all others.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MAX_TEXTS = 200_000
"""Texts whose tokens are worth listing: of more, most tokens are in use."""

# A table smaller than this many times the rows in use is not worth a second one.
_WORTHWHILE = 4


class UsedRows(nn.Module):
    """An embedding table of which some rows are trained.

    Attributes:
        weight: The rows in use, [n, W].
        decay: Weighs the first values of the others, [1, 1]. Its gradient is zero where no other is looked up, so that an
            optimiser decays it as it would each of them.
    """

    def __init__(self, table: nn.Embedding, used: Tensor) -> None:
        """Split a table.

        Args:
            table: The whole table, [V, W].
            used: Rows that are looked up in training, int64 [n], ascending, each once.
        """
        super().__init__()
        whole = table.weight.detach()
        self.weight = nn.Parameter(whole[used])
        self.decay = nn.Parameter(whole.new_ones(1, 1))
        places = torch.full((len(whole),), -1, device=whole.device)
        places[used] = torch.arange(len(used), device=whole.device)
        # Both follow from the start of the run, so checkpoints omit them.
        self.register_buffer("places", places, persistent=False)
        self.register_buffer("first", whole.clone(), persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Look up int64 tokens of any shape; float [..., W]."""
        places = self.get_buffer("places")[tokens]
        others = F.embedding(tokens, self.get_buffer("first")) * self.decay
        return torch.where(places[..., None] >= 0, F.embedding(places.clamp(min=0), self.weight), others)

    def whole(self) -> Tensor:
        """Return the whole table, [V, W]."""
        places = self.get_buffer("places")
        return self.forward(torch.arange(len(places), device=places.device)).detach()


def train_used_rows(module: nn.Module, used: Tensor) -> bool:
    """Replace a model's token embedding by one of the rows in use, where that saves much.

    Args:
        used: Tokens of all captions it will see, int64, ascending, each once.

    Returns:
        Whether it was replaced.
    """
    for parent in module.modules():
        table = getattr(parent, "token_embedding", None)
        if isinstance(table, nn.Embedding) and table.num_embeddings > _WORTHWHILE * len(used):
            parent.token_embedding = UsedRows(table, used.to(table.weight.device))
            return True
    return False


def whole_state(module: nn.Module) -> dict[str, Any]:
    """Return the state dict of a model as open_clip knows it, with the whole token embedding."""
    state = module.state_dict()
    for name, part in module.named_modules():
        if isinstance(part, UsedRows):
            state[f"{name}.weight"] = part.whole()
            del state[f"{name}.decay"]
    return state
