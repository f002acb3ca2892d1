"""The two ways in which a command ends early on purpose.

Library code raises them; the command line turns them into one message and an exit status. Anything else that
escapes is a defect of peftchat and keeps its traceback.
"""


class UserError(Exception):
    """What the user gave cannot be used: exit status 2.

    Args:
        what: the problem, in one sentence.
        where: the place to look at, as `file:line`, `file: key`, a folder or a flag.
        hint: what to do about it.
    """

    def __init__(self, what: str, *, where: str | None = None, hint: str | None = None) -> None:
        super().__init__(what)
        self.what = what
        self.where = where
        self.hint = hint

    def __str__(self) -> str:
        """`where: what. hint`, without the parts that were not given."""
        text = f"{self.where}: {self.what}" if self.where else self.what
        if not self.hint:
            return text
        return f"{text.rstrip('.')}. {self.hint}"


class VerificationError(Exception):
    """The work was done and a check on its result did not pass: exit status 1."""


def first_line(error: Exception) -> str:
    """Return the first line of an error's message that is not blank, or the error's type if it has none."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
