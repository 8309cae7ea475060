"""Records, without a GPU, the launches of a decode step and the kernels that prompts compile.

    python tests/support/launches.py gemma3-mqa 1

Prints a JSON object. `step` lists the launches of a decode step: first Triton's kernels, then
PyTorch's operators. `compiled` lists, by prompt length, the kernels that a prompt of this length
would compile after a prompt of 19 tokens. `scheduled` lists the kernels that texts of many lengths
and settings would compile in a scheduler that is warm. Kernels are recorded, not run, so all tokens
are 0. Tests run this script as a separate process, like compile_kernels.py.
"""

import json
import sys

import torch
from compile_kernels import specialized
from gemma_launches import GPUS, launches, record_launches
from tiny_models import CONFIGS, random_model
from torch.profiler import ProfilerActivity, profile

from gemma_fast.engine.decoder import Decoder
from gemma_fast.engine.scheduler import Scheduler
from gemma_fast.kernels.launch import as_on

# PyTorch's operators that launch no kernel.
SILENT = {
    "aten::" + name
    for name in (
        "empty", "empty_like", "empty_strided", "view", "reshape", "slice", "select", "unsqueeze",
        "squeeze", "as_strided", "split", "split_with_sizes", "narrow", "detach", "alias", "expand",
        "_reshape_alias", "_unsafe_view", "item", "_local_scalar_dense", "new_empty",
        "lift_fresh", "contiguous",
    )
}  # fmt: skip


def launches_something(event) -> bool:
    return event.name.startswith("aten::") and event.name not in SILENT


def launched(work) -> list[str]:
    """Runs `work`. Returns the names of the Triton kernels that it launches, followed by the names
    of its PyTorch operators that launch kernels."""
    launches.clear()
    with profile(activities=[ProfilerActivity.CPU]) as found:
        work()
    operators = [event for event in found.events() if launches_something(event)]
    outermost = [x for x in operators if not x.cpu_parent or x.cpu_parent not in operators]
    return [kernel.__name__ for kernel, *_ in launches] + [x.name for x in outermost]


def compiled(work) -> set[str]:
    """Runs `work`. Returns the kernels that it would compile, with options and specialization."""
    launches.clear()
    work()
    return {
        repr((kernel.__name__, sorted(kwargs.items(), key=str), specialized(kernel, args, kwargs)))
        for kernel, args, kwargs in launches
    }


def compiled_after_warm_up(model) -> list[str]:
    scheduler = Scheduler(Decoder(model, 16, 256), chunk=64)
    warm = compiled(scheduler.warm_up)
    settings = [
        {}, {"do_sample": True, "top_k": 0}, {"do_sample": True, "top_p": 0.9},
        {"repetition_penalty": 1.5}, {"logprobs": 2}, {"suppress_tokens": [5]},
    ]  # fmt: skip

    def texts() -> None:
        for i in range(40):
            options = {**settings[i % len(settings)], "max_new_tokens": 2 + i % 7}
            scheduler.add(model.request([1] * (1 + 37 * i % 150), eos_token_id=[], **options))
        while scheduler:
            scheduler.step()

    return sorted(compiled(texts) - warm)


def main(config: str, batch: int) -> None:
    record_launches()
    model = random_model(CONFIGS[config])

    def text(tokens: int):
        ids = torch.ones(batch, tokens, dtype=torch.long)
        return lambda: model.generate(ids, max_new_tokens=9, eos_token_id=[])

    decoder = Decoder(model, batch, 40)
    decoder.prefill(torch.ones(batch, 19, dtype=torch.long))
    first = compiled(text(19))
    others = {tokens: sorted(compiled(text(tokens)) - first) for tokens in (32, 33, 130, 200)}
    found = {"step": launched(decoder.step), "compiled": others}
    print(json.dumps({**found, "scheduled": compiled_after_warm_up(model)}))


if __name__ == "__main__":
    with as_on(GPUS[90]):
        main(sys.argv[1], int(sys.argv[2]))
