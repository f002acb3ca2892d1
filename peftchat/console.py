"""The two consoles: results go to standard output, progress and notes to standard error."""

from rich.console import Console

stderr = Console(stderr=True, highlight=False, soft_wrap=True)
"""Progress, notes and errors."""

stdout = Console(highlight=False, soft_wrap=True)
"""Results: tables, answers."""
