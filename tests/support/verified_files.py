"""Writes tiny random checkpoints, and checks them as `gemma-fast verify` does."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import tiny_gemma4
import torch
import transformers
from checkpoints import EXPERTS, config_json, gguf_name, random_tensors, rope_factors, stacked
from tiny_models import CONFIGS, random_transformers_model
from tiny_tokenizer import gguf_metadata, tiny_backend
from torch import Tensor, nn

from gemma_fast.benchmarks.model.transformers_model import transformers_config
from gemma_fast.benchmarks.verify.ids import check_ids
from gemma_fast.benchmarks.verify.margins import Finding
from gemma_fast.benchmarks.verify.model import check_model
from gemma_fast.benchmarks.verify.truth import truth_of
from gemma_fast.checkpoint.base import Checkpoint
from gemma_fast.checkpoint.config_json import config_from_json
from gemma_fast.config import GemmaConfig

# Factor of the final norm. With large logits, rounding to 16 bits changes the perplexity of a short
# random text by more than the limit.
SMALL = 0.3
ADD = {bool: "add_bool", int: "add_uint32", float: "add_float32", str: "add_string"}
KEYS: dict[str, Any] = {
    "context_length": 512, "embedding_length": 64, "block_count": 7, "feed_forward_length": 96,
    "attention.head_count": 2, "attention.head_count_kv": 1, "attention.key_length": 32,
    "attention.value_length": 32, "attention.layer_norm_rms_epsilon": 1e-6,
}  # fmt: skip
# The shapes of checkpoints.GEMMA_4: layers 2 and 3 read the keys and values of layers 0 and 1.
GEMMA_4_KEYS = KEYS | {
    "block_count": 4, "feed_forward_length": [96, 96, 192, 192],
    "attention.head_count_kv": [2, 1, 2, 1], "attention.key_length": 64,
    "attention.value_length": 64, "attention.key_length_swa": 32,
    "attention.value_length_swa": 32, "attention.sliding_window": 8,
    "attention.sliding_window_pattern": [True, False, True, False],
    "attention.shared_kv_layers": 2, "embedding_length_per_layer_input": 32,
    "rope.freq_base": 1e6, "rope.freq_base_swa": 1e4, "rope.dimension_count": 64,
    "rope.dimension_count_swa": 32,
}  # fmt: skip
EXPERT_KEYS = {"expert_count": 4, "expert_used_count": 2, "expert_feed_forward_length": 32}


def write_directory(
    path: Path, name: str = "gemma3-gqa", head: bool = False, **config: Any
) -> Path:
    """Writes what transformers saves, and a tokenizer. head: the model has an output head of its
    own, although its config says that it is tied; config: fields to set in config.json"""
    many = name.startswith("multimodal")
    source = CONFIGS[{"multimodal": "gemma3-gqa", "multimodal4": "gemma4-all"}.get(name, name)]
    gemma4 = source.model_type == "gemma4"
    backend = tiny_gemma4.tiny_backend(bos=True) if gemma4 else tiny_backend(source.model_type)
    rows = backend.get_vocab_size()
    per_layer = rows + 12 if source.vocab_size_per_layer_input else None
    source = replace(source, vocab_size=rows, vocab_size_per_layer_input=per_layer)
    if gemma4:  # under the tiny model's low cap, many of the largest logits are equal in 16 bits
        source = replace(source, final_logit_softcapping=30.0)
    model = (multimodal if many else random_transformers_model)(source)
    for parameter, weight in model.named_parameters():
        if gemma4 and parameter.endswith("q_norm.weight"):
            weight.data *= 0.2  # with large scores, 16 bits change which key a query sees
        if gemma4 and parameter.endswith("model.norm.weight"):
            weight.data *= SMALL
    if head:
        rows, hidden = model.get_input_embeddings().weight.shape
        torch.manual_seed(0)
        model.set_output_embeddings(nn.Linear(hidden, rows, bias=False))
    model.save_pretrained(path)
    if config:
        file = path / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | config))
    backend.save(str(path / "tokenizer.json"))
    if gemma4:
        (path / "tokenizer_config.json").write_text(json.dumps(tiny_gemma4.CONFIG))
    return path


def multimodal(text: GemmaConfig) -> transformers.PreTrainedModel:
    """Returns a Gemma 3 or 4 that also reads images, with random weights."""
    if text.model_type == "gemma4":
        language = random_transformers_model(text)
        tower = {
            "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "head_dim": 16,
            "num_attention_heads": 1, "num_key_value_heads": 1, "patch_size": 4,
            "position_embedding_size": 32,
        }  # fmt: skip
        both = transformers.Gemma4Config(text_config=language.config, vision_config=tower)
        model = transformers.Gemma4ForConditionalGeneration(both).eval()
        model.model.language_model.load_state_dict(language.model.state_dict())
        return model
    vision = {
        "num_hidden_layers": 1, "hidden_size": 16, "intermediate_size": 16,
        "num_attention_heads": 1, "image_size": 28, "patch_size": 14,
    }  # fmt: skip
    config = transformers.Gemma3Config(
        text_config=transformers_config(text).to_dict(), vision_config=vision,
        mm_tokens_per_image=4, image_token_index=1,
    )  # fmt: skip
    return transformers.Gemma3ForConditionalGeneration(config).eval()


def write_gguf_file(
    path: Path, family: str, tensors: dict[str, Tensor | None] | None = None, experts: str = "",
    **keys: Any,
) -> Path:  # fmt: skip
    """Writes a GGUF file of 7 layers (Gemma 4: 4), with a tokenizer, with the names that llama.cpp
    uses.

    tensors: further tensors, under their stored names; None: the file has no such tensor
    experts: "stacked" or "separate": a mixture of experts, gate and up in one tensor or in two
    keys: metadata below the family's name, with __ for the dot; None: without this key
    """
    gemma4 = family == "gemma4"
    vocabulary = tiny_gemma4.gguf_metadata() if gemma4 else gguf_metadata(family)
    rows = len(vocabulary["tokenizer.ggml.tokens"])
    sizes: dict[str, Any] = {"num_hidden_layers": 7}
    if gemma4:
        sizes = {"vocab_size_per_layer_input": rows} | (EXPERTS if experts else {})
    config = config_from_json(config_json(family, vocab_size=rows, **sizes))
    arch = next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == family)
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    writer = gguf.GGUFWriter(path, family)
    given = (GEMMA_4_KEYS if gemma4 else KEYS) | (EXPERT_KEYS if experts else {})
    given |= {x.replace("__", "."): keys[x] for x in keys}
    given = {f"{family}.{name}": value for name, value in given.items()}
    given |= vocabulary | {"tokenizer.ggml.bos_token_id": 2, "tokenizer.ggml.eos_token_id": 1}
    given["tokenizer.ggml.add_space_prefix"] = False
    del given["general.architecture"]  # the writer adds it
    for name, value in given.items():
        if isinstance(value, list):
            writer.add_array(name, value)
        elif value is not None:
            getattr(writer, ADD[type(value)])(name, value)
    stored = {"rope_freqs.weight": torch.tensor(rope_factors(config))} if gemma4 else {}
    weights = random_tensors(family, vocab_size=rows, **sizes)
    for name, tensor in stacked(weights, experts == "separate").items():
        weight = tensor * 0.3 + (tensor.dim() == 1)  # factors: Gemma 1 to 3 have 1 less
        stored[gguf_name(names, name)] = weight
    stored["output_norm.weight"] *= SMALL
    for name, tensor in (stored | (tensors or {})).items():
        if tensor is not None:
            writer.add_tensor(name, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def verify(checkpoint: Checkpoint, *dtypes: torch.dtype) -> tuple[str, list[Finding]]:
    """Checks a checkpoint with a random text. Returns who read it for the truth, in words, and the
    findings. dtypes: float32 by default"""
    truth, model = truth_of(checkpoint, torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, checkpoint.config.vocab_size, (1, 64), generator=generator)
    lines = list(check_ids(checkpoint, truth, model))
    lines += check_model(checkpoint, ids, dtypes or [torch.float32], 8, (truth, model))
    return truth.reader, lines
