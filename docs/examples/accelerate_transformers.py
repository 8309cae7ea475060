"""Runs a transformers model before and after accelerate(). Prints the text and time of both runs,
and the code that the accelerated model uses for each part.

    pip install ".[demo,hf]"
    python docs/examples/accelerate_transformers.py --model google/gemma-3-1b-it

On a CPU the kernels' PyTorch references run, which are not faster. On a GPU, in bfloat16, rounding
can change a token if another token is almost as likely. With the demo weights, this takes a minute
on a CPU.
"""

import argparse
import time
from collections import Counter
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from gemma_fast import Tokenizer
from gemma_fast.demo import demo_checkpoint
from gemma_fast.hf import accelerate, explain

parser = argparse.ArgumentParser()
parser.add_argument("--model", help="directory, .gguf file or hub id; default: the demo weights")
path = parser.parse_args().model or str(demo_checkpoint())
device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)

# transformers needs the directory and the name of a .gguf file as two arguments.
source, gguf = (Path(path).parent, Path(path).name) if path.endswith(".gguf") else (path, None)
model = AutoModelForCausalLM.from_pretrained(source, gguf_file=gguf, dtype=dtype).to(device)
tokenizer = Tokenizer.from_pretrained(path)
prompt = tokenizer("I want to move", return_tensors="pt").to(device)


def show_text(model: PreTrainedModel, label: str) -> None:
    model.generate(**prompt, max_new_tokens=2, do_sample=False)  # on a GPU, compiles kernels
    start = time.perf_counter()
    ids = model.generate(**prompt, max_new_tokens=30, do_sample=False)
    text = tokenizer.decode(ids[0], skip_special_tokens=True)
    print(f"{label} {time.perf_counter() - start:6.2f} s  {text!r}")


show_text(model, "before:")
show_text(accelerate(model), "after: ")  # accelerate() returns the same model object
for (part, code), count in Counter((line.part, line.path) for line in explain(model)).items():
    print(f"{count:4} × {part}: {code}")
