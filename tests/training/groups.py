"""Process groups of one case among many that run in the same processes."""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroupGloo, distributed_c10d


def meet() -> dist.TCPStore:
    """The store that the ranks of a run share; the first rank serves it."""
    _share_one_device()
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return dist.TCPStore(address, port, is_master=os.environ["RANK"] == "0")


def connect(name: str, store: dist.TCPStore) -> None:
    """Start process groups of the case's own, which Megatron takes as it finds them."""
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    prefix = dist.PrefixStore(name, store)
    dist.init_process_group("gloo", store=prefix, rank=rank, world_size=world_size)


def serve(run_case: Callable[[dict[str, Any]], Any]) -> None:
    """Run the cases of a file, the first argument, and write what this rank saw into a folder."""
    from megatron.core import parallel_state

    cases_file, results = Path(sys.argv[1]), Path(sys.argv[2])
    torch.set_num_threads(1)
    store = meet()
    for case in json.loads(cases_file.read_text()):
        print(f"=== case {case['name']}", flush=True)
        connect(case["name"], store)
        seen = run_case(case)
        (results / f"{case['name']}.{os.environ['RANK']}.json").write_text(json.dumps(seen))
        dist.barrier()
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def _share_one_device() -> None:
    """Let one thread wait for the messages of all groups of this process.

    Otherwise each group has its own, which wakes up a hundred times a second; Megatron makes dozens
    of groups for a case, and keeps some of them alive after it.
    """
    device = ProcessGroupGloo.create_device(hostname="127.0.0.1")

    class Group(ProcessGroupGloo):
        def __init__(self, store, rank, size, timeout, **settings):
            options = ProcessGroupGloo._Options()
            options._devices, options._timeout = [device], timeout
            for name, value in settings.items():  # from torch 2.14 on, enable_reconfigure
                setattr(options, name, value)
            super().__init__(store, rank, size, options)

    distributed_c10d.ProcessGroupGloo = Group
