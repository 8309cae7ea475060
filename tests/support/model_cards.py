"""Contains programs that use Gemma as its model cards and transformers' documentation show.

Each program is a string, so that a test can change only the import line. The name PATH replaces
the model's id. Tests compare what a program stores in `result`, and what the program prints.
"""

QUICK_START = """
from transformers import AutoTokenizer, AutoModelForCausalLM

tokenizer = AutoTokenizer.from_pretrained(PATH)
model = AutoModelForCausalLM.from_pretrained(PATH)

input_text = "hello the world"
input_ids = tokenizer(input_text, return_tensors="pt")

outputs = model.generate(**input_ids)
print(tokenizer.decode(outputs[0]))
result = outputs
"""
DEVICE_MAP = """
import torch
from transformers import AutoTokenizer, AutoModelForCausalLM

tokenizer = AutoTokenizer.from_pretrained(PATH)
model = AutoModelForCausalLM.from_pretrained(
    PATH, dtype=torch.float32, device_map="auto", attn_implementation="eager"
)
input_text = "in the world"
input_ids = tokenizer(input_text, return_tensors="pt").to(model.device)
outputs = model.generate(**input_ids, max_new_tokens=12, cache_implementation="static")
print(tokenizer.decode(outputs[0], skip_special_tokens=True))
result = outputs
"""
OLD_SPELLING = """
import torch
from transformers import GemmaTokenizer, AutoModelForCausalLM

tokenizer = GemmaTokenizer.from_pretrained(PATH)
model = AutoModelForCausalLM.from_pretrained(
    PATH, torch_dtype=torch.float32, low_cpu_mem_usage=True
).to("cpu")
model.eval()

inputs = tokenizer("the winner", return_tensors="pt").to(model.device)
prompt_len = inputs["input_ids"].shape[-1]
with torch.no_grad():
    outputs = model.generate(
        inputs["input_ids"], attention_mask=inputs["attention_mask"], max_length=20, num_beams=1,
        do_sample=False, use_cache=True, pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
print(tokenizer.decode(outputs[0][prompt_len:]))
result = outputs
"""
LEFT_PADDING = """
from transformers import AutoTokenizer, AutoModelForCausalLM

tokenizer = AutoTokenizer.from_pretrained(PATH, padding_side="left")
model = AutoModelForCausalLM.from_pretrained(PATH)
tokenizer.pad_token = tokenizer.eos_token

prompts = ["hello", "the thinner in the world", "a b"]
model_inputs = tokenizer(prompts, return_tensors="pt", padding=True).to(model.device)
generated_ids = model.generate(**model_inputs, max_new_tokens=10)
result = tokenizer.batch_decode(generated_ids, skip_special_tokens=True)
"""
CHAT = """
from transformers import AutoTokenizer, AutoModelForCausalLM

tokenizer = AutoTokenizer.from_pretrained(PATH)
model = AutoModelForCausalLM.from_pretrained(PATH, device_map="auto")

messages = [
    {"role": "user", "content": "hello the world"},
    {"role": "assistant", "content": "the winner"},
    {"role": "user", "content": "in the thinner?"},
]
input_ids = tokenizer.apply_chat_template(
    messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
).to(model.device)

outputs = model.generate(**input_ids, max_new_tokens=14)
result = tokenizer.decode(outputs[0])
"""
CHAT_AS_TEXT = """
from transformers import AutoTokenizer, AutoModelForCausalLM

tokenizer = AutoTokenizer.from_pretrained(PATH)
model = AutoModelForCausalLM.from_pretrained(PATH)

chat = [{"role": "user", "content": "hello the world"}]
prompt = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
inputs = tokenizer.encode(prompt, add_special_tokens=False, return_tensors="pt")
outputs = model.generate(input_ids=inputs.to(model.device), max_new_tokens=9)
result = (prompt, tokenizer.decode(outputs[0]))
"""
CHAT_BATCH = """
import torch
from transformers import AutoTokenizer, Gemma3ForCausalLM

model = Gemma3ForCausalLM.from_pretrained(PATH).eval()
tokenizer = AutoTokenizer.from_pretrained(PATH)

messages = [
    [
        {"role": "system", "content": [{"type": "text", "text": "a b"},]},
        {"role": "user", "content": [{"type": "text", "text": "hello the world"},]},
    ],
]
inputs = tokenizer.apply_chat_template(
    messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
).to(model.device).to(torch.bfloat16)

with torch.inference_mode():
    outputs = model.generate(**inputs, max_new_tokens=11)

result = tokenizer.batch_decode(outputs)
"""
STREAM = """
from transformers import AutoTokenizer, AutoModelForCausalLM, TextIteratorStreamer
from threading import Thread

tokenizer = AutoTokenizer.from_pretrained(PATH)
model = AutoModelForCausalLM.from_pretrained(PATH)

inputs = tokenizer(["hello the world"], return_tensors="pt")
streamer = TextIteratorStreamer(tokenizer, SKIP)

generation_kwargs = dict(inputs, streamer=streamer, max_new_tokens=20)
thread = Thread(target=model.generate, kwargs=generation_kwargs)
thread.start()
generated_text = ""
for new_text in streamer:
    generated_text += new_text
thread.join()
result = generated_text
"""
PRINT_STREAM = """
from transformers import AutoTokenizer, AutoModelForCausalLM, TextStreamer

tokenizer = AutoTokenizer.from_pretrained(PATH)
model = AutoModelForCausalLM.from_pretrained(PATH)

inputs = tokenizer(["hello the world"], return_tensors="pt")
streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
result = model.generate(**inputs, streamer=streamer, max_new_tokens=20)
"""
NEXT_TOKENS = """
import torch
from transformers import AutoTokenizer, AutoModelForCausalLM

tokenizer = AutoTokenizer.from_pretrained(PATH)
model = AutoModelForCausalLM.from_pretrained(PATH)

inputs = tokenizer("hello the", return_tensors="pt")
with torch.no_grad():
    outputs = model(**inputs, return_dict=True)
next_token_probs = torch.softmax(outputs.logits[0, -1], dim=-1)
top = torch.topk(next_token_probs, 5)
for prob, token in zip(top.values, top.indices):
    print(f"{tokenizer.decode(token)!r}: {prob:.3f}")
result = (outputs.logits, outputs[0], next_token_probs)
"""
SCORE = """
import torch
from transformers import AutoTokenizer, AutoModelForCausalLM

tokenizer = AutoTokenizer.from_pretrained(PATH)
model = AutoModelForCausalLM.from_pretrained(PATH)
model.eval()

encodings = tokenizer(["the winner", "hello in the world"], padding=True, return_tensors="pt")
with torch.inference_mode():
    logits = model(**encodings, use_cache=False).logits
log_probs = torch.log_softmax(logits[:, :-1].float(), dim=-1)
targets = encodings["input_ids"][:, 1:]
token_log_probs = log_probs.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
mask = encodings["attention_mask"][:, 1:] * encodings["attention_mask"][:, :-1]
scores = (token_log_probs * mask).sum(-1)
result = (scores, torch.exp(-scores / mask.sum(-1)))
"""
BY_HAND = """
import torch
from transformers import AutoTokenizer, AutoModelForCausalLM

tokenizer = AutoTokenizer.from_pretrained(PATH)
model = AutoModelForCausalLM.from_pretrained(PATH)

inputs = tokenizer("in the", return_tensors="pt")
generated, past_key_values = inputs.input_ids, None
input_ids, attention_mask = inputs.input_ids, inputs.attention_mask
for _ in range(16):
    with torch.no_grad():
        out = model(
            input_ids=input_ids, attention_mask=attention_mask, past_key_values=past_key_values,
            use_cache=True,
        )
    past_key_values = out.past_key_values
    input_ids = out.logits[:, -1:].argmax(-1)
    attention_mask = torch.cat([attention_mask, attention_mask.new_ones(1, 1)], dim=-1)
    generated = torch.cat([generated, input_ids], dim=-1)
result = (generated, past_key_values.get_seq_length())
"""
CONFIG = """
from transformers import AutoTokenizer, AutoModelForCausalLM

tokenizer = AutoTokenizer.from_pretrained(PATH, use_fast=True)
model = AutoModelForCausalLM.from_pretrained(PATH)
names = [
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "intermediate_size", "max_position_embeddings",
    "rms_norm_eps", "bos_token_id", "eos_token_id", "pad_token_id",
]
result = [getattr(model.config, name) for name in names]
result += [str(model.device), model.dtype, model.generation_config.eos_token_id]
result += [model.generation_config.max_new_tokens, model.generation_config.temperature]
result += [tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token, tokenizer.unk_token]
result += [tokenizer.bos_token_id, tokenizer.padding_side, tokenizer.vocab_size, len(tokenizer)]
result += [tokenizer.convert_tokens_to_ids("<end_of_turn>")]
"""
DEFAULTS = """
from transformers import AutoTokenizer, AutoModelForCausalLM, GenerationConfig

tokenizer = AutoTokenizer.from_pretrained(PATH)
model = AutoModelForCausalLM.from_pretrained(PATH)
inputs = tokenizer("hello the", return_tensors="pt")

generation_config = GenerationConfig(max_new_tokens=7, do_sample=False, repetition_penalty=1.3)
first = model.generate(**inputs, generation_config=generation_config)
model.generation_config.max_new_tokens = 5
model.generation_config.pad_token_id = tokenizer.pad_token_id
result = (first, model.generate(**inputs), model.generate(**inputs, max_new_tokens=2))
"""
EXAMPLES = {
    "quick start": QUICK_START,
    "device_map": DEVICE_MAP,
    "old spelling": OLD_SPELLING,
    "left padding": LEFT_PADDING,
    "chat": CHAT,
    "chat as text": CHAT_AS_TEXT,
    "chats": CHAT_BATCH,
    "stream": STREAM.replace("SKIP", "skip_prompt=True, skip_special_tokens=True"),
    "stream with prompt": STREAM.replace(", SKIP", ""),
    "next tokens": NEXT_TOKENS,
    "score": SCORE,
    "decode loop": BY_HAND,
    "config": CONFIG,
    "defaults": DEFAULTS,
}
