"""What a launch of Triton costs the host, measured with a driver that does nothing: no GPU is needed.

In a process of its own: which driver is active is a matter of the whole process.
"""

import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

LAUNCHES = []


class _Utils:
    def load_binary(self, *args):
        return 1, 2, 32, 0, 1024  # module, function, registers, spills, most threads

    def get_device_properties(self, device):
        return {"max_shared_mem": 232448, "multiprocessor_count": 132}

    def unload_module(self, module):
        pass


class _Driver:
    """Compiles for sm_90, and notes what would have been launched: the arguments in order."""

    utils = _Utils()

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def launcher_cls(self, source, metadata):
        return lambda *args: LAUNCHES.append((args[:3], args[9:]))


def check_same_launch():
    """Bound by position is bound by name; an argument of another kind is another kernel."""
    kernel, _tile, arguments = _norm()
    LAUNCHES.clear()
    kernel[(3,)](**arguments, num_warps=_tile.WARPS, enable_fp_fusion=True)
    for _ in range(3):
        _tile.launch(kernel, 3, arguments["out_ptr"], arguments)
    assert len(LAUNCHES) == 4
    for grid, args in LAUNCHES:
        assert grid == (3, 1, 1)
        assert all(a is b for a, b in zip(args, LAUNCHES[0][1], strict=True))
    assert len(_tile.compiled) == 1
    unaligned, wide = torch.zeros(9)[1:], torch.zeros(8, dtype=torch.float64)
    for changed in ({"gamma_ptr": None}, {"C": 9}, {"n": 2**40}, {"mean_ptr": unaligned}, {"m2_ptr": wide}):
        _tile.launch(kernel, 1, arguments["out_ptr"], arguments | changed)
    assert len(_tile.compiled) == 6


def _norm():
    from lifeops.kernels import _tile
    from lifeops.kernels.channel_norm import norm_affine_kernel

    mean, m2, gamma, beta = (torch.zeros(8) for _ in range(4))
    arguments = dict(mean_ptr=mean, m2_ptr=m2, gamma_ptr=gamma, beta_ptr=beta, out_ptr=torch.zeros(4, 8), n=24, C=8, EPS=1e-5, BLOCK_C=8)
    return norm_affine_kernel, _tile, arguments


def _microseconds(functions, rounds=40, calls=50):
    """Processor time of a call, the median of rounds in which the functions take turns."""
    found = {f: [] for f in functions}
    for _ in range(rounds):
        for f, times in found.items():
            start = time.process_time_ns()
            for _ in range(calls):
                f()
            times.append((time.process_time_ns() - start) / calls / 1e3)
    return [statistics.median(times) for times in found.values()]


def check_cost():
    """A call of the convolution, from tensors to the driver, against Triton's own binding of its 43 arguments alone."""
    from lifeops.kernels import _tile
    from lifeops.kernels import token_dwconv as conv

    x, weight = torch.zeros(2, 197, 384, dtype=torch.bfloat16), torch.zeros(384, 1, 3, 3, dtype=torch.bfloat16)
    programs, arguments = conv.forward_launch(x, weight, None, None, x, 14, 14, 1, 1, True, False)

    def by_keywords():
        conv.token_dwconv_fwd_kernel[(programs,)](**arguments, num_warps=_tile.WARPS, enable_fp_fusion=True)

    def whole():
        conv.forward(x, weight, None, None, 14, 14, 1, 1, True, False)

    def launch():
        _tile.launch(conv.token_dwconv_fwd_kernel, programs, x, arguments)

    for f in (by_keywords, whole, launch):
        f()
    keywords, call, launched = _microseconds((by_keywords, whole, launch))
    print(f"by keywords {keywords:.1f} us, launch {launched:.1f} us, the whole call {call:.1f} us")
    assert launched < 0.8 * keywords
    assert call < 1.5 * keywords  # twice as much with the binder and a configuration taken apart at every call


def test_with_a_driver_that_does_nothing():
    done = subprocess.run([sys.executable, __file__], capture_output=True, text=True, check=False,
                          env={**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": str(Path(__file__).parent.parent)})  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


if __name__ == "__main__":
    from triton.runtime.driver import driver

    driver.set_active(_Driver())
    check_same_launch()
    check_cost()
