"""Processes of PyTorch that compute together, on the CPU."""

import os
import sys

import torch


def spawn(function, count, folder, *arguments):
    """Calls `function(rank, *arguments)` in each of the processes of a group."""
    torch.multiprocessing.spawn(_call, (function, count, folder, arguments), count)


def _call(rank, function, count, folder, arguments):
    torch.set_num_threads(1)
    rendezvous = f"file://{folder}/rendezvous"
    torch.distributed.init_process_group("gloo", rendezvous, rank=rank, world_size=count)
    function(rank, *arguments)
    torch.distributed.destroy_process_group()
    # PyTorch's caches of sharded functions hold groups, the threads of which may abort an
    # interpreter that exits.
    sys.stdout.flush()
    os._exit(0)
