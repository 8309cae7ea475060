"""Chats with Gemma. Prints each answer token by token.

    python docs/examples/stream_a_chat.py --model google/gemma-3-1b-it
    echo "Why is the sky blue?" | python docs/examples/stream_a_chat.py --max-new-tokens 20

Reads one question per line from standard input until Ctrl-D. Without --model, this example uses the
demo weights. They are a base model, which often repeats a question instead of answering it.
"""

import argparse
import sys

from gemma_fast import GemmaForCausalLM, TextStreamer, Tokenizer
from gemma_fast.demo import demo_checkpoint

parser = argparse.ArgumentParser()
parser.add_argument("--model", help="directory, .gguf file or hub id; default: the demo weights")
parser.add_argument("--max-new-tokens", type=int, default=256)
args = parser.parse_args()

path = args.model or demo_checkpoint()
tokenizer = Tokenizer.from_pretrained(path)
model = GemmaForCausalLM.from_pretrained(path)
# prints text as soon as its characters are complete
streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)

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
        eos_token_id=tokenizer.stop_token_ids,  # <eos> and <end_of_turn>
        streamer=streamer,
    )
    new = ids[0, prompt.input_ids.shape[1] :]
    messages.append(
        {"role": "assistant", "content": tokenizer.decode(new, skip_special_tokens=True)}
    )
    print("> ", end="", flush=True)
print()
