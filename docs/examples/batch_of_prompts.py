"""Continues prompts of different lengths in one batch: first greedily, then sampled with a seed.

    python docs/examples/batch_of_prompts.py
    python docs/examples/batch_of_prompts.py --model google/gemma-3-1b-pt

Prints each prompt's continuation, and the speed of the whole batch. The same seed gives the same
texts. Without --model, this example uses the demo weights.
"""

import argparse
import time

from gemma_fast import GemmaForCausalLM, Tokenizer
from gemma_fast.demo import demo_checkpoint

PROMPTS = [
    "I want to move",
    "The capital of France is",
    "Here is how to make bread at home, step by step. First,",
]
SETTINGS = {
    "greedy": {"do_sample": False},
    "sampled": {"do_sample": True, "temperature": 0.8, "top_k": 64, "seed": 1},
}
NEW_TOKENS = 16  # at most, per prompt

parser = argparse.ArgumentParser()
parser.add_argument("--model", help="directory, .gguf file or hub id; default: the demo weights")
parser.add_argument("--quantize", help="int8 or int4: pack the weights; none: unpack them")
args = parser.parse_args()

path = args.model or demo_checkpoint()
tokenizer = Tokenizer.from_pretrained(path)
model = GemmaForCausalLM.from_pretrained(path, quantize=args.quantize)

# padding=True pads the shorter prompts on the left; attention_mask :: [b, t] is 0 for padding.
batch = tokenizer(PROMPTS, padding=True, return_tensors="pt")
prompt_length = batch.input_ids.shape[1]
for name, settings in SETTINGS.items():
    model.generate(**batch, max_new_tokens=2, **settings)  # on a GPU, compiles the kernels
    start = time.perf_counter()
    ids = model.generate(**batch, max_new_tokens=NEW_TOKENS, **settings)  # [b, t + new]
    seconds = time.perf_counter() - start
    new = ids[:, prompt_length:]  # [b, new]; padding fills the row of a text that ends early
    count = (new != tokenizer.pad_token_id).sum()
    print(f"{name}: {count / seconds:.1f} new tokens/s, prefill included")
    for prompt, row in zip(PROMPTS, new, strict=True):
        print(f"  {prompt!r} -> {tokenizer.decode(row, skip_special_tokens=True)!r}")
