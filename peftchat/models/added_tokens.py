"""Added tokens: their embeddings, trained beside a frozen model or inside a grown one.

PEFT can train single rows of an embedding (`trainable_token_indices`). Its wrapper copies the full matrix in every
forward and computes a gradient of that size. It also fails with TRL's LM head, drops the head's bias and assumes CUDA
under ZeRO-3. Here the embeddings of added tokens are one small parameter for the input and one for the output, hooked
around the unchanged layers. The saved files have exactly PEFT's format (`peftchat.models.saving`).
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
from peftchat.models.zero import full_tensor, gathered, same_storage, unsharded_shape

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


MODULE_NAME = "added_tokens"
"""The attribute of the causal language model that holds the embeddings, where wrappers and optimizers find them."""

_MEAN_BLOCK = 8192
"""Rows of an embedding that are converted to float32 at once to compute its mean."""


@dataclass(frozen=True, slots=True)
class AddedTokenHead:
    """The rows of the LM head for added tokens.

    Attributes:
        weight: float, shape (n, H).
        bias: float, shape (n,), or None.
        ids: the tokens' ids, int64, shape (n,).
        size: the number of logits with these.
        overlaid: whether some of the ids are within the model's own vocabulary. Their logits replace the head's.
    """

    weight: Tensor
    bias: Tensor | None
    ids: Tensor
    size: int
    overlaid: bool = True


class AddedTokenEmbeddings(nn.Module):
    """Trainable input and output embeddings of some token ids, for a model whose own embeddings stay frozen.

    Ids beyond the model's vocabulary need no resize: they never reach its embedding, and their logits are appended.

    Args:
        ids: the tokens' ids, ascending.
        input_embeddings: initial input embeddings, float, shape (n, E).
        output_embeddings: initial rows of the LM head, float, shape (n, H); None if it is tied to the embedding.
        output_bias: fixed bias of the new logits, float, shape (n,); None if the head has no bias.
        vocab_size: rows of the model's own embedding.
        embed_scale: the factor that the embedding layer applies to its rows.
    """

    def __init__(
        self,
        ids: Sequence[int],
        input_embeddings: Tensor,
        output_embeddings: Tensor | None,
        output_bias: Tensor | None,
        vocab_size: int,
        embed_scale: float = 1.0,
    ) -> None:
        super().__init__()
        self.input_embeddings = nn.Parameter(input_embeddings.clone())
        self.output_embeddings = None if output_embeddings is None else nn.Parameter(output_embeddings.clone())
        self.ids: Tensor
        self.output_bias: Tensor | None
        self.register_buffer("ids", torch.tensor(list(ids)), persistent=False)
        self.register_buffer("output_bias", output_bias, persistent=False)
        self.vocab_size = vocab_size
        self.embed_scale = embed_scale
        self.size = max(vocab_size, max(ids) + 1)
        # On the host, so that no step has to wait for the device to read them.
        self._id_list = list(ids)

    @property
    def tied(self) -> bool:
        """Whether input and output share one set of embeddings."""
        return self.output_embeddings is None

    def head(self) -> AddedTokenHead:
        """Return the rows of the LM head, for the loss and the logits."""
        weight = self.input_embeddings if self.output_embeddings is None else self.output_embeddings
        return AddedTokenHead(weight, self.output_bias, self.ids, self.size, self._id_list[0] < self.vocab_size)

    def known_ids(self, ids: Tensor) -> Tensor:
        """Return the ids with added tokens replaced by 0, which is in every vocabulary."""
        return torch.where(self._matches(ids).any(-1), 0, ids)

    def embed(self, ids: Tensor, embedded: Tensor) -> Tensor:
        """Return the model's embeddings with those of added tokens put in.

        Args:
            ids: int64, shape (B, T), as the caller gave them.
            embedded: the model's embeddings of `known_ids(ids)`, float, shape (B, T, E).
        """
        matches = self._matches(ids)
        scaled = self.input_embeddings.to(embedded.dtype) * self.embed_scale
        return torch.where(matches.any(-1, keepdim=True), F.embedding(matches.int().argmax(-1), scaled), embedded)

    def add_logits(self, hidden: Tensor, logits: Tensor) -> Tensor:
        """Return the model's logits with those of added tokens: shape (..., V) to (..., size)."""
        head = self.head()
        added = F.linear(
            hidden, head.weight.to(hidden.dtype), None if head.bias is None else head.bias.to(hidden.dtype)
        )
        if self._id_list == list(range(self.vocab_size, self.size)):
            return torch.cat([logits, added.to(logits.dtype)], dim=-1)
        padded = F.pad(logits, (0, self.size - self.vocab_size), value=torch.finfo(logits.dtype).min)
        return padded.index_copy(-1, head.ids, added.to(logits.dtype))

    def _matches(self, ids: Tensor) -> Tensor:
        return torch.eq(ids.unsqueeze(-1), self.ids)


def register_hooks(model: PreTrainedModel, added: AddedTokenEmbeddings) -> None:
    """Hook the added tokens around the model's embedding and LM head, for training and generation."""
    embedding = model.get_input_embeddings()
    model.add_module(MODULE_NAME, added)
    # The embedding layer gets other ids than its caller gave, so the hook behind it reads the original ones from here.
    original_ids: list[Tensor] = []

    def replace_ids(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        ids = args[0] if args else kwargs["input"]
        original_ids.append(ids)
        known = added.known_ids(ids)
        return ((known, *args[1:]), kwargs) if args else (args, {**kwargs, "input": known})

    def insert_embeddings(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return added.embed(original_ids.pop(), output)

    embedding.register_forward_pre_hook(replace_ids, with_kwargs=True)
    embedding.register_forward_hook(insert_embeddings)
    head = model.get_output_embeddings()
    head.register_forward_hook(lambda module, args, logits: added.add_logits(args[0], logits))


def find_added_tokens(model: nn.Module) -> AddedTokenEmbeddings | None:
    """Return the model's added tokens, inside any wrappers; None if it has none."""
    return next((module for module in model.modules() if isinstance(module, AddedTokenEmbeddings)), None)


def unfreeze_added_tokens(model: nn.Module) -> None:
    """Make the model's added tokens trainable again. PEFT freezes every parameter that it did not add itself."""
    added = find_added_tokens(model)
    if added is not None:
        added.requires_grad_(True)


@dataclass(frozen=True, slots=True)
class EmbeddingSnapshot:
    """Embeddings of added tokens at one time, float32.

    Attributes:
        input: shape (n, E).
        output: shape (n, H); None if the head is tied.
        bias: shape (n,); None if the head has no bias, or where the bias does not change.
    """

    input: Tensor
    output: Tensor | None
    bias: Tensor | None


def is_tied(model: "PreTrainedModel") -> bool:
    """Return whether the LM head's weight is the embedding's."""
    return same_storage(model.get_input_embeddings().weight, model.get_output_embeddings().weight)


def initial_embeddings(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", tokens: Sequence[NewToken], how: str
) -> EmbeddingSnapshot:
    """Compute initial embeddings of tokens from those that the model has.

    Args:
        how: a value of `chat.new_token_init`: `mean` of all trained embeddings (Hewitt, 2021), `description` for the
            mean over the words that describe the token, or `zeros`.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = is_tied(model)
    with gathered(parameter for parameter in (embedding.weight, head.weight, head.bias) if parameter is not None):
        size = embedding.weight.shape[0]
        words = [_description_ids(tokenizer, token, size) for token in tokens] if how == "description" else None
        return EmbeddingSnapshot(
            _initial_rows(embedding.weight, len(tokens), how, words),
            None if tied else _initial_rows(head.weight, len(tokens), how, words),
            # transformers gives the bias of an added row the mean too, so that a stock resize agrees.
            None if head.bias is None else head.bias.detach().float().mean().repeat(len(tokens)),
        )


def attach_added_tokens(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", tokens: Sequence[NewToken], how: str
) -> None:
    """Attach trainable embeddings to a frozen model (adapter methods). Its vocabulary is not resized."""
    if not tokens:
        return
    vocab_size = vocabulary_size(model)
    ids, initial = _ids_and_embeddings(model, tokenizer, tokens, how, vocab_size)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    bias = initial.bias
    if bias is not None:
        # Ids that the model already has keep the model's bias.
        known = [index for index, token_id in enumerate(ids) if token_id < vocab_size]
        with gathered([head.bias]):
            bias[known] = head.bias.detach().float()[[ids[index] for index in known]].to(bias.device)
    scale = float(getattr(embedding, "embed_scale", 1.0))
    added = AddedTokenEmbeddings(ids, initial.input, initial.output, bias, vocab_size, scale)
    register_hooks(model, added.to(embedding.weight.device))


def resize_embeddings(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", tokens: Sequence[NewToken], how: str
) -> None:
    """Resize the model's vocabulary for the tokens and write their initial embeddings (full fine-tuning)."""
    if not tokens:
        return
    vocab_size = vocabulary_size(model)
    ids, initial = _ids_and_embeddings(model, tokenizer, tokens, how, vocab_size)
    size = ids[-1] + 1
    if size > vocab_size:
        model.resize_token_embeddings(size, mean_resizing=False)
    index = torch.tensor(ids)
    head = model.get_output_embeddings()
    _write_rows(model.get_input_embeddings().weight, index, initial.input)
    if initial.output is not None:
        _write_rows(head.weight, index, initial.output)
    if initial.bias is not None and size > vocab_size:
        _write_rows(head.bias, index, initial.bias)


def snapshot_embeddings(model: "PreTrainedModel", tokens: Sequence[NewToken]) -> EmbeddingSnapshot | None:
    """Return the tokens' current embeddings, float32 on the CPU; None without tokens.

    Every process must call it.
    """
    if not tokens:
        return None
    added = find_added_tokens(model)
    if added is not None:
        ids = added.ids.tolist()
        rows = [ids.index(token.id) for token in tokens]
        output = None if added.output_embeddings is None else full_tensor(added.output_embeddings).float()[rows]
        return EmbeddingSnapshot(full_tensor(added.input_embeddings).float()[rows], output, None)
    index = torch.tensor([token.id for token in tokens])
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    output = None if is_tied(model) else _read_rows(head.weight, index)
    return EmbeddingSnapshot(_read_rows(embedding.weight, index), output, None)


def l2_distance(before: EmbeddingSnapshot, after: EmbeddingSnapshot) -> tuple[list[float], list[float]]:
    """Return the L2 distance of each input and of each output embedding; the same list twice if they are tied."""
    inputs = (after.input - before.input).norm(dim=-1).tolist()
    if before.output is None or after.output is None:
        return inputs, inputs
    return inputs, (after.output - before.output).norm(dim=-1).tolist()


def vocabulary_size(model: "PreTrainedModel") -> int:
    """Return the number of rows of the model's embedding."""
    return unsharded_shape(model.get_input_embeddings().weight)[0]


def _ids_and_embeddings(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    tokens: Sequence[NewToken],
    how: str,
    vocab_size: int,
) -> tuple[list[int], EmbeddingSnapshot]:
    """Return the ids that need embeddings, ascending, and their initial embeddings."""
    tokens = _with_gaps_filled(tokenizer, tokens, vocab_size)
    return [token.id for token in tokens], initial_embeddings(model, tokenizer, tokens, how)


def _with_gaps_filled(
    tokenizer: "PreTrainedTokenizerBase", tokens: Sequence[NewToken], vocab_size: int
) -> list[NewToken]:
    """Return the tokens and all ids between the model's vocabulary and the last of them, ascending.

    Some tokenizers have tokens for which their model has no embedding. A resize would give these ids random embeddings
    that differ at every load.
    """
    by_id = {token.id: token for token in tokens}
    for token_id in range(vocab_size, max(by_id)):
        if token_id not in by_id:
            by_id[token_id] = NewToken(str(tokenizer.convert_ids_to_tokens(token_id)), token_id)
    return [by_id[token_id] for token_id in sorted(by_id)]


def _initial_rows(weight: Tensor, count: int, how: str, words: list[list[int]] | None) -> Tensor:
    """Return `count` initial rows of an embedding or LM head: float32, shape (count, width).

    Args:
        words: for `description`, the ids of each token's words.
    """
    if how == "zeros":
        return torch.zeros(count, weight.shape[1], device=weight.device)
    if words is not None:
        return torch.stack([weight.detach()[ids].float().mean(0) for ids in words])
    # Padded vocabularies end in rows of zeros that were never trained.
    total = torch.zeros(weight.shape[1], device=weight.device)
    trained = 0
    for block in weight.detach().split(_MEAN_BLOCK):
        total += block.float().sum(0)
        trained += int((block != 0).any(-1).sum())
    return (total / max(1, trained)).repeat(count, 1)


def _description_ids(tokenizer: "PreTrainedTokenizerBase", token: NewToken, vocab_size: int) -> list[int]:
    words = token.description or " ".join(re.findall(r"[^\W_]+", token.token)) or token.token
    ids = tokenizer.encode(words, add_special_tokens=False)
    return [token_id for token_id in ids if token_id < vocab_size]


def _write_rows(parameter: nn.Parameter, index: Tensor, values: Tensor) -> None:
    with gathered([parameter], write=True), torch.no_grad():
        parameter[index.to(parameter.device)] = values.to(parameter)


def _read_rows(parameter: nn.Parameter, index: Tensor) -> Tensor:
    with gathered([parameter]):
        return parameter.detach()[index.to(parameter.device)].float().cpu().clone()
