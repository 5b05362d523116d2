"""The version of megatron_came; the one place where it is written."""

__version__ = "0.1.0"
