"""GGUF export: write a model as one file, tensor by tensor, and verify it."""

import importlib.util
import logging
import os
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from peftchat.errors import UserError, VerificationError
from peftchat.export.architectures import Architecture, architecture_of, rope_factors
from peftchat.export.export_source import ExportSource
from peftchat.export.vocabulary import read_vocabulary
from peftchat.merging.byte_progress import ByteProgress
from peftchat.models.safetensors_files import SafetensorsCheckpoint, TensorEntry, read_rows

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType, GGUFWriter
    from transformers import PreTrainedTokenizerBase

STORED = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}
"""Stored dtype -> the GGUF type that keeps it."""

TYPES = (*STORED.values(), "q8_0")
"""Types of the weight matrices; vectors are always written as float32, in which llama.cpp adds and scales."""

_POSITIONS = "position_embd.weight"
_GENERATION_TAG = re.compile(r"\{%([-+]?)\s*(end)?generation\s*([-+]?)%\}")


@dataclass(frozen=True, slots=True)
class _Tensor:
    """A tensor of the file.

    Attributes:
        name: its name in GGUF.
        source: its name in the checkpoint.
        shape: its shape in elements.
        kind: its GGUF type.
        bytes: its size in the file.
        entry: its entry in the checkpoint; None for a computed tensor.
        values: the elements of a computed tensor.
    """

    name: str
    source: str
    shape: tuple[int, ...]
    kind: "GGMLQuantizationType"
    bytes: int
    entry: TensorEntry | None
    values: np.ndarray | None = None


@dataclass(frozen=True, slots=True)
class WrittenGguf:
    """A finished file.

    Attributes:
        path: the file.
        type: type of its matrices.
        tensors: number of tensors.
        bytes: size of the file.
        adds_bos: whether llama.cpp adds the BOS token before a text.
    """

    path: Path
    type: str
    tensors: int
    bytes: int
    adds_bos: bool


def require_gguf() -> None:
    """Check that the `gguf` library is installed.

    Raises:
        UserError: it is not installed.
    """
    if importlib.util.find_spec("gguf") is None:
        raise UserError(
            "writing GGUF needs the package gguf, which is not installed",
            hint="Install it: pip install 'peftchat[gguf]'.",
        )


def write_gguf(source: ExportSource, path: Path, type_name: str | None = None) -> WrittenGguf:
    """Write `path` from a model; at most one matrix is in memory at a time.

    Args:
        path: the file; it appears when it is complete and verified.
        type_name: one of `TYPES`; None keeps the weights as they are stored.

    Raises:
        UserError: llama.cpp does not support the architecture or the tokenizer, or the library is not installed.
        VerificationError: the file differs from what was written.
    """
    require_gguf()
    tokenizer = source.model.tokenizer()
    # Checked before a merge or a download, which may take long.
    architecture = architecture_of(source.model.config().get_text_config(), source.model.where)
    read_vocabulary(tokenizer, len(tokenizer), source.model.where)
    full_model = source.full_model()
    config, checkpoint = full_model.config().get_text_config(), SafetensorsCheckpoint.open(full_model.path)
    type_name = type_name or _stored_type(checkpoint)
    tensors = list(_tensors(checkpoint, config, architecture, type_name))
    adds_bos = _adds_bos(tokenizer)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, GGUFWriter

    logging.getLogger("gguf").setLevel(logging.WARNING)
    writer = GGUFWriter(temporary, MODEL_ARCH_NAMES[MODEL_ARCH[architecture.arch]])
    _write_metadata(writer, source.name, type_name)
    architecture.write_metadata(writer, config)
    rows = next(tensor.shape[0] for tensor in tensors if tensor.name == "token_embd.weight")
    writer.add_vocab_size(rows)
    read_vocabulary(tokenizer, rows, source.model.where).write(writer)
    _write_special_ids(writer, tokenizer, adds_bos=adds_bos)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        digests = _write_tensors(writer, tensors, config, architecture)
        check_gguf(temporary, digests)
        temporary.replace(path)
    except OSError as error:
        raise UserError(f"cannot write: {error.strerror or error}", where=str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)
    return WrittenGguf(path, type_name, len(tensors), path.stat().st_size, adds_bos)


def check_gguf(path: Path, digests: dict[str, int]) -> None:
    """Check that a file has every tensor with the expected bytes.

    Args:
        digests: CRC-32 of each tensor's bytes by name.

    Raises:
        VerificationError: names the first tensor that differs.
    """
    from gguf import GGUFReader

    found = {tensor.name: tensor for tensor in GGUFReader(path).tensors}
    for name in sorted(digests.keys() | found.keys()):
        if name not in found or name not in digests or _digest(found[name].data) != digests[name]:
            raise VerificationError(f"{path}: the tensor {name} differs from what was written")


def _stored_type(checkpoint: SafetensorsCheckpoint) -> str:
    largest = max(checkpoint.entries.values(), key=lambda entry: entry.bytes)
    return STORED.get(largest.dtype, "f16")


def _tensors(
    checkpoint: SafetensorsCheckpoint, config: Any, architecture: Architecture, type_name: str
) -> Iterator[_Tensor]:
    from gguf import MODEL_ARCH, GGMLQuantizationType, get_tensor_name_map

    names = get_tensor_name_map(MODEL_ARCH[architecture.arch], config.num_hidden_layers)
    for entry in checkpoint.entries.values():
        if entry.name.endswith(".rotary_emb.inv_freq") or (
            config.tie_word_embeddings and entry.name == "lm_head.weight"
        ):
            continue
        name = names.get_name(entry.name, try_suffixes=(".weight", ".bias"))
        if name is None:
            raise UserError(f"llama.cpp has no tensor for the weight {entry.name}", where=str(entry.file))
        kind = _kind(name, entry.shape, type_name)
        yield _Tensor(name, entry.name, entry.shape, kind, _size(entry.shape, kind), entry)
    factors = rope_factors(config)
    if factors is not None:
        kind = GGMLQuantizationType.F32
        yield _Tensor("rope_freqs.weight", "", factors.shape, kind, factors.nbytes, None, factors)


def _kind(name: str, shape: tuple[int, ...], type_name: str) -> "GGMLQuantizationType":
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    if len(shape) < 2 or name == _POSITIONS:
        return GGMLQuantizationType.F32
    kind = GGMLQuantizationType[type_name.upper()]
    # A row must consist of complete blocks.
    return kind if shape[-1] % GGML_QUANT_SIZES[kind][0] == 0 else GGMLQuantizationType.F16


def _size(shape: tuple[int, ...], kind: "GGMLQuantizationType") -> int:
    from gguf import GGML_QUANT_SIZES

    block, size = GGML_QUANT_SIZES[kind]
    return int(np.prod(shape, dtype=np.int64)) // block * size


_WRITTEN_BY = "peftchat.version"
_START = 4096


def is_own_gguf(path: Path) -> bool:
    """Return whether an export wrote a GGUF file: the key of its metadata is among the first."""
    with path.open("rb") as file:
        start = file.read(_START)
    return start.startswith(b"GGUF") and _WRITTEN_BY.encode() in start


def _write_metadata(writer: "GGUFWriter", name: str, type_name: str) -> None:
    from gguf import GGML_QUANT_VERSION, GGUFType, LlamaFileType

    names = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "bf16": "MOSTLY_BF16", "q8_0": "MOSTLY_Q8_0"}
    writer.add_string(_WRITTEN_BY, version("peftchat"))
    writer.add_type(GGUFType.MODEL)
    writer.add_name(name)
    writer.add_file_type(LlamaFileType[names[type_name]])
    writer.add_quantization_version(GGML_QUANT_VERSION)


def _write_special_ids(writer: "GGUFWriter", tokenizer: "PreTrainedTokenizerBase", *, adds_bos: bool) -> None:
    writer.add_add_bos_token(adds_bos)
    for add, token_id in (
        (writer.add_bos_token_id, tokenizer.bos_token_id),
        (writer.add_eos_token_id, tokenizer.eos_token_id),
        (writer.add_pad_token_id, tokenizer.pad_token_id),
        (writer.add_unk_token_id, tokenizer.unk_token_id),
    ):
        if token_id is not None:
            add(token_id)
    if tokenizer.chat_template:
        writer.add_chat_template(_plain_jinja(str(tokenizer.chat_template)))


def _plain_jinja(template: str) -> str:
    """Remove the generation tags from a template.

    They change no text, and some engines do not support them.
    """
    return _GENERATION_TAG.sub(
        lambda match: f"{{%{match[1]} {'endif' if match[2] else 'if true'} {match[3]}%}}", template
    )


def _adds_bos(tokenizer: "PreTrainedTokenizerBase") -> bool:
    """Return whether a text begins with the BOS token.

    The chat template decides, if there is one.
    """
    bos = tokenizer.bos_token
    if bos is None:
        return False
    if not tokenizer.chat_template:
        return bool(tokenizer("a").input_ids[0] == tokenizer.bos_token_id)
    messages = [{"role": role, "content": "a"} for role in ("user", "assistant", "user")]
    text = str(tokenizer.apply_chat_template(messages, tokenize=False))
    # A token that opens every turn does not mark the beginning of the text.
    return text.startswith(str(bos)) and text.count(str(bos)) == 1


def _write_tensors(
    writer: "GGUFWriter", tensors: list[_Tensor], config: Any, architecture: Architecture
) -> dict[str, int]:
    digests = {}
    for tensor in tensors:
        # The shape of a quantized tensor is given in elements, since its type is given.
        writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), tensor.bytes, raw_dtype=tensor.kind)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        with ByteProgress("Writing", sum(tensor.bytes for tensor in tensors)) as progress:
            for tensor in tensors:
                data = _converted(tensor, config, architecture)
                writer.write_tensor_data(data)
                digests[tensor.name] = _digest(data)
                progress.advance(data.nbytes)
        writer.flush()
    finally:
        writer.close()
    return digests


def _converted(tensor: _Tensor, config: Any, architecture: Architecture) -> np.ndarray:
    from gguf import quantize

    if tensor.entry is None:
        assert tensor.values is not None
        return tensor.values
    weight = architecture.reorder_heads(tensor.source, read_rows(tensor.entry), config)
    data: np.ndarray = quantize(weight.to(torch.float32).contiguous().numpy(), tensor.kind)
    if data.dtype == np.float16 and not np.isfinite(data).all():
        raise UserError(
            f"{tensor.source} has values outside the range of float16", where="--type", hint="Use --type bf16."
        )
    return np.ascontiguousarray(data)


def _digest(data: np.ndarray) -> int:
    return zlib.crc32(np.ascontiguousarray(data).reshape(-1).view(np.uint8).data)
