"""Errors that a user can correct: one sentence with the place, the value and the remedy."""


class LuthierError(Exception):
    """An error that the user can correct. The command line prints it without a traceback and exits with 2."""


class RecipeError(LuthierError):
    """A recipe key, a row or a file that cannot be used.

    `where` is a recipe key with its line, or a file with its line; `what` is the fault with the value found;
    `remedy` says what to write instead.
    """

    def __init__(self, where: str, what: str, remedy: str = "") -> None:
        self.where, self.what, self.remedy = where, what, remedy
        super().__init__(f"{where}: {what}" + (f"; {remedy}" if remedy else ""))
