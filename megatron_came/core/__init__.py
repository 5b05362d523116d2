"""CAME's arithmetic: plain functions of tensors, without ``torch.distributed``.

A step, cut at its two reductions:

1. ``passes.add_squared_sums`` reads the gradient; after the sum over ranks
   ``factors.update_moment`` and ``factors.scales`` give the scales of u = g / sqrt(r c / mean(r)).
2. ``passes.add_instability_sums`` reads gradient and momentum; after the sum over ranks
   ``factors.clip_divisor`` and ``factors.true_instability`` give what the same two functions turn
   into the scales of the confidence.
3. ``passes.apply_update`` reads all and writes momentum and weights.
"""
