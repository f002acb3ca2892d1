"""The `peftchat` command: all commands, and errors as one message with an exit status."""

import errno
import sys

import click

from peftchat import __version__
from peftchat.cli import chat, compare, data, export, init, mask, merge, plan, train, variants
from peftchat.cli.common import OrderedGroup, note
from peftchat.errors import UserError, VerificationError

# A full or read-only disk raises these; a defect of peftchat would not.
_DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EFBIG}


@click.group(cls=OrderedGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="peftchat")
def cli() -> None:
    """Fine-tune a chat assistant of your own: full, LoRA or QLoRA, from one recipe."""


# In the order of the work.
for _module in (init, data, mask, variants, plan, train, compare, merge, chat, export):
    cli.add_command(_module.command)


def main() -> None:
    """Run the command line; the exit status is 0 for success, 1 for a failed check, 2 for wrong input."""
    try:
        cli(standalone_mode=False)
    except click.ClickException as error:
        error.show()
        sys.exit(2)
    except (click.Abort, KeyboardInterrupt):
        _print_error("Interrupted.")
        sys.exit(130)
    except UserError as error:
        _print_error(f"Error: {error}")
        sys.exit(2)
    except VerificationError as error:
        _print_error(f"Failed: {error}")
        sys.exit(1)
    except OSError as error:
        if error.errno not in _DISK_ERRORS:
            raise
        where = f"{error.filename}: " if error.filename else ""
        _print_error(f"Error: {where}{error.strerror}. Free disk space or choose another directory.")
        sys.exit(2)


def _print_error(message: str) -> None:
    note(message, style="bold red")
