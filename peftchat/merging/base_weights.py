"""The weights of a checkpoint by the names of the model's parameters.

Most tensors are one parameter, under the same name or one with another prefix. Since version 5 transformers also fuses
tensors when it loads (the experts of a mixture become one stack) and splits them when it saves. Its own conversion
table is used for both, so a merged checkpoint has the tensor names of its base.
"""

from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch

from peftchat.errors import UserError
from peftchat.merging.empty_model import EmptyModel
from peftchat.models.safetensors_files import SafetensorsCheckpoint, TensorEntry, read_rows


@dataclass(frozen=True)
class Fusion:
    """Several tensors of the checkpoint that become one or more parameters.

    Attributes:
        keys: the tensors, in the order of their numbers.
        parameters: the parameters that they become.
    """

    keys: tuple[str, ...]
    parameters: tuple[str, ...]
    _model: Any = field(repr=False)
    _converter: Any = field(repr=False)
    _first: str
    _renamed: tuple[tuple[str, str], ...] = field(repr=False)

    def fuse(self, read: Callable[[str], torch.Tensor]) -> dict[str, torch.Tensor]:
        """Read every tensor and build the parameters, in the stored dtype."""
        converter = deepcopy(self._converter)
        for key, (renamed, pattern) in zip(self.keys, self._renamed, strict=True):
            converter.add_tensor(renamed, key, pattern, read(key))
        made = converter.convert(self._first, model=self._model, config=self._model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}

    def split(self, parameters: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Split parameters into the tensors of the checkpoint."""
        from transformers.core_model_loading import revert_weight_conversion

        tensors = revert_weight_conversion(self._model, parameters)
        if set(tensors) != set(self.keys):
            raise UserError(
                f"transformers does not split {self.parameters[0]} into the tensors that it was fused from",
                hint="Save the base once with transformers' save_pretrained and merge into that.",
            )
        return {name: tensor.contiguous() for name, tensor in tensors.items()}


@dataclass(frozen=True)
class TensorMap:
    """The tensors of a checkpoint matched with the parameters of a model.

    Attributes:
        parameter_of: checkpoint name -> parameter name, where one tensor is one parameter.
        key_of: parameter name -> checkpoint name, likewise.
        fusion_of: checkpoint name or parameter name -> the fusion it belongs to.
        unused: tensors that the model does not load.
    """

    parameter_of: dict[str, str]
    key_of: dict[str, str]
    fusion_of: dict[str, Fusion]
    unused: tuple[str, ...]


def match_tensors(checkpoint: SafetensorsCheckpoint, empty_model: EmptyModel) -> TensorMap:
    """Match the checkpoint's tensors with the model's parameters.

    Raises:
        UserError: a parameter of the model is in no shard, or a shape differs. Embeddings of the model may have more
            rows than those of the checkpoint.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import PrefixChange, WeightConverter, WeightRenaming, rename_source_key

    model = empty_model.model
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    state = model.state_dict()
    one: dict[str, str] = {}
    groups: dict[str, list[tuple[str, str, str]]] = {}
    unused = []
    names = {
        key: rename_source_key(key, renamings, converters, model.base_model_prefix, state)
        for key in sorted(checkpoint.entries, key=_natural)
    }
    # Going back, transformers adds a prefix again only if it was there: names above mark what they used.
    mapping = [entry for entry in mapping if not isinstance(entry, PrefixChange) or entry.was_used()]
    stored = {name for name, _ in names.values()}
    # Where the files hold the tied side alone, transformers takes the weight from there.
    owners = {tied: owner for tied, owner in empty_model.ties.items() if owner not in stored}
    for key, (name, pattern) in names.items():
        if name in owners and owners[name] not in one.values():
            one[key] = owners[name]
        elif name in empty_model.ties or name not in state:
            unused.append(key)
        elif pattern is None or key in state:
            one[key] = key if key in state else name
        else:
            groups.setdefault(name, []).append((key, name, pattern))
    fusion_of: dict[str, Fusion] = {}
    for first, members in groups.items():
        fusion = _fusion(model, first, members, by_pattern[members[0][2]], state, mapping)
        fusion_of.update(dict.fromkeys((*fusion.keys, *fusion.parameters), fusion))
    tensor_map = TensorMap(one, {name: key for key, name in one.items()}, fusion_of, tuple(unused))
    _check(tensor_map, checkpoint, empty_model)
    return tensor_map


def _fusion(
    model: Any, first: str, members: list[tuple[str, str, str]], converter: Any, state: dict[str, Any], mapping: Any
) -> Fusion:
    model._weight_conversions = mapping
    keys = tuple(key for key, _, _ in members)
    renamed = tuple((name, pattern) for _, name, pattern in members)
    # One converter may make several parameters; their names differ in the pattern's last part only.
    stem = first
    for pattern in converter.target_patterns:
        stem = stem.removesuffix(pattern)
    parameters = tuple(name for name in (stem + pattern for pattern in converter.target_patterns) if name in state)
    return Fusion(keys, parameters or (first,), model, converter, first, renamed)


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]


def _check(tensor_map: TensorMap, checkpoint: SafetensorsCheckpoint, empty_model: EmptyModel) -> None:
    for name, slot in empty_model.slots.items():
        if name in tensor_map.fusion_of or name in empty_model.ties:
            continue
        if name not in tensor_map.key_of:
            raise UserError(f"the base has no tensor for {name}", where=str(checkpoint.folder))
        shape = checkpoint.entries[tensor_map.key_of[name]].shape
        if tuple(slot.shape[1:]) != shape[1:] or (slot.shape and shape[0] > slot.shape[0]):
            raise UserError(
                f"{name} has the shape {list(shape)}, expected {list(slot.shape)} by config.json",
                where=str(checkpoint.folder),
            )


RoundTrip = Callable[[torch.Tensor], torch.Tensor]
"""A parameter's stored weights -> the weights as they were in training (same shape and dtype)."""

_BLOCK_BYTES = 64 << 20


class BaseWeights:
    """Reads the weights of a model's parameters from a checkpoint.

    Rows that the model has in addition to the checkpoint (a larger vocabulary) are the mean of the checkpoint's rows.

    Args:
        checkpoint: the stored weights.
        empty_model: the model with the parameters.
        round_trip: the effect of quantization on the base in training, by parameter; None for the stored base.
    """

    def __init__(
        self,
        checkpoint: SafetensorsCheckpoint,
        empty_model: EmptyModel,
        *,
        round_trip: Mapping[str, RoundTrip] | None = None,
    ) -> None:
        self.checkpoint = checkpoint
        self.empty_model = empty_model
        self.tensor_map: TensorMap = match_tensors(checkpoint, empty_model)
        self._round_trip = round_trip or {}
        self._means: dict[str, torch.Tensor] = {}
        self._last: tuple[str, torch.Tensor] | None = None

    def source(self, name: str) -> str:
        """Return the parameter that holds the weight of `name`: itself, or the one it is tied to."""
        return self.empty_model.ties.get(name, name)

    @property
    def round_tripped(self) -> frozenset[str]:
        """The parameters that were quantized in training."""
        return frozenset(self._round_trip)

    def can_read_rows(self, name: str) -> bool:
        """Return whether rows can be read without the complete parameter in memory."""
        return name not in self._round_trip and name not in self.tensor_map.fusion_of

    def dtype(self, name: str) -> torch.dtype:
        """Return the stored dtype of a parameter."""
        name = self.source(name)
        fusion = self.tensor_map.fusion_of.get(name)
        key = fusion.keys[0] if fusion else self.tensor_map.key_of[name]
        return self.checkpoint.entries[key].dtype

    def rows(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Read rows of a parameter in its stored dtype; a tied name reads the parameter it is tied to."""
        name = self.source(name)
        if not self.can_read_rows(name):
            return self._full_weight(name)[start:stop]
        return self._stored_rows(name, start, self.empty_model.slots[name].shape[0] if stop is None else stop)

    def _stored_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        entry = self.checkpoint.entries[self.tensor_map.key_of[name]]
        if not entry.shape or stop <= entry.rows:
            return read_rows(entry, start, stop if entry.shape else None)
        old = read_rows(entry, start, entry.rows) if start < entry.rows else None
        count = stop - max(start, entry.rows)
        new = self._mean(entry).expand(count, *entry.shape[1:])
        return new.contiguous() if old is None else torch.cat([old, new])

    def _full_weight(self, name: str) -> torch.Tensor:
        # A layer's weights are read block after block: only the last parameter is kept.
        if self._last is None or self._last[0] != name:
            self._last = None
            self._last = (name, self._read_full(name))
        return self._last[1]

    def _read_full(self, name: str) -> torch.Tensor:
        fusion = self.tensor_map.fusion_of.get(name)
        if fusion is not None:
            return fusion.fuse(lambda key: read_rows(self.checkpoint.entries[key]))[name]
        stored = self._stored_rows(name, 0, self.empty_model.slots[name].shape[0])
        return self._round_trip[name](stored) if name in self._round_trip else stored

    def release(self) -> None:
        """Release the memory of the parameter that was read last."""
        self._last = None

    def _mean(self, entry: TensorEntry) -> torch.Tensor:
        if entry.name not in self._means:
            total = torch.zeros(entry.shape[1:], dtype=torch.float64)
            for block in blocks(entry.rows, entry.bytes // entry.rows, _BLOCK_BYTES // 8):
                total += read_rows(entry, *block).to(torch.float64).sum(0)
            self._means[entry.name] = (total / entry.rows).to(entry.dtype)
        return self._means[entry.name]


def blocks(rows: int, row_bytes: int, budget: int) -> Iterator[tuple[int, int]]:
    """Split `rows` rows of `row_bytes` bytes into ranges of at most `budget` bytes and at least one row."""
    step = max(1, budget // max(1, row_bytes))
    return ((start, min(start + step, rows)) for start in range(0, rows, step))
