"""Giving new tokens their first embeddings, on both training paths, and measuring how far they moved."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from peftchat.chat_template.templates import NewToken
from peftchat.models.rows import TokenRows, attach, rows_of
from peftchat.models.zero import full_tensor, gathered, same_storage

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# What a token's name says is not always a word that a vocabulary knows.
_DESCRIPTIONS = {
    "<|system|>": "instructions for the assistant",
    "<|assistant|>": "the assistant answers",
    "<|user|>": "the user asks",
    "<|end|>": "end of the message",
    "<|im_start|>": "start of a message",
    "<|im_end|>": "end of the message",
}


@dataclass(frozen=True, slots=True)
class InitialRows:
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


def initial_rows(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", tokens: Sequence[NewToken], how: str
) -> InitialRows:
    """First embeddings from those that the model has.

    Args:
        how: `mean` of all trained rows (Hewitt, 2021), `description`: mean over the words that describe the token,
            or `zeros`.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = is_tied(model)
    with gathered(parameter for parameter in (embedding.weight, head.weight, head.bias) if parameter is not None):
        size = embedding.weight.shape[0]
        picked = [_description_ids(tokenizer, token.token, size) for token in tokens] if how == "description" else None
        return InitialRows(
            _first(embedding.weight, len(tokens), how, picked),
            None if tied else _first(head.weight, len(tokens), how, picked),
            # The mean is what transformers gives the bias of a row that it adds, so a stock resize agrees.
            None if head.bias is None else head.bias.detach().float().mean().repeat(len(tokens)),
        )


def add_rows_to_frozen(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", tokens: Sequence[NewToken], how: str
) -> None:
    """Adapter paths: hang trainable rows around the model, which stays as it is, vocabulary and all."""
    if not tokens:
        return
    vocabulary = vocabulary_of(model)
    ids, first = _ids_and_rows(model, tokenizer, tokens, how, vocabulary)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    bias = first.bias
    if bias is not None:
        # Rows that the model already has keep the bias that it has for them.
        own = [index for index, token_id in enumerate(ids) if token_id < vocabulary]
        with gathered([head.bias]):
            bias[own] = head.bias.detach().float()[[ids[index] for index in own]].to(bias.device)
    scale = float(getattr(embedding, "embed_scale", 1.0))
    rows = TokenRows(ids, first.input, first.output, bias, vocabulary, scale)
    attach(model, rows.to(embedding.weight.device))


def grow_and_fill(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", tokens: Sequence[NewToken], how: str
) -> None:
    """Full fine-tuning: grow the vocabulary to hold the new tokens and write their first rows into it."""
    if not tokens:
        return
    vocabulary = vocabulary_of(model)
    ids, first = _ids_and_rows(model, tokenizer, tokens, how, vocabulary)
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


def current_rows(model: "PreTrainedModel", tokens: Sequence[NewToken]) -> InitialRows | None:
    """The new tokens' rows as they are now, float32 on the CPU; None without new tokens.

    Every process must call it.
    """
    if not tokens:
        return None
    rows = rows_of(model)
    if rows is not None:
        held = rows.ids.tolist()
        places = [held.index(token.id) for token in tokens]
        output = None if rows.output_rows is None else full_tensor(rows.output_rows).float()[places]
        return InitialRows(full_tensor(rows.input_rows).float()[places], output, None)
    index = torch.tensor([token.id for token in tokens])
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = is_tied(model)
    return InitialRows(_picked(embedding.weight, index), None if tied else _picked(head.weight, index), None)


def movement(before: InitialRows, after: InitialRows) -> tuple[list[float], list[float]]:
    """L2 distance of each input row, and of each output row, between two moments; equal where they are tied."""
    inputs = (after.input - before.input).norm(dim=-1).tolist()
    if before.output is None or after.output is None:
        return inputs, inputs
    return inputs, (after.output - before.output).norm(dim=-1).tolist()


def vocabulary_of(model: "PreTrainedModel") -> int:
    """Rows of the model's embedding."""
    weight = model.get_input_embeddings().weight
    with gathered([weight]):
        return int(weight.shape[0])


def _ids_and_rows(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    tokens: Sequence[NewToken],
    how: str,
    vocabulary: int,
) -> tuple[list[int], InitialRows]:
    """The ids that need rows, ascending, and their first rows."""
    tokens = _without_gaps(tokenizer, tokens, vocabulary)
    return [token.id for token in tokens], initial_rows(model, tokenizer, tokens, how)


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


def _description_ids(tokenizer: "PreTrainedTokenizerBase", token: str, vocabulary: int) -> list[int]:
    words = _DESCRIPTIONS.get(token) or " ".join(re.findall(r"[^\W_]+", token)) or token
    ids = tokenizer.encode(words, add_special_tokens=False)
    return [token_id for token_id in ids if token_id < vocabulary]


def _write(parameter: nn.Parameter, index: Tensor, values: Tensor) -> None:
    with gathered([parameter], write=True), torch.no_grad():
        parameter[index.to(parameter.device)] = values.to(parameter)


def _picked(parameter: nn.Parameter, index: Tensor) -> Tensor:
    with gathered([parameter]):
        return parameter.detach()[index.to(parameter.device)].float().cpu().clone()
