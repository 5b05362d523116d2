"""Every difference between the supported releases of Megatron.

All other code of the host room, and the launchers, are written for the newest release and hold no
version conditional. What an older one has otherwise, or lacks, is here, by the room that needs it:

* ``distributed_optimizer``: a ``DistributedOptimizer`` that takes other optimizers than Adam;
* ``refusals``: models that an older release is not exact with;
* ``cpu``: what the CPU host stands in for;
* ``pretraining``: how ``megatron_came.pretrain_gpt`` builds a model and starts the training loop.
"""
