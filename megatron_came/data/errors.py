"""The errors of the data tools."""


class DataError(Exception):
    """Input that cannot be used; the message is one sentence that names it and the remedy."""


class UnusableError(Exception):
    """Why a file or a document cannot be used.

    Whether that is an error, or the document is left out and counted, is for others to decide.

    Args:
        reason: A predicate, as in "is empty".
        remedy: What to do about it.
    """

    def __init__(self, reason: str, remedy: str) -> None:
        super().__init__(reason, remedy)  # both, so that workers can send it to their parent
        self.reason = reason
        self.remedy = remedy
