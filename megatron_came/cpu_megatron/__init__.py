"""A machine without a GPU: Megatron's own training loop on the CPU, over gloo.

Where CUDA is absent :func:`enable` puts stand-ins in place of the parts of ``torch.cuda`` that
Megatron calls, gives Megatron's flags defaults that work on a CPU, and refuses flags that cannot.
The model, the schedules, the optimizers and the checkpoints are Megatron's, unmodified: a launch
script can be tried on a laptop before it is sent to a cluster.  A machine with a GPU is left alone
unless the CPU is asked for:

* ``MEGATRON_CAME_CPU`` unset: the CPU where there is no GPU; where the machine has one that
  PyTorch cannot use, and on several nodes, whose ranks may be on GPUs, a sentence ends the run;
* ``MEGATRON_CAME_CPU=1``: the CPU, even where there is a GPU;
* ``MEGATRON_CAME_CPU=0``: never; without a GPU Megatron stops with its own error.

Both launchers call :func:`enable`.  In a Megatron-LM checkout of one's own, two lines at the top of
the script, before anything of Megatron is imported, do the same::

    import megatron_came.cpu_megatron
    megatron_came.cpu_megatron.enable()
"""

from megatron_came.cpu_megatron.switch import enable, wanted

__all__ = ["enable", "wanted"]
