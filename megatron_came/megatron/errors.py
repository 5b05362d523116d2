"""An error whose message is a sentence for the user; launchers show it without a stack trace."""


class UnsupportedError(ValueError):
    """A model or a setting that CAME is not known to be exact with."""
