"""Training only the token embeddings that the data uses.

Most of a small CLIP's parameters are token embeddings, and most tokens never occur in a small data set. AdamW only
scales the row of such a token, to (its initial value) × Π(1 − lr·wd), yet updating the whole table costs more than the
rest of a small student's step. Here the rows in use are trained in a table of their own and the others are updated
once, at the end.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# A table smaller than this many times the rows in use is not worth a second one.
_WORTHWHILE = 4


class UsedRows(nn.Module):
    """An embedding table of which only some rows are ever looked up."""

    def __init__(self, table: nn.Embedding, used: Tensor) -> None:
        """Split a table.

        Args:
            table: The whole table, [V, W].
            used: Rows that are looked up, int64 [n], ascending, each once.
        """
        super().__init__()
        whole = table.weight.detach()
        places = torch.full((len(whole),), -1, device=whole.device)
        places[used] = torch.arange(len(used), device=whole.device)
        self.weight = nn.Parameter(whole[used].clone())
        # Both follow from the start of the run, so checkpoints omit them.
        self.register_buffer("places", places, persistent=False)
        self.register_buffer("first", whole.clone(), persistent=False)
        self.register_buffer("used", used, persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Look up int64 tokens of any shape; float [..., W]. A token that is not in use is an error, not a wrong row."""
        return F.embedding(self.get_buffer("places")[tokens], self.weight)

    def whole(self, decay: float) -> Tensor:
        """Return the whole table [V, W]: rows in use as trained, the others times `decay`."""
        return (self.get_buffer("first") * decay).index_copy_(0, self.get_buffer("used"), self.weight.detach())


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


@contextmanager
def whole_table(module: nn.Module, decay: float) -> Iterator[None]:
    """Let a model look up any token within the context, for texts that are not the data's; not for training.

    Args:
        module: An open_clip model, its token embedding replaced or not.
        decay: Π(1 − lr·wd) over the steps done.
    """
    tables = ((parent, getattr(parent, "token_embedding", None)) for parent in module.modules())
    replaced = [(parent, rows) for parent, rows in tables if isinstance(rows, UsedRows)]
    try:
        for parent, rows in replaced:
            whole = rows.whole(decay)
            parent.token_embedding = nn.Embedding(len(whole), whole.shape[1], _weight=whole, _freeze=True)
        yield
    finally:
        for parent, rows in replaced:
            parent.token_embedding = rows


def whole_state(module: nn.Module, decay: float) -> Mapping[str, Any]:
    """Return the state dict of the model as open_clip knows it, with the whole token embedding.

    Args:
        module: An open_clip model, its token embedding replaced or not.
        decay: Π(1 − lr·wd) over the steps done.
    """
    state = module.state_dict()
    for name, part in module.named_modules():
        if isinstance(part, UsedRows):
            state[f"{name}.weight"] = part.whole(decay)
    return state


def freeze(module: nn.Module, tower: str) -> list[nn.Module]:
    """Freeze a tower's parameters.

    Args:
        tower: ``image`` or ``text``.

    Returns:
        The tower's modules, which stay in evaluation mode: no dropout, no new statistics.
    """
    for name, parameter in module.named_parameters():
        if name not in ("logit_scale", "logit_bias") and name.startswith("visual.") == (tower == "image"):
            parameter.requires_grad_(False)
    return [part for name, part in module.named_children() if (name == "visual") == (tower == "image")]
