"""What older releases of Megatron have otherwise than the newest, which all other code is for.

* ``distributed_optimizer``: a ``DistributedOptimizer`` that takes other optimizers than Adam;
* ``fsdp2``: an argument that its wrapper lacks;
* ``pretraining``: how ``megatron_came.pretrain_gpt`` builds a model and starts the training loop.

Which names are replaced in which releases stands in the tables of replacements, and what some of
them are not exact with in ``megatron/rules.py``.
"""
