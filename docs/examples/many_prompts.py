"""Continues prompts of different lengths, each with options of its own, as they come and go.

    python docs/examples/many_prompts.py
    python docs/examples/many_prompts.py --model google/gemma-3-1b-pt --batch-size 2

Prints each result when its text ends, then the speed. Without --model, this example uses the demo
weights.
"""

import argparse
import time

from gemma_fast import GemmaForCausalLM, Tokenizer
from gemma_fast.demo import demo_checkpoint

PROMPTS = {  # prompt → options of generate()
    "I want to move": {"max_new_tokens": 16},
    "The capital of France is": {"max_new_tokens": 4, "logprobs": 3},
    "Here is how to make bread at home, step by step. First,": {"max_new_tokens": 8, "seed": 1,
                                                               "do_sample": True},
    "1, 2, 3, 4,": {"max_new_tokens": 12, "stop_strings": [" 7"]},
}  # fmt: skip

parser = argparse.ArgumentParser()
parser.add_argument("--model", help="directory, .gguf file or hub id; default: the demo weights")
parser.add_argument("--quantize", help="int8 or int4: pack the weights; none: unpack them")
parser.add_argument("--batch-size", type=int, default=3, help="texts at the same time")
args = parser.parse_args()

path = args.model or demo_checkpoint()
tokenizer = Tokenizer.from_pretrained(path)
model = GemmaForCausalLM.from_pretrained(path, quantize=args.quantize)

requests = [{"input_ids": tokenizer(text).input_ids, **PROMPTS[text]} for text in PROMPTS]
start, count = time.perf_counter(), 0
for result in model.generate_many(requests, tokenizer=tokenizer, batch_size=args.batch_size):
    if result.error:
        raise result.error
    count += len(result.ids)
    text = tokenizer.decode(result.ids, skip_special_tokens=True)
    print(f"{[*PROMPTS][result.number]!r} -> {text!r} ({result.reason})")
    for token in result.logprobs:
        likeliest = ", ".join(f"{tokenizer.decode(i)!r} {logprob:.2f}" for i, logprob in token.top)
        print(f"  {token.logprob:.2f}; likeliest: {likeliest}")
print(f"{count / (time.perf_counter() - start):.1f} new tokens/s, prompts included")
