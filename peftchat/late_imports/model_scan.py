"""transformers' scan of its models, done once and by a search.

While it is imported, it reads the 1,600 files of its models, to know the names that they export. It does so twice,
under two names of one folder, and compares each line of each file.
"""

from pathlib import Path
from types import ModuleType

SCANS_MODELS = "transformers.utils.import_utils"
"""The module with the functions that scan."""


def scan_once(module: ModuleType) -> None:
    """Let a folder be scanned once, by whichever name, and each file from its last declaration of names on."""
    names = vars(module)
    exported, structure = names["fetch__all__"], names["create_import_structure_from_path"]

    def structure_of_folder(module_path: str | Path) -> object:
        # The function keeps what it found by the path that it is given: of a folder or of a file in it.
        path = Path(module_path)
        return structure(str(path.parent if path.is_file() else path))

    names["fetch__all__"] = lambda file_content: exported(from_last_declaration(file_content))
    names["create_import_structure_from_path"] = structure_of_folder


def from_last_declaration(source: str) -> str:
    """Return a module's source from its last line on that begins with `__all__`, or all of it."""
    before = source.rfind("\n__all__")
    return source if before < 0 else source[before + 1 :]
