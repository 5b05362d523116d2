"""Errors whose message is a sentence for the user; the launchers show it without a stack trace."""


class HostError(RuntimeError):
    """The installed Megatron is not one that CAME can be added to."""


class UnsupportedError(ValueError):
    """A model or a setting that CAME is not known to be exact with."""
