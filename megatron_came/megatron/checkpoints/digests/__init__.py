"""Checkpoints that prove themselves: digests saved with them, and compared when they are loaded.

:mod:`megatron_came.core.digests` says what a digest is and what a checkpoint holds. Here every
rank adds up what it holds of the model's and the optimizer's tensors (:mod:`.sums`), under the
names and at the places that the model's sharded state gives them (:mod:`.leaves`); the sums over
all ranks are saved (:mod:`.saving`), or compared with those that were (:mod:`.verifying`).
"""
