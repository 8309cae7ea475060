"""Counts the bytes that a decode step of a mixture of experts reads."""

import json
import os
import subprocess
import sys
from pathlib import Path


def test_one_row_reads_the_chosen_experts_the_dense_mlp_and_the_router_once():
    script = Path(__file__).parents[1] / "support/expert_bytes.py"
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, script], env=environment, capture_output=True, text=True, check=True
    )
    found = json.loads(run.stdout)
    # 26B-A4B in 16 bits: 8 experts, the dense MLP, and the router's matrix.
    assert found["(None, None, None)"][1] == 2 * 2816 * (8 * 3 * 704 + 3 * 2112 + 128)
    assert len(found) >= 6
    for packings, (read, used) in found.items():
        assert used <= read <= 1.03 * used, packings
