"""Is the container sound? Imports what trains, and takes one step of CAME, on the CPU."""

import sys
import warnings

warnings.simplefilter("ignore")

import megatron.core  # noqa: E402
import megatron.training  # noqa: E402
import torch  # noqa: E402

from megatron_came import CAME  # noqa: E402

torch.manual_seed(0)
weight = torch.nn.Parameter(torch.randn(6, 4))
before = weight.detach().clone()
optimizer = CAME([weight], lr=1e-2)
(weight**2).sum().backward()
optimizer.step()
change = (weight.detach() - before).norm().item()
if not 0 < change < float("inf"):
    sys.exit(f"One step of CAME changed the weights by {change}.")
print(
    f"megatron-core {megatron.core.__version__}, PyTorch {torch.__version__},"
    f" {torch.cuda.device_count()} GPUs; one step of CAME changed the weights by {change:.4f}."
)
