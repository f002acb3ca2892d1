"""A base model that has learned to write: built on the spot, so that a clean clone tests what every other does.

A Llama of three layers and 169,000 parameters learns from stories that are made here.
"""

import hashlib
import random
from functools import cache
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

_WORDS = {
    "NAME": "Anna Ben Clara Tom Mia Leo Zoe Max Ella Sam Lily Jack",
    "ANIMAL": "cat dog bird fish horse mouse frog bear duck rabbit turtle squirrel",
    "THING": "ball book boat kite hat box cake lamp flower blanket basket drum",
    "PLACE": "park house river garden forest school market hill kitchen mountain bridge village",
    "LOOK": "big small red green old new happy quiet yellow funny brave sleepy",
    "DID": "found saw liked took wanted lost painted opened carried dropped washed hid",
    "WENT": "ran walked went jumped climbed swam flew hurried danced sailed marched crawled",
}
_SENTENCES = (
    "One day, NAME WENT to the PLACE.",
    "There NAME DID the LOOK THING and the LOOK ANIMAL.",
    "The LOOK ANIMAL DID the THING and WENT over the PLACE.",
    '"Where is my LOOK THING?" said NAME to the ANIMAL.',
    '"It is in the PLACE," said the ANIMAL.',
    "Then NAME and NAME WENT to the PLACE to find some water.",
    "They were LOOK, and the ANIMAL was LOOK too.",
)
_VOCABULARY = 512
_BATCH, _LENGTH, _STEPS = 8, 64, 120
_LEARNING_RATE = 4e-3


def stories(count: int = 1000) -> list[str]:
    """Return short stories, always the same ones."""
    pick = random.Random(0)
    words = {kind: words.split() for kind, words in _WORDS.items()}

    def sentence(pattern: str) -> str:
        for kind, choices in words.items():
            while kind in pattern:
                pattern = pattern.replace(kind, pick.choice(choices), 1)
        return pattern

    return [" ".join(sentence(pattern) for pattern in pick.sample(_SENTENCES, k=4)) for _ in range(count)]


@cache
def pretrained_model() -> Path:
    """Return the folder of the model with its tokenizer, built unless the cache has it; to be read alone."""
    versions = (torch.__version__, transformers.__version__, tokenizers.__version__)
    key = hashlib.sha256("\0".join((Path(__file__).read_text(encoding="utf-8"), *versions)).encode()).hexdigest()[:16]
    folder = CACHE / key
    CACHE.mkdir(parents=True, exist_ok=True)
    # Other processes wait for the one that builds.
    with FileLock(CACHE / f"{key}.lock"):
        if not folder.is_dir():
            with TemporaryDirectory(dir=CACHE) as unfinished:
                model = _build(Path(unfinished) / "model")
                model.rename(folder)
    return folder


def _build(folder: Path) -> Path:
    texts = stories()
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
    return folder


def _train(ids: torch.Tensor) -> LlamaForCausalLM:
    """Train a model from scratch on random excerpts of a text."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=_VOCABULARY,
            hidden_size=64,
            intermediate_size=172,
            num_hidden_layers=3,
            num_attention_heads=8,
            num_key_value_heads=4,
            max_position_embeddings=512,
            rms_norm_eps=1e-5,
            tie_word_embeddings=True,
            bos_token_id=1,
            eos_token_id=2,
        )
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=_LEARNING_RATE, weight_decay=0.1)
    for step in range(_STEPS):
        for group in optimizer.param_groups:
            group["lr"] = _LEARNING_RATE * min((step + 1) / 10, (_STEPS - step) / 50, 1.0)
        begin = torch.randint(len(ids) - _LENGTH, (_BATCH, 1))
        excerpts = ids[begin + torch.arange(_LENGTH)]
        model(input_ids=excerpts, labels=excerpts).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()
