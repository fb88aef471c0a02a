"""Processes of PyTorch that compute together, one for each device."""

from pathlib import Path
import tempfile

import torch
from torch import distributed

# Its default arguments keep the group that exists when it is imported, and the threads of a group
# that lives on may abort an interpreter that exits.
import torch.distributed.nn.functional


def spawn(function, count, most, *arguments):
    """What `function(rank, device, *arguments)` returns in the first of `count` processes.

    Devices are GPUs where there are `most` of them, and the CPU otherwise.
    """
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_call, (function, count, most, folder, arguments), count)
        return torch.load(Path(folder) / "result")


def _call(rank, function, count, most, folder, arguments):
    on_gpus = torch.cuda.device_count() >= most
    device = torch.device("cuda", rank) if on_gpus else torch.device("cpu")
    if on_gpus:
        torch.cuda.set_device(device)
    engine = "nccl" if on_gpus else "gloo"
    distributed.init_process_group(engine, f"file://{folder}/all", rank=rank, world_size=count)
    result = function(rank, device, *arguments)  # whose modules are freed before their group
    if rank == 0:
        torch.save(result, Path(folder) / "result")
    distributed.destroy_process_group()


def wait(device):
    """Until all processes are here, and their devices idle."""
    distributed.barrier()
    if device.type == "cuda":
        torch.cuda.synchronize()


def name_of(device):
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
