"""The errors of the data tools."""


class DataError(Exception):
    """Input that cannot be used; the message is one sentence that names it and the remedy."""


class UnusableError(Exception):
    """Why a file or a document cannot be used ("is empty"), and what to do about it.

    Whether that is an error, or the document is left out and counted, is for others to decide.
    """

    def __init__(self, reason: str, remedy: str) -> None:
        super().__init__(reason, remedy)  # both, so that workers can send it to their parent
        self.reason = reason
        self.remedy = remedy
