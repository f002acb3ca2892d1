"""The embedding rows of new tokens, trained beside a frozen model.

PEFT can train single rows (`trainable_token_indices`), but its wrapper copies the whole vocabulary matrix in every
forward and sends a gradient of that size back, breaks under TRL's head, drops the head's bias and assumes CUDA
under ZeRO-3. Here the rows are one small parameter a side, hooked around the untouched layers; what is saved is
exactly PEFT's format (`peftchat.models.adapter_files`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

MODULE_NAME = "token_rows"
"""The attribute of the causal language model that holds its rows, so that wrappers and optimizers find them."""


@dataclass(frozen=True, slots=True)
class HeadRows:
    """The columns that new tokens add to the head.

    Attributes:
        weight: float, shape (n, H).
        bias: float, shape (n,), or None.
        ids: the tokens' ids, int64, shape (n,).
        size: number of logits with them.
        overlaid: whether some of the ids lie within the head's own vocabulary, whose columns they then replace.
    """

    weight: Tensor
    bias: Tensor | None
    ids: Tensor
    size: int
    overlaid: bool = True


class TokenRows(nn.Module):
    """Trainable rows for some token ids, in front of and behind a model whose own rows stay as they are.

    Ids at or beyond the model's vocabulary need no resize: they never reach its embedding, and their logits are
    appended.

    Args:
        ids: the tokens' ids, ascending.
        input_rows: initial input embeddings, float, shape (n, E).
        output_rows: initial rows of the head, float, shape (n, H); None where the head is tied to the embedding.
        output_bias: fixed bias of the new logits, shape (n,), or None where the head has none.
        vocabulary: rows that the model itself has.
        embed_scale: the factor that the embedding layer applies to its rows.
    """

    def __init__(
        self,
        ids: Sequence[int],
        input_rows: Tensor,
        output_rows: Tensor | None,
        output_bias: Tensor | None,
        vocabulary: int,
        embed_scale: float = 1.0,
    ) -> None:
        super().__init__()
        self.input_rows = nn.Parameter(input_rows.clone())
        self.output_rows = None if output_rows is None else nn.Parameter(output_rows.clone())
        self.ids: Tensor
        self.output_bias: Tensor | None
        self.register_buffer("ids", torch.tensor(list(ids)), persistent=False)
        self.register_buffer("output_bias", output_bias, persistent=False)
        self.vocabulary = vocabulary
        self.embed_scale = embed_scale
        self.size = max(vocabulary, max(ids) + 1)
        # On the host, so that no step waits for the device to learn them.
        self._id_list = list(ids)

    @property
    def tied(self) -> bool:
        """Whether one set of rows serves both sides."""
        return self.output_rows is None

    def head(self) -> HeadRows:
        """The rows as the loss and the logits need them."""
        rows = self.input_rows if self.output_rows is None else self.output_rows
        return HeadRows(rows, self.output_bias, self.ids, self.size, self._id_list[0] < self.vocabulary)

    def known_ids(self, ids: Tensor) -> Tensor:
        """The ids with the new ones replaced by 0, which every embedding knows."""
        return torch.where(self._matches(ids).any(-1), 0, ids)

    def embed(self, ids: Tensor, embedded: Tensor) -> Tensor:
        """The model's embeddings with those of the new tokens in their places.

        Args:
            ids: int64, shape (B, T), as the caller gave them.
            embedded: what the model's embedding made of `known_ids(ids)`, shape (B, T, E).
        """
        matches = self._matches(ids)
        rows = self.input_rows.to(embedded.dtype) * self.embed_scale
        return torch.where(matches.any(-1, keepdim=True), F.embedding(matches.int().argmax(-1), rows), embedded)

    def add_logits(self, hidden: Tensor, logits: Tensor) -> Tensor:
        """The model's logits with those of the new tokens: shape (..., V) to (..., size)."""
        head = self.head()
        new = F.linear(hidden, head.weight.to(hidden.dtype), None if head.bias is None else head.bias.to(hidden.dtype))
        if self._id_list == list(range(self.vocabulary, self.size)):
            return torch.cat([logits, new.to(logits.dtype)], dim=-1)
        grown = F.pad(logits, (0, self.size - self.vocabulary), value=torch.finfo(logits.dtype).min)
        return grown.index_copy(-1, head.ids, new.to(logits.dtype))

    def _matches(self, ids: Tensor) -> Tensor:
        return torch.eq(ids.unsqueeze(-1), self.ids)


def attach(model: PreTrainedModel, rows: TokenRows) -> None:
    """Hook the rows around the model's embedding and head, for training and for generation alike."""
    embedding = model.get_input_embeddings()
    model.add_module(MODULE_NAME, rows)
    # The layer's input is not what the rows need to see once the new ids are hidden from it, so it travels along.
    seen: list[Tensor] = []

    def hide(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        ids = args[0] if args else kwargs["input"]
        seen.append(ids)
        known = rows.known_ids(ids)
        return ((known, *args[1:]), kwargs) if args else (args, {**kwargs, "input": known})

    def replace(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return rows.embed(seen.pop(), output)

    embedding.register_forward_pre_hook(hide, with_kwargs=True)
    embedding.register_forward_hook(replace)
    head = model.get_output_embeddings()
    head.register_forward_hook(lambda module, args, logits: rows.add_logits(args[0], logits))


def rows_of(model: nn.Module) -> TokenRows | None:
    """The rows attached to a model, wherever wrappers have put it; None where there are none."""
    return next((module for module in model.modules() if isinstance(module, TokenRows)), None)


def train_rows(model: nn.Module) -> None:
    """Let the rows attached to a model be trained, after PEFT has frozen whatever it did not put there itself."""
    rows = rows_of(model)
    if rows is not None:
        rows.requires_grad_(True)
