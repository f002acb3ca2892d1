"""The embedding rows of new tokens, trained beside a frozen model.

PEFT can train single rows (`trainable_token_indices`), but its wrapper copies the whole vocabulary matrix in every
forward and sends a gradient of that size back, breaks under TRL's head, drops the head's bias and assumes CUDA
under ZeRO-3. Here the rows are one small parameter a side, hooked around the untouched layers; what is saved is
exactly PEFT's format (`peftchat.models.saving`).
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from peftchat.chat_template.chat_format import NewToken
from peftchat.models.zero import full_tensor, gathered, same_storage

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


MODULE_NAME = "token_rows"
"""The attribute of the causal language model that holds its rows, so that wrappers and optimizers find them."""


@dataclass(frozen=True, slots=True)
class AddedTokenHead:
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


class AddedTokenEmbeddings(nn.Module):
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

    def head(self) -> AddedTokenHead:
        """The rows as the loss and the logits need them."""
        rows = self.input_rows if self.output_rows is None else self.output_rows
        return AddedTokenHead(rows, self.output_bias, self.ids, self.size, self._id_list[0] < self.vocabulary)

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


def register_hooks(model: PreTrainedModel, rows: AddedTokenEmbeddings) -> None:
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


def find_added_tokens(model: nn.Module) -> AddedTokenEmbeddings | None:
    """The rows attached to a model, wherever wrappers have put it; None where there are none."""
    return next((module for module in model.modules() if isinstance(module, AddedTokenEmbeddings)), None)


def unfreeze_added_tokens(model: nn.Module) -> None:
    """Let the rows attached to a model be trained, after PEFT has frozen whatever it did not put there itself."""
    rows = find_added_tokens(model)
    if rows is not None:
        rows.requires_grad_(True)


@dataclass(frozen=True, slots=True)
class EmbeddingSnapshot:
    """First embeddings of the new tokens, float32.

    Attributes:
        input: shape (n, E).
        output: shape (n, H); None where the head is tied.
        bias: shape (n,); None where the head has none.
    """

    input: Tensor
    output: Tensor | None
    bias: Tensor | None


def is_tied(model: "PreTrainedModel") -> bool:
    """Whether the head's weight is the embedding's."""
    return same_storage(model.get_input_embeddings().weight, model.get_output_embeddings().weight)


def initial_embeddings(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", tokens: Sequence[NewToken], how: str
) -> EmbeddingSnapshot:
    """First embeddings from those that the model has.

    Args:
        how: `mean` of all trained rows (Hewitt, 2021), `description`: mean over the words that describe the token,
            or `zeros`.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = is_tied(model)
    with gathered(parameter for parameter in (embedding.weight, head.weight, head.bias) if parameter is not None):
        size = embedding.weight.shape[0]
        picked = [_description_ids(tokenizer, token, size) for token in tokens] if how == "description" else None
        return EmbeddingSnapshot(
            _first(embedding.weight, len(tokens), how, picked),
            None if tied else _first(head.weight, len(tokens), how, picked),
            # The mean is what transformers gives the bias of a row that it adds, so a stock resize agrees.
            None if head.bias is None else head.bias.detach().float().mean().repeat(len(tokens)),
        )


def attach_added_tokens(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", tokens: Sequence[NewToken], how: str
) -> None:
    """Adapter paths: hang trainable rows around the model, which stays as it is, vocabulary and all."""
    if not tokens:
        return
    vocabulary = vocabulary_size(model)
    ids, first = _ids_and_embeddings(model, tokenizer, tokens, how, vocabulary)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    bias = first.bias
    if bias is not None:
        # Rows that the model already has keep the bias that it has for them.
        own = [index for index, token_id in enumerate(ids) if token_id < vocabulary]
        with gathered([head.bias]):
            bias[own] = head.bias.detach().float()[[ids[index] for index in own]].to(bias.device)
    scale = float(getattr(embedding, "embed_scale", 1.0))
    rows = AddedTokenEmbeddings(ids, first.input, first.output, bias, vocabulary, scale)
    register_hooks(model, rows.to(embedding.weight.device))


def resize_embeddings(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", tokens: Sequence[NewToken], how: str
) -> None:
    """Full fine-tuning: grow the vocabulary to hold the new tokens and write their first rows into it."""
    if not tokens:
        return
    vocabulary = vocabulary_size(model)
    ids, first = _ids_and_embeddings(model, tokenizer, tokens, how, vocabulary)
    size = ids[-1] + 1
    if size > vocabulary:
        model.resize_token_embeddings(size, mean_resizing=False)
    index = torch.tensor(ids)
    head = model.get_output_embeddings()
    _write(model.get_input_embeddings().weight, index, first.input)
    if first.output is not None:
        _write(head.weight, index, first.output)
    if first.bias is not None and size > vocabulary:
        _write(head.bias, index, first.bias)


def snapshot_embeddings(model: "PreTrainedModel", tokens: Sequence[NewToken]) -> EmbeddingSnapshot | None:
    """The new tokens' rows as they are now, float32 on the CPU; None without new tokens.

    Every process must call it.
    """
    if not tokens:
        return None
    rows = find_added_tokens(model)
    if rows is not None:
        held = rows.ids.tolist()
        places = [held.index(token.id) for token in tokens]
        output = None if rows.output_rows is None else full_tensor(rows.output_rows).float()[places]
        return EmbeddingSnapshot(full_tensor(rows.input_rows).float()[places], output, None)
    index = torch.tensor([token.id for token in tokens])
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = is_tied(model)
    return EmbeddingSnapshot(_picked(embedding.weight, index), None if tied else _picked(head.weight, index), None)


def l2_distance(before: EmbeddingSnapshot, after: EmbeddingSnapshot) -> tuple[list[float], list[float]]:
    """L2 distance of each input row, and of each output row, between two moments; equal where they are tied."""
    inputs = (after.input - before.input).norm(dim=-1).tolist()
    if before.output is None or after.output is None:
        return inputs, inputs
    return inputs, (after.output - before.output).norm(dim=-1).tolist()


def vocabulary_size(model: "PreTrainedModel") -> int:
    """Rows of the model's embedding."""
    weight = model.get_input_embeddings().weight
    with gathered([weight]):
        return int(weight.shape[0])


def _ids_and_embeddings(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    tokens: Sequence[NewToken],
    how: str,
    vocabulary: int,
) -> tuple[list[int], EmbeddingSnapshot]:
    """The ids that need rows, ascending, and their first rows."""
    tokens = _without_gaps(tokenizer, tokens, vocabulary)
    return [token.id for token in tokens], initial_embeddings(model, tokenizer, tokens, how)


def _without_gaps(tokenizer: "PreTrainedTokenizerBase", tokens: Sequence[NewToken], vocabulary: int) -> list[NewToken]:
    """The tokens, and whatever ids lie between the model's vocabulary and the last of them; ascending.

    Some tokenizers know tokens that their model has no rows for. Growing the model gives them rows, and rows that
    nothing sets would be random, and different at every load.
    """
    named = {token.id: token for token in tokens}
    for token_id in range(vocabulary, max(named)):
        if token_id not in named:
            named[token_id] = NewToken(str(tokenizer.convert_ids_to_tokens(token_id)), token_id)
    return [named[token_id] for token_id in sorted(named)]


def _first(weight: Tensor, count: int, how: str, picked: list[list[int]] | None) -> Tensor:
    if how == "zeros":
        return torch.zeros(count, weight.shape[1], device=weight.device)
    if picked is not None:
        return torch.stack([weight.detach()[ids].float().mean(0) for ids in picked])
    # Padded vocabularies end in rows of zeros that nothing ever trained.
    total = torch.zeros(weight.shape[1], device=weight.device)
    trained = 0
    for block in weight.detach().split(8192):
        total += block.float().sum(0)
        trained += int((block != 0).any(-1).sum())
    return (total / max(1, trained)).repeat(count, 1)


def _description_ids(tokenizer: "PreTrainedTokenizerBase", token: NewToken, vocabulary: int) -> list[int]:
    words = token.description or " ".join(re.findall(r"[^\W_]+", token.token)) or token.token
    ids = tokenizer.encode(words, add_special_tokens=False)
    return [token_id for token_id in ids if token_id < vocabulary]


def _write(parameter: nn.Parameter, index: Tensor, values: Tensor) -> None:
    with gathered([parameter], write=True), torch.no_grad():
        parameter[index.to(parameter.device)] = values.to(parameter)


def _picked(parameter: nn.Parameter, index: Tensor) -> Tensor:
    with gathered([parameter]):
        return parameter.detach()[index.to(parameter.device)].float().cpu().clone()
