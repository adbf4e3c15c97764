"""A job whose rank 1 dies once, and whose rank 0 starts late; run by a launcher.

Prints a line for every attempt that connects.
"""

import os
import time
from datetime import timedelta

import torch
import torch.distributed as dist


def main() -> None:
    """Meet; die on rank 1 in the first attempt."""
    rank, attempt = int(os.environ["RANK"]), os.environ["TORCHELASTIC_RESTART_COUNT"]
    if rank == 0:
        time.sleep(3)
    dist.init_process_group("gloo", timeout=timedelta(seconds=15))
    dist.all_reduce(torch.ones(1))
    print(f"attempt {attempt}, rank {rank} met", flush=True)
    if attempt == "0" and rank == 1:
        time.sleep(0.5)
        os._exit(9)
    time.sleep(1 if attempt != "0" else 10)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
