"""The `peftchat` command: all commands, and errors as one message with an exit status."""

import errno
import gc
import os
import sys
from contextlib import suppress
from pathlib import Path

import click

from peftchat import __version__
from peftchat.cli import (
    chat,
    compare,
    data,
    doctor,
    evaluate,
    export,
    generate,
    init,
    judge,
    launch,
    mask,
    merge,
    plan,
    push,
    recipe_import,
    recipes,
    report,
    serve,
    template,
    train,
    variants,
    web,
)
from peftchat.cli.common import OrderedGroup
from peftchat.cli.loudness import accept_loudness
from peftchat.cli.manual_pages import command_page, manual_page
from peftchat.errors import UserError, VerificationError, first_line
from peftchat.interruption import end, interruptible, interruption, leave
from peftchat.library_setup import prepare_libraries
from peftchat.streams import BROKEN_PIPE_STATUS, check_output, discard_output, prepare_streams
from peftchat.training.launcher_environment import clean_environment
from peftchat.training.several_processes import is_lost_process, is_main_process, let_others_speak

# A disk or a file system raises these; a defect of peftchat would rarely.
_DISK_ERRORS = {
    errno.EACCES,
    errno.EBUSY,
    errno.EDQUOT,
    errno.EEXIST,
    errno.EFBIG,
    errno.EIO,
    errno.EISDIR,
    errno.ELOOP,
    errno.EMFILE,
    errno.ENAMETOOLONG,
    errno.ENFILE,
    errno.ENODEV,
    errno.ENOENT,
    errno.ENOSPC,
    errno.ENOTDIR,
    errno.ENOTEMPTY,
    errno.EPERM,
    errno.EROFS,
    errno.ESTALE,
    errno.EXDEV,
}
_FULL = {errno.ENOSPC, errno.EDQUOT}
_TOO_MANY = {errno.EMFILE, errno.ENFILE}


@click.group(
    cls=OrderedGroup,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="First time here? `peftchat doctor` examines the installation and this machine; `peftchat init` writes a "
    "recipe.",
)
@click.version_option(__version__, prog_name="peftchat")
@click.pass_context
def cli(context: click.Context) -> None:
    """Fine-tune a chat assistant of your own: full, LoRA or QLoRA, from one recipe."""
    # First: libraries log while they are imported.
    prepare_libraries()
    if context.invoked_subcommand != train.command.name:
        clean_environment(os.environ, trains=False)
    try:
        Path.cwd()
    except OSError as error:
        raise UserError("the working folder no longer exists", hint="Change to another folder.") from error


accept_loudness(cli)

# In the order of the work.
for _module in (
    doctor,
    recipes,
    init,
    recipe_import,
    data,
    mask,
    template,
    variants,
    plan,
    launch,
    train,
    report,
    compare,
    evaluate,
    merge,
    chat,
    web,
    generate,
    judge,
    export,
    serve,
    push,
):
    cli.add_command(accept_loudness(_module.command, hidden=True))


def main() -> None:
    """Run the command line.

    The exit status is 0 for success, 1 for a failed check, 2 for wrong input, and 128 plus the number of the signal
    that ended it.
    """
    with interruptible():
        try:
            _main()
        except BaseException as error:
            interrupted = interruption(error)
            if interrupted is None:
                raise
            end(interrupted)
        finally:
            # At its end, the interpreter searches everything that libraries made for garbage, for more than a second.
            # What is frozen is not searched; handlers of the exit run all the same.
            gc.freeze()


def _main() -> None:
    prepare_streams()
    try:
        status = _run()
        problem = check_output()
    except BrokenPipeError:
        discard_output()
        sys.exit(BROKEN_PIPE_STATUS)
    if problem is not None and not status:
        _print_error(f"Error: standard output cannot be written: {problem}.")
        status = 2
    if status:
        leave(status)


def _as_sentence(text: str) -> str:
    return text if text.endswith((".", "?", "!")) else f"{text}."


def _run() -> int:
    """Run the command and return its exit status; an error has been printed.

    Raises:
        BrokenPipeError: the reader of a pipe has gone.
    """
    try:
        cli(standalone_mode=False)
    except click.ClickException as error:
        error.show()
        page = command_page(sys.argv[1:])
        if page is not None:
            click.echo(f"See {page}.", err=True)
        return 2
    except click.Abort as error:
        raise KeyboardInterrupt from error
    except UserError as error:
        page = manual_page(error, sys.argv[1:])
        _print_error(f"Error: {error}" if page is None else f"Error: {_as_sentence(str(error))} See {page}.")
        return 2
    except VerificationError as error:
        _print_error(f"Failed: {error}")
        return 1
    except SystemExit as error:
        # Click ends with status 1 where a reader has gone, which here means a failed check:
        # https://github.com/pallets/click/blob/8.1.8/src/click/core.py#L1100
        # Newer versions begin the name of the class with `_`, and warn where the old one is imported.
        if type(sys.stdout).__name__.endswith("PacifyFlushWrapper"):
            raise BrokenPipeError from error
        raise
    except OSError as error:
        if check_output() is not None or _is_of_output(error):
            _print_error(f"Error: standard output cannot be written: {error.strerror}.")
        elif error.errno in _DISK_ERRORS:
            _print_error(f"Error: {_disk_message(error)}")
        else:
            raise
        return 2
    except RuntimeError as error:
        if not is_lost_process(error):
            raise
        let_others_speak()
        _print_error(f"Failed: another process of the run has ended: {first_line(error)}")
        return 1
    except Exception:
        if not is_main_process():
            let_others_speak()
        raise
    return 0


def _disk_message(error: OSError) -> str:
    """Return what is wrong, where, and what to do."""
    # `rename` and `link` name two files; the second is the one that would be written.
    where = error.filename2 or error.filename
    if error.errno in _FULL:
        hint = "Free disk space or choose another directory."
    elif error.errno == errno.EFBIG:
        hint = "Raise the limit of a file's size (`ulimit -f`), or choose another file system."
    elif error.errno in _TOO_MANY:
        hint = "Raise the limit of open files (`ulimit -n`)."
    else:
        hint = "Check the path, or choose another directory."
    return str(UserError(error.strerror or str(error), where=None if where is None else str(where), hint=hint))


def _is_of_output(error: OSError) -> bool:
    """Return whether writing to standard output failed: only click and rich write to it."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and str(trace.tb_frame.f_globals.get("__name__")).startswith(("click.", "rich."))


def _print_error(message: str) -> None:
    from peftchat.console import print_error

    if not is_main_process():
        let_others_speak()
        message = f"Process {os.environ['RANK']}: {message}"
    # Standard error itself may be on a full disk; the status still tells that there was an error.
    with suppress(OSError):
        print_error(message)
