"""Makes ``--optimizer came`` known to the Megatron that the script at work is about to import.

The one line that ``megatron-came patch`` adds to the ``pretrain_gpt.py`` of a Megatron-LM checkout
imports this module, above anything of Megatron; the same line does the same in any other script of
the checkout. It does what :mod:`megatron_came.launch` does before it starts a script.
"""

import sys
from pathlib import Path
from types import TracebackType

from megatron_came.launch import prepare
from megatron_came.megatron.errors import UnsupportedError
from megatron_came.search_path import other_megatron, use_checkout_of
from megatron_came.voice import PREFIX, say

_report = sys.excepthook


def _report_in_a_sentence(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    """End with a sentence where a model is not one that CAME can train."""
    if isinstance(error, UnsupportedError):
        print(f"{PREFIX}{error}", file=sys.stderr)
    else:
        _report(kind, error, trace)


def _prepare() -> None:
    """Take the Megatron of the checkout in which the script lies, if it lies in one."""
    script = getattr(sys.modules["__main__"], "__file__", None)
    path = list(sys.path)  # changed by the next line even where there is no checkout
    checkout = None if script is None else use_checkout_of(Path(script))
    if checkout is None:
        sys.path[:] = path
    prepare()
    if checkout is not None and (other := other_megatron(checkout)):
        say(other)


_prepare()
sys.excepthook = _report_in_a_sentence  # the script is not run by the launcher, which catches it
