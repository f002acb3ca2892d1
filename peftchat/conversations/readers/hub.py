"""Data sets of the Hugging Face Hub, streamed through `datasets`."""

from collections.abc import Iterator

from peftchat.conversations.problems import ProblemLog, RawRecord
from peftchat.errors import UserError

_TIMEOUT = 20.0


def read_hub(name: str, split: str | None, problems: ProblemLog) -> Iterator[RawRecord]:
    """The records of split `split` (default `train`) of the hub data set `name`; `where` is `name/split:record`.

    Raises:
        UserError: the data set or the split cannot be had: offline, private, misspelt.
    """
    import datasets
    import huggingface_hub

    split = split or "train"
    try:
        # Asked first because it fails at once where `datasets` repeats its requests for half a minute.
        huggingface_hub.dataset_info(name, timeout=_TIMEOUT)
        records = iter(datasets.load_dataset(name, split=split, streaming=True))
        first = next(records, None)
    except Exception as error:
        # `datasets` lets a dozen unrelated types through: HTTP, file system, its own.
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"there is no such file or folder, and no hub data set could be opened: {reason}",
            where=f"{name} (split {split})",
            hint="Give the path of a file or folder, or check the hub id and the connection.",
        ) from error
    number = 0
    while first is not None:
        number += 1
        problems.records += 1
        yield RawRecord(f"{name}/{split}:{number}", first, None)
        first = next(records, None)
