"""The `peftchat` command: signals are handled before anything else is imported."""

from peftchat.child_process import end_with_parent
from peftchat.interruption import end, interruptible, interruption


def main() -> None:
    """Run the command line."""
    end_with_parent()
    with interruptible():
        try:
            from peftchat.cli.main import main as run

            run()
        except BaseException as error:
            interrupted = interruption(error)
            if interrupted is None:
                raise
            end(interrupted)


if __name__ == "__main__":
    main()
