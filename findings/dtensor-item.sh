#!/usr/bin/env bash
# torch 2.13.0: .item() of a sum or mean over a sharded DTensor is this process's share; of a quantile, the whole tensor's.
# Guess: a DTensor stands for the whole tensor, so its sum is one number, or .item() refuses while a reduction is pending.
# Seen 2026-11-28, 2 processes, 64 of 128 weights zero: .sum().item() is 64 and 0, .mean().item() 1.0 and 0.0, quantile right on
#   both.
# With 5 rows instead of 8, which do not divide evenly, mean().item() is right on both.
source "$(dirname "$0")/environment"
packages torch==2.13.0 numpy==2.4.6
check <<'PY'
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

def process(rank):
    dist.init_process_group("gloo", init_method=f"file://{Path('store').resolve()}", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    weight = torch.arange(128.0).view(8, 16)
    weight[:4] = 0
    even = distribute_tensor(weight, mesh, [Shard(0)])
    uneven = distribute_tensor(weight[:5], mesh, [Shard(0)])
    zeros = even == 0
    mine = [zeros.sum().item(), zeros.float().mean().item(), even.flatten().quantile(0.9).item(), (uneven == 0).float().mean().item()]
    mine.append(weight.flatten().quantile(0.9).item())
    seen = [None, None]
    dist.all_gather_object(seen, mine)
    if rank == 0:
        print("by process: zeros counted, their share, quantile, share in 5 rows, true quantile:", seen)
        assert [row[:2] for row in seen] == [[64, 1.0], [0, 0.0]]
        assert all(row[2] == row[4] and abs(row[3] - 0.8) < 1e-6 for row in seen)
    dist.destroy_process_group()

if __name__ == "__main__":
    torch.multiprocessing.spawn(process, nprocs=2)
PY
