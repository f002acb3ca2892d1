"""Counting tokens with nothing but a tokenizer's file."""

from collections.abc import Sequence
from pathlib import Path

from peftchat.errors import UserError

_FILE = "tokenizer.json"


def has_tokenizer(folder: str) -> bool:
    """Whether the folder holds a tokenizer that can be counted with."""
    return (Path(folder).expanduser() / _FILE).is_file()


class FileTokenCounter:
    """Counts the tokens of texts, without special tokens.

    Args:
        folder: of a model or tokenizer, with its `tokenizer.json`.

    Raises:
        InputError: there is none, or it cannot be read.
    """

    def __init__(self, folder: str) -> None:
        from tokenizers import Tokenizer

        if not has_tokenizer(folder):
            raise UserError(
                f"the folder has no {_FILE}",
                where=f"--tokenizer {folder}",
                cure="Give a model's folder, or save its tokenizer there with transformers' `save_pretrained`.",
            )
        try:
            self._tokenizer: Tokenizer = Tokenizer.from_file(str(Path(folder).expanduser() / _FILE))
        except Exception as error:  # the library raises nothing narrower
            raise UserError(f"the tokenizer cannot be read: {error}", where=f"--tokenizer {folder}") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()

    def __call__(self, texts: Sequence[str]) -> list[int]:
        """The number of tokens of each text."""
        return [len(item) for item in self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]
