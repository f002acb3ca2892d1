"""A base model that has learned some English: built on the spot, so that a clean clone tests what every other does.

A Llama of 260,032 parameters, of the shape of stories260K, learns from docstrings of Python's standard library.
"""

import hashlib
import inspect
import math
import os
import platform
from collections.abc import Iterator
from functools import cache
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory

import tokenizers
import torch
import transformers
from filelock import FileLock
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tests.support.tokenizers import train_byte_level

CACHE = Path(__file__).resolve().parents[2] / ".cache" / "test-models"
"""Where the model stays between test runs, one folder per version of this file and of the libraries."""

_MODULES = (
    "argparse", "collections", "configparser", "copy", "csv", "datetime", "difflib", "fractions", "functools", "heapq",
    "inspect", "itertools", "json", "logging", "os.path", "pathlib", "random", "re", "shutil", "statistics", "string",
    "subprocess", "textwrap", "threading", "typing", "unittest", "urllib.parse", "warnings", "zipfile",
)  # fmt: skip
_VOCABULARY = 512
_BATCH, _LENGTH, _STEPS = 16, 128, 120
_LEARNING_RATE = 4e-3


def docstrings() -> Iterator[str]:
    """Yield the docstrings of public functions, classes and methods of some standard modules, each once."""
    seen = set()
    for module in map(import_module, _MODULES):
        for name, value in sorted(vars(module).items()):
            if name.startswith("_") or not (inspect.isclass(value) or inspect.isroutine(value)):
                continue
            members = vars(value).items() if inspect.isclass(value) else ()
            for part in (value, *(member for key, member in sorted(members) if inspect.isroutine(member))):
                text = inspect.getdoc(part)
                if text and text not in seen:
                    seen.add(text)
                    yield text


@cache
def pretrained_model() -> Path:
    """Return the folder of the model with its tokenizer, built unless the cache has it; to be read alone."""
    versions = (platform.python_version(), torch.__version__, transformers.__version__, tokenizers.__version__)
    key = hashlib.sha256("\0".join((Path(__file__).read_text(encoding="utf-8"), *versions)).encode()).hexdigest()[:16]
    folder = CACHE / key
    if folder.is_dir():
        return folder
    CACHE.mkdir(parents=True, exist_ok=True)
    # Other workers wait for the one that builds.
    with FileLock(CACHE / f"{key}.lock"):
        if not folder.is_dir():
            with TemporaryDirectory(dir=CACHE) as unfinished:
                _build(Path(unfinished) / "model")
                os.replace(Path(unfinished) / "model", folder)
    return folder


def _build(folder: Path) -> None:
    texts = list(docstrings())
    backend = train_byte_level(texts, _VOCABULARY, ["<unk>", "<s>", "</s>"])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>", model_max_length=512
    )
    tokenizer.save_pretrained(folder)
    ids = [id for text in texts for id in (tokenizer.bos_token_id, *tokenizer(text)["input_ids"])]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]):
            _train(torch.tensor(ids)).save_pretrained(folder)
    finally:
        torch.set_num_threads(threads)


def _train(ids: torch.Tensor) -> LlamaForCausalLM:
    """Train a model from scratch on random excerpts of a text."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=_VOCABULARY,
            hidden_size=64,
            intermediate_size=172,
            num_hidden_layers=5,
            num_attention_heads=8,
            num_key_value_heads=4,
            max_position_embeddings=512,
            rms_norm_eps=1e-5,
            tie_word_embeddings=True,
            bos_token_id=1,
            eos_token_id=2,
        )
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=_LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.1)
    for step in range(_STEPS):
        share = step / _STEPS
        for group in optimizer.param_groups:
            group["lr"] = _LEARNING_RATE * min(10 * share + 0.1, 0.5 + 0.5 * math.cos(math.pi * share))
        starts = torch.randint(len(ids) - _LENGTH, (_BATCH, 1))
        batch = ids[starts + torch.arange(_LENGTH)]
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()
