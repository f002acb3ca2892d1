"""Data sets of the Hugging Face Hub, streamed through `datasets`."""

from collections.abc import Iterator
from typing import Any

from peftchat.conversations.problems import ProblemLog, RawRecord
from peftchat.errors import UserError

_TIMEOUT = 20.0


def read_hub(
    name: str, split: str | None, problems: ProblemLog, *, subset: str | None = None, revision: str | None = None
) -> Iterator[RawRecord]:
    """The records of a hub data set; `where` is `name/split:record`, with the subset behind the name if there is one.

    Args:
        name: of the data set.
        split: `train` if it is not given.
        problems: where records are counted, and the commit that was read is noted.
        subset: of a data set that has several; `datasets` calls it `name`.
        revision: branch, tag or commit; the main branch if it is not given.

    Raises:
        UserError: the data set, the subset, the revision or the split cannot be had: offline, private, misspelt.
    """
    import huggingface_hub

    split = split or "train"
    try:
        # Asked first because it fails at once where `datasets` repeats its requests for half a minute.
        commit = huggingface_hub.dataset_info(name, revision=revision, timeout=_TIMEOUT).sha
        # A branch may move on between two questions, so the records are those of the commit.
        records = iter(open_dataset(name, split, subset, commit))
        first = next(records, None)
    except Exception as error:
        # `datasets` lets a dozen unrelated types through: HTTP, file system, its own.
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        parts = [f"split {split}"]
        parts += [f"subset {subset}"] if subset else []
        parts += [f"revision {revision}"] if revision else []
        what = "there is no such file or folder, and no hub data set could be opened"
        hint = "Give the path of a file or folder, or check the hub id and the connection."
        if "Config name is missing" in str(error):
            hint = f"Choose one of the subsets: {_subsets(str(error))}"
        raise UserError(f"{what}: {reason}", where=f"{name} ({', '.join(parts)})", hint=hint) from error
    problems.commits[name] = str(commit)
    place = "/".join(part for part in (name, subset, split) if part)
    number = 0
    while first is not None:
        number += 1
        problems.records += 1
        yield RawRecord(f"{place}:{number}", first, None)
        first = next(records, None)


def open_dataset(name: str, split: str, subset: str | None, revision: str | None) -> Any:
    """The records of a data set, streamed; `name` may also be a folder with a builder's files."""
    import datasets

    return datasets.load_dataset(name, name=subset, split=split, revision=revision, streaming=True)


def _subsets(message: str) -> str:
    """The names in the message of `datasets`: `Please pick one among the available configs: ['main', 'socratic']`."""
    names = message.partition("available configs: [")[2].partition("]")[0].replace("'", "")
    return f"`subset: NAME`, with NAME one of {names}." if names else "`subset: NAME`."
