"""The error of the data tools."""


class DataError(Exception):
    """Input that cannot be used; the message is one sentence that names it and the remedy."""
