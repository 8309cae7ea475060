"""Every kernel, as it would be launched, compiled for each generation of GPUs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

# Bytes of shared memory that a block may have.
SHARED = {80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448, 100: 232_448, 120: 101_376}


@pytest.mark.parametrize("capability", SHARED, ids=str)
def test_kernels_compile(capability):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    script = Path(__file__).with_name("compile_kernels.py")
    run = subprocess.run(
        [sys.executable, script, str(capability)], env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr[-3000:]
    kernels = [json.loads(line) for line in run.stdout.splitlines()]
    assert {k["kernel"] for k in kernels} == {
        "_attention_kernel", "_geglu_kernel", "_rms_norm_kernel", "_rotary_write_kernel",
    }  # fmt: skip
    for kernel in kernels:
        assert kernel["stack"] == 0, f"spills registers: {kernel}"
        assert kernel["shared"] <= SHARED[capability], f"too much shared memory: {kernel}"
        one_token = kernel["shape"][1] == 1
        if not (kernel["kernel"] == "_rotary_write_kernel" and one_token):  # a row a program
            assert kernel["wide_loads"], f"loads less than 16 bytes at a time: {kernel}"
        prompt = kernel["kernel"] == "_attention_kernel" and not one_token
        if capability == 90 and kernel["dtype"] == "bf16" and prompt:
            assert kernel["wgmma"], f"not on Hopper's tensor cores: {kernel}"
