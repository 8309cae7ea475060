"""Runs the checks of `gemma-fast verify` on the ops' references and on a tiny model.

`exact_gelu` computes GELU without the tanh approximation, an error that the checks must detect.
"""

import torch
import torch.nn.functional as F
from tiny_models import CONFIGS

from gemma_fast.benchmarks.verify import model as verify_model
from gemma_fast.benchmarks.verify.kernels import check_kernels
from gemma_fast.benchmarks.verify.margins import CPU_PATH, Finding
from gemma_fast.benchmarks.verify.truth import truth_of
from gemma_fast.checkpoint.random import RandomCheckpoint

CPU = torch.device("cpu")
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16


def kernels(*dtypes) -> dict[tuple[str, str], Finding]:
    """Checks the ops' references. Returns the findings by check and dtype."""
    return {(x.check, x.dtype): x for x in check_kernels(CPU, dtypes, CPU_PATH)}


def failed(lines) -> set[str]:
    return {x.check for x in lines if not x.ok}


class Loud(RandomCheckpoint):
    """Draws weights with ten times the spread, so that attention and MLP have more effect on the
    logits."""

    def _draw(self, name, device):
        mean = self.mean(name)
        for part in super()._draw(name, device):
            yield part.sub_(mean).mul_(10).add_(mean)


def model_lines(name="gemma3-gqa", dtypes=(FP32,)) -> dict[str, Finding]:
    checkpoint = Loud(CONFIGS[name])
    ids = verify_model.text_ids(checkpoint, 24)
    truth = truth_of(checkpoint, CPU)
    lines = verify_model.check_model(checkpoint, ids, dtypes, 24, truth)
    return {f"{x.check.split(',')[0]} {x.dtype}": x for x in lines}


def exact_gelu(gate, up):
    return (F.gelu(gate.float()) * up.float()).to(gate.dtype)
