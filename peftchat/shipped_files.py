"""Files that are installed with the package but lie outside it: the recipes and the tested versions."""

import sysconfig
from pathlib import Path

_PROJECT = Path(__file__).resolve().parent.parent


def shipped_file(name: str) -> Path | None:
    """Return the path of a file or folder that came with the package, or None if it did not.

    A checkout has it beside the package; a wheel puts it into `share/peftchat` of the environment
    (`data-files` in pyproject.toml).

    Args:
        name: `recipes` or `constraints.txt`.
    """
    in_checkout = _PROJECT / name
    if (_PROJECT / "pyproject.toml").is_file() and in_checkout.exists():
        return in_checkout
    for scheme in dict.fromkeys((sysconfig.get_default_scheme(), sysconfig.get_preferred_scheme("user"))):
        installed = Path(sysconfig.get_path("data", scheme)) / "share" / "peftchat" / name
        if installed.exists():
            return installed
    # `pip install --target` puts the files beside the package.
    beside = _PROJECT / "share" / "peftchat" / name
    return beside if beside.exists() else None
