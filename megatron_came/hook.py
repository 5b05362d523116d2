"""Makes ``--optimizer came`` known to the Megatron that the script at work is about to import.

The one line that ``megatron-came patch`` adds to the ``pretrain_gpt.py`` of a Megatron-LM checkout
imports this module, above anything of Megatron; the same line does the same in any other script of
the checkout. It does what :mod:`megatron_came.launch` does before it starts a script.
"""

import sys
from types import TracebackType

from megatron_came.host.errors import UnsupportedError
from megatron_came.launch import prepare

_report = sys.excepthook


def _report_in_a_sentence(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    """End with a sentence where a model is not one that CAME can train."""
    if isinstance(error, UnsupportedError):
        print(f"megatron_came: {error}", file=sys.stderr)
    else:
        _report(kind, error, trace)


prepare()
sys.excepthook = _report_in_a_sentence
