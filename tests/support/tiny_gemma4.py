"""Builds a tiny tokenizer of Gemma 4: as tokenizer.json with the config of the hub's files, and as
metadata of a GGUF file as llama.cpp's converter writes them. Ids up to <turn|> are the real ones.

The template is written for the tests, in the format of the official ones: roles, tools, thinking.
"""

import json
from pathlib import Path

from tiny_tokenizer import BYTE, CONTROL, NORMAL, USER_DEFINED
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.processors import TemplateProcessing

CONTROL_TOKENS = {
    0: "<pad>", 1: "<eos>", 2: "<bos>", 3: "<unk>", 4: "<mask>", 46: "<|tool>", 47: "<tool|>",
    98: "<|think|>", 105: "<|turn>", 106: "<turn|>",
}  # fmt: skip
# The converter marks them as user-defined.
VISIBLE = {
    48: "<|tool_call>", 49: "<tool_call|>", 50: "<|tool_response>", 51: "<tool_response|>",
    52: '<|"|>', 100: "<|channel>", 101: "<channel|>",
}  # fmt: skip
MEDIA = ("<|image>", "<|image|>", "<image|>", "<|audio>", "<|audio|>", "<audio|>", "<|video|>")
NEWLINES = ["\n" * n for n in range(1, 5)]
MERGES = [
    *((a, b) for a in NEWLINES for b in NEWLINES if a + b in NEWLINES), ("▁", "▁"), ("h", "e"),
    ("t", "he"), ("▁", "the"), ("l", "l"), ("he", "ll"), ("hell", "o"), ("é", "é"), ("<", "/"),
    ("</", "s"), ("</s", ">"),
]  # fmt: skip
CONFIG = {
    "tokenizer_class": "GemmaTokenizer", "processor_class": "Gemma4Processor",
    "backend": "tokenizers", "bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>",
    "unk_token": "<unk>", "mask_token": "<mask>", "padding_side": "left",
    "model_max_length": 1000000000000000019884624838656, "extra_special_tokens": ["<|video|>"],
    "sot_token": "<|turn>", "eot_token": "<turn|>", "soc_token": "<|channel>",
    "eoc_token": "<channel|>", "think_token": "<|think|>", "escape_token": '<|"|>',
    "stc_token": "<|tool_call>", "etc_token": "<tool_call|>", "std_token": "<|tool>",
    "etd_token": "<tool|>", "str_token": "<|tool_response>", "etr_token": "<tool_response|>",
    "image_token": "<|image|>", "boi_token": "<|image>", "eoi_token": "<image|>",
    "audio_token": "<|audio|>", "boa_token": "<|audio>", "eoa_token": "<audio|>",
    "response_schema": {"type": "object"},
}  # fmt: skip
TEMPLATE = """\
{%- macro literal(value) -%}
    {%- if value is string -%}<|"|>{{ value }}<|"|>
    {%- elif value is boolean -%}{{ 'true' if value else 'false' }}
    {%- elif value is mapping -%}
        {%- set ns = namespace(first=true) -%}
        {{- '{' -}}
        {%- for key, item in value | dictsort -%}
            {{- '' if ns.first else ',' }}{{ key }}:{{ literal(item) -}}
            {%- set ns.first = false -%}
        {%- endfor -%}
        {{- '}' -}}
    {%- elif value is sequence -%}
        [{%- for item in value -%}{{ literal(item) }}{{ ',' if not loop.last }}{%- endfor -%}]
    {%- else -%}{{ value }}
    {%- endif -%}
{%- endmacro -%}
{%- macro without_thoughts(text) -%}
    {%- set ns = namespace(kept='') -%}
    {%- for part in text.split('<channel|>') -%}
        {%- set ns.kept = ns.kept + part.split('<|channel>')[0] -%}
    {%- endfor -%}
    {{- ns.kept | trim -}}
{%- endmacro -%}
{%- set first = messages[0] if messages[0]['role'] in ['system', 'developer'] else none -%}
{{- bos_token -}}
{%- if enable_thinking | default(false) or tools or first -%}
    <|turn>system{{ '\n' -}}
    {%- if enable_thinking | default(false) %}{{ '<|think|>\n' }}{% endif -%}
    {%- if first %}{{ first['content'] | trim }}{% endif -%}
    {%- for tool in tools or [] -%}
        {%- set function = tool['function'] -%}
        <|tool>declaration:{{ function['name'] + '{description:' + literal(function.description) -}}
        {%- set types = function.get('parameters', {}).get('properties', {}) -%}
        {%- for name, schema in types | dictsort -%}
            ,{{ name }}:{{ literal(schema['type'] | upper) -}}
        {%- endfor -%}
        {{- '}<tool|>' -}}
    {%- endfor -%}
    {{- '<turn|>\n' -}}
{%- endif -%}
{%- for message in (messages[1:] if first else messages) -%}
    {%- if message['role'] == 'tool' -%}
        <|tool_response>response:{{ message.get('name') or 'unknown' -}}
        {{- '{value:' + literal(message['content']) + '}<tool_response|>' -}}
    {%- else -%}
        <|turn>{{ 'model' if message['role'] == 'assistant' else message['role'] }}{{ '\n' -}}
        {%- if message.get('reasoning_content') and message.get('tool_calls') -%}
            {{- '<|channel>thought\n' + message['reasoning_content'] + '\n<channel|>' -}}
        {%- endif -%}
        {%- for call in message.get('tool_calls') or [] -%}
            <|tool_call>call:{{ call['function']['name'] }}
            {{- literal(call['function']['arguments']) }}<tool_call|>
        {%- endfor -%}
        {%- set content = message.get('content') or '' -%}
        {%- for text in ([content] if content is string else content | map(attribute='text')) -%}
            {{- without_thoughts(text) if message['role'] == 'assistant' else text | trim -}}
        {%- endfor -%}
        {%- if not message.get('tool_calls') %}{{ '<turn|>\n' }}{% endif -%}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt and messages[-1]['role'] != 'tool' -%}
    {{- '<|turn>model\n' -}}
    {%- if not enable_thinking | default(false) %}{{ '<|channel>thought\n<channel|>' }}{% endif -%}
{%- endif -%}
"""


def gguf_metadata() -> dict[str, object]:
    named = CONTROL_TOKENS | VISIBLE
    made = dict.fromkeys(a + b for a, b in MERGES if a + b not in NEWLINES)
    letters = ["▁", "é", "漢", *map(chr, range(33, 127))]
    columns = [
        *((named.get(i, f"<unused{i}>"), CONTROL if i in CONTROL_TOKENS else
           USER_DEFINED if i in VISIBLE else NORMAL) for i in range(107)),
        *((token, NORMAL) for token in [*NEWLINES, *made, *letters]),
        *((f"<0x{i:02X}>", BYTE) for i in range(256)),
        *((token, CONTROL) for token in MEDIA),
    ]  # fmt: skip
    tokens, types = (list(column) for column in zip(*columns, strict=True))
    return {
        "general.architecture": "gemma4",
        "tokenizer.ggml.model": "gemma4",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.scores": [-1000.0] * len(tokens),
        "tokenizer.ggml.merges": [f"{a} {b}" for a, b in MERGES],
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_space_prefix": False,
        "tokenizer.chat_template": TEMPLATE,
    }


def tiny_backend(bos: bool = False) -> Tokenizer:
    """Returns the tokenizer that tokenizer.json stores. bos  as that of a base model"""
    metadata = gguf_metadata()
    tokens, types = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    vocab = {token: i for i, token in enumerate(tokens)}
    backend = Tokenizer(
        models.BPE(vocab, MERGES, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    special = [t for t, kind in zip(tokens, types, strict=True) if kind in (CONTROL, USER_DEFINED)]
    backend.add_special_tokens([AddedToken(token, normalized=False) for token in special])
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    backend.post_processor = TemplateProcessing(
        single="<bos> $A" if bos else "$A", special_tokens=[("<bos>", 2)] * bos
    )
    return backend


def write_tokenizer(directory: Path, bos: bool = False) -> Path:
    """Writes tokenizer.json and its config. bos  as those of a base model, without a template"""
    tiny_backend(bos).save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps(CONFIG))
    (directory / "config.json").write_text(json.dumps({"model_type": "gemma4"}))
    if not bos:
        (directory / "chat_template.jinja").write_text(TEMPLATE)
    return directory
