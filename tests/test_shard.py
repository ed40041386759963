"""FSDP2 in two processes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tool_systems import SYSTEMS


@pytest.mark.skipif(not torch.distributed.is_available() or not torch.distributed.is_gloo_available(), reason="needs gloo")
def test_two_processes_share_the_parameters():
    pytest.importorskip("timm")
    worker = Path(__file__).parent / "shard_worker.py"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(worker)]
    result = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-4000:]
    assert all(f"sharded: {system}" in result.stdout for system in SYSTEMS)
