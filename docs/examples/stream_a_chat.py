"""Chats with Gemma. Prints each answer token by token.

    python docs/examples/stream_a_chat.py --model google/gemma-4-E2B-it
    echo "Why is the sky blue?" | python docs/examples/stream_a_chat.py --max-new-tokens 20

Reads one question per line from standard input until Ctrl-D. Thoughts (Gemma 4) are printed to
standard error, and are not part of the next prompt. Without --model, this example uses the demo
weights. They are a base model, which often repeats a question instead of answering it.
"""

import argparse
import sys

from gemma_fast import ChatStreamer, GemmaForCausalLM, Tokenizer, split_thoughts
from gemma_fast.demo import demo_checkpoint

parser = argparse.ArgumentParser()
parser.add_argument("--model", help="directory, .gguf file or hub id; default: the demo weights")
parser.add_argument("--quantize", help="int8 or int4: pack the weights; none: unpack them")
parser.add_argument("--max-new-tokens", type=int, default=256)
args = parser.parse_args()

path = args.model or demo_checkpoint()
tokenizer = Tokenizer.from_pretrained(path)
model = GemmaForCausalLM.from_pretrained(path, quantize=args.quantize)
# prints text as soon as its characters are complete
streamer = ChatStreamer(tokenizer, lambda thought: print(thought, end="", file=sys.stderr))

messages = []
print("> ", end="", flush=True)
for line in sys.stdin:
    # The prompt is the whole conversation, because generate() keeps no cache from call to call.
    messages.append({"role": "user", "content": line.strip()})
    prompt = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt"
    )
    ids = model.generate(
        **prompt,
        max_new_tokens=args.max_new_tokens,
        eos_token_id=tokenizer.stop_token_ids,  # <eos>, <end_of_turn> or <turn|>
        streamer=streamer,
    )
    new = ids[0, prompt.input_ids.shape[1] :].tolist()
    _, answer = split_thoughts(tokenizer, new, prompt.input_ids[0].tolist())
    messages.append({"role": "assistant", "content": answer})
    print("> ", end="", flush=True)
print()
