"""The `peftchat` command: finds the verb, runs it, and turns errors into one message and a status."""

import errno
import os
import sys

import click

from peftchat import __version__
from peftchat.cli.lazy import LazyVerbs, Verb
from peftchat.errors import UserError, VerificationError

VERBS = {
    "init": Verb("peftchat.cli.init", "Write a recipe to start from."),
    "data": Verb("peftchat.cli.data", "Make, clean and inspect conversations."),
    "mask": Verb("peftchat.cli.mask", "Show what is trained, token by token."),
    "variants": Verb("peftchat.cli.variants", "List the ways to train: LoRA and its relatives, and full."),
    "plan": Verb("peftchat.cli.plan", "Predict memory, time and cost before anything is trained."),
    "train": Verb("peftchat.cli.train", "Fine-tune a model from a recipe."),
    "compare": Verb("peftchat.cli.compare", "Choose a variant by a comparison on your own data."),
    "merge": Verb("peftchat.cli.merge", "Fold a run's adapter into its base, and prove it."),
    "chat": Verb("peftchat.cli.chat", "Talk to a run or a model in the terminal."),
    "export": Verb("peftchat.cli.export", "Hand a run or a model to llama.cpp, Ollama or vLLM."),
}

# What a full or closed disk says; a defect of ours would not.
_DISK_TROUBLE = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EFBIG}


@click.group(cls=LazyVerbs, verbs=VERBS, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="peftchat")
def cli() -> None:
    """Fine-tune a chat assistant of your own: full, LoRA or QLoRA, from one recipe."""


def main() -> None:
    """Run the command line; statuses: 0 done, 1 a check failed, 2 the input is wrong."""
    try:
        cli(standalone_mode=False)
    except click.ClickException as error:
        error.show()
        sys.exit(2)
    except (click.Abort, KeyboardInterrupt):
        _say("Interrupted.")
        sys.exit(130)
    except UserError as error:
        _say(f"Error: {error}")
        sys.exit(2)
    except VerificationError as error:
        _say(f"Failed: {error}")
        sys.exit(1)
    except OSError as error:
        if error.errno not in _DISK_TROUBLE:
            raise
        where = f"{error.filename}: " if error.filename else ""
        _say(f"Error: {where}{error.strerror}. Nothing more can be written there; make room or choose another folder.")
        sys.exit(2)


def _say(message: str) -> None:
    """One message for all processes of a run."""
    from peftchat.console import stderr

    if os.environ.get("RANK", "0") == "0":
        stderr.print(message, style="bold red", markup=False)
