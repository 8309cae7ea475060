"""Computes the most likely next tokens, log-likelihoods of continuations, perplexities of texts.

    python docs/examples/logits_and_scoring.py --model google/gemma-3-1b-pt

Without --model, this example uses the demo weights.
"""

import argparse

import torch
from torch import Tensor

from gemma_fast import GemmaForCausalLM, Tokenizer
from gemma_fast.demo import demo_checkpoint

PROMPT = "I want to move"
CONTINUATIONS = [" to", " to a new country", " my car", " purple"]
TEXTS = ["The cat sat on the mat and slept.", "The mat slept on the and cat sat."]

parser = argparse.ArgumentParser()
parser.add_argument("--model", help="directory, .gguf file or hub id; default: the demo weights")
parser.add_argument("--quantize", help="int8 or int4: pack the weights; none: unpack them")
args = parser.parse_args()

path = args.model or demo_checkpoint()
tokenizer = Tokenizer.from_pretrained(path)
model = GemmaForCausalLM.from_pretrained(path, quantize=args.quantize)


def token_log_probs(prompt: str, text: str) -> Tensor:
    """Returns log P(token | prompt and earlier tokens) for each token of `text` :: [t]."""
    prompt_ids = tokenizer.encode(prompt, return_tensors="pt")  # [1, p], starts with <bos>
    ids = tokenizer.encode(text, add_special_tokens=False, return_tensors="pt")  # [1, t]
    logits = model(torch.cat((prompt_ids, ids), dim=1)).logits.float().cpu()  # [1, p + t, vocab]
    # The logits of a token predict the token after it.
    predictions = logits[0, -ids.shape[1] - 1 : -1].log_softmax(-1)  # [t, vocab]
    return predictions.gather(-1, ids.T).squeeze(-1)


logits = model(**tokenizer(PROMPT, return_tensors="pt")).logits[0, -1]  # [vocab]
for probability, token in zip(*logits.float().softmax(-1).topk(5), strict=True):
    print(f"P({tokenizer.decode(token)!r} | {PROMPT!r}) = {probability:.4f}")
for continuation in CONTINUATIONS:
    log_likelihood = token_log_probs(PROMPT, continuation).sum()
    print(f"log P({continuation!r} | {PROMPT!r}) = {log_likelihood:.3f}")
for text in TEXTS:
    print(f"perplexity of {text!r} = {token_log_probs('', text).mean().neg().exp():.1f}")
