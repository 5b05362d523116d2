"""Megatron-FSDP on a machine without a GPU."""

from __future__ import annotations

import os
from argparse import Namespace
from typing import Any

from megatron_came.patching import Function

_CONNECTIONS = "CUDA_DEVICE_MAX_CONNECTIONS"


def with_connections(original: Function) -> Function:
    """Validate with another number of a GPU's queues than Megatron insists on without FSDP.

    A CPU has none, and the process may train without FSDP next.
    """

    def validate_args(arguments: Namespace, *args: Any, **kwargs: Any) -> Any:
        given = os.environ[_CONNECTIONS]
        if arguments.use_megatron_fsdp and given == "1":
            os.environ[_CONNECTIONS] = "8"
        try:
            return original(arguments, *args, **kwargs)
        finally:
            os.environ[_CONNECTIONS] = given

    return validate_args
