"""Put the demo's model, SmolLM2-135M-Instruct, into a folder; at once if it is there already."""

import argparse
import sys
from pathlib import Path

from peftchat.console import stderr, stdout
from peftchat.errors import UserError, VerificationError
from peftchat.models.demo import ensure_demo_model


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--to", type=Path, default=Path(".cache/smollm2-135m"), help="the folder (default: %(default)s)"
    )
    try:
        folder = ensure_demo_model(parser.parse_args().to)
    except UserError as error:
        stderr.print(f"Error: {error}", style="bold red", markup=False)
        return 2
    except VerificationError as error:
        stderr.print(f"Failed: {error}", style="bold red", markup=False)
        return 1
    stdout.print(str(folder), markup=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
