"""Push a run or a model to the hub, through huggingface_hub alone."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from peftchat.errors import UserError, first_line
from peftchat.publishing.push_files import PushFile, card_of, files_to_push
from peftchat.reports.model_card import read_card

if TYPE_CHECKING:
    from huggingface_hub import HfApi

_REPO = re.compile(r"[\w-][\w.-]*/[\w.-]+")


@dataclass(frozen=True)
class PushPlan:
    """What a push would do.

    Attributes:
        repo: the repository, `OWNER/NAME`.
        private: whether only its owner may read it.
        files: what is pushed.
        left: what of the folder stays here.
        card: the model card; None without one.
    """

    repo: str
    private: bool
    files: tuple[PushFile, ...]
    left: tuple[str, ...]
    card: str | None

    @property
    def size(self) -> int:
        """The size of all files in bytes."""
        return sum(file.size for file in self.files)

    def as_dict(self) -> dict[str, Any]:
        """Return plain data."""
        return {
            "repo": self.repo,
            "private": self.private,
            "files": {file.name: file.size for file in self.files},
            "left": list(self.left),
            "card": self.card,
        }


def plan_push(name: str, repo: str, *, public: bool = False, base: str | None = None) -> PushPlan:
    """Choose the files of a push, and check them and the card; nothing is sent.

    Args:
        name: a run folder or the folder of a model.
        repo: `OWNER/NAME`.
        public: whether everyone may read it.
        base: the hub id that an adapter's base has for others.

    Raises:
        UserError: something cannot be pushed.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise UserError(first_line(error), where=f"repository {repo}", hint="Write OWNER/NAME.") from error
    if not _REPO.fullmatch(repo):
        raise UserError("expected OWNER/NAME", where=f"repository {repo}", hint="Name the owner too.")
    files, left = files_to_push(name, base=base)
    card = card_of(files)
    if card is not None:
        read_card(card, f"{name}/README.md")
    return PushPlan(repo, not public, tuple(files), tuple(left), card)


def push(plan: PushPlan, api: "HfApi | None" = None) -> str:
    """Push the files of a plan in one commit, and return the address of the repository.

    Weights that an interrupted push has sent already are not sent again: the hub knows them by their digest.

    Args:
        plan: from `plan_push`.
        api: the hub; None for the one that huggingface_hub is set to.

    Raises:
        UserError: the hub refuses, or cannot be reached.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

    api = api or HfApi()
    try:
        api.create_repo(plan.repo, private=plan.private, exist_ok=True)
        info = api.repo_info(plan.repo)
        if plan.private and not info.private:
            raise UserError(
                "the repository is there already and is public",
                where=f"repository {plan.repo}",
                hint="Add `--public` if that is what you want, or name another one.",
            )
        commit = api.create_commit(plan.repo, _operations(plan.files), commit_message="Upload model with peftchat")
    except UserError:
        raise
    except LocalTokenNotFoundError as error:
        raise UserError(
            "you are not logged in", where="the hub", hint="Run `hf auth login`, or set HF_TOKEN."
        ) from error
    except OfflineModeIsEnabled as error:
        what = "the hub is switched off by HF_HUB_OFFLINE"
        raise UserError(what, where="the hub", hint="Unset the variable, or look at `--dry-run`.") from error
    except Exception as error:
        if not isinstance(error, HfHubHTTPError | ValueError | OSError) and not _is_of_network(error):
            raise
        hint = "Check the login (`hf auth whoami`), the name and the network, and push again: what arrived stays."
        raise UserError(f"the push failed: {first_line(error)}", where=f"repository {plan.repo}", hint=hint) from error
    return str(commit.repo_url)


def _is_of_network(error: Exception) -> bool:
    """Return whether the library by which huggingface_hub speaks to the hub raised an error; it has changed before."""
    return any(kind.__module__.startswith(("httpx", "requests")) for kind in type(error).__mro__)


def _operations(files: Sequence[PushFile]) -> list[Any]:
    from huggingface_hub import CommitOperationAdd

    return [CommitOperationAdd(file.name, str(file.source) if file.changed is None else file.changed) for file in files]
