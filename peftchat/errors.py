"""The expected errors: wrong input and a failed check.

Library code raises them; the command line turns them into one message and an exit status. Any other exception is a
defect of peftchat and keeps its traceback.
"""


class UserError(Exception):
    """The input cannot be used: exit status 2.

    Args:
        message: what is wrong, with the value found and the value expected.
        where: location of the fault, as `file:line`, `file: key`, a folder or a flag.
        hint: what to do; begins with a verb.
    """

    def __init__(self, message: str, *, where: str | None = None, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.where = where
        self.hint = hint

    def __str__(self) -> str:
        """Return `where: message. hint`, without the parts that were not given."""
        text = f"{self.where}: {self.message}" if self.where else self.message
        if not self.hint:
            return text
        return f"{text.rstrip('.')}. {self.hint}"


class VerificationError(Exception):
    """A check on the result failed: exit status 1."""


def first_line(error: Exception) -> str:
    """Return the first line of an error's message that is not blank, or the error's type if it has none."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
