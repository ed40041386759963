"""Run by torchrun in two processes: every system sharded per block, and the whole of it, against the unsharded twin."""

import torch.distributed as dist
from tool_checks_shard import blocks_of, compare
from tool_systems import SYSTEMS, build
from torch.distributed.fsdp import fully_shard

dist.init_process_group("gloo")
mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
for system in SYSTEMS:
    for parts in (blocks_of, lambda model: []):
        model, twin, x = build(system)
        for part in (*parts(model), model):
            fully_shard(part, mesh=mesh)
        compare(model, twin, x)  # both ranks see the same batch: the mean of the gradients is each one's own
    print(f"sharded: {system}")
dist.destroy_process_group()
