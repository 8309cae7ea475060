"""Writes tiny random checkpoints, and checks them as `gemma-fast verify` does."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import torch
import transformers
from checkpoints import random_tensors
from tiny_models import CONFIGS, random_transformers_model
from tiny_tokenizer import gguf_metadata, tiny_backend
from torch import Tensor, nn

from gemma_fast.benchmarks.model.transformers_model import transformers_config
from gemma_fast.benchmarks.verify.ids import check_ids
from gemma_fast.benchmarks.verify.margins import Finding
from gemma_fast.benchmarks.verify.model import check_model
from gemma_fast.benchmarks.verify.truth import truth_of
from gemma_fast.checkpoint.base import Checkpoint
from gemma_fast.config import GemmaConfig

ADD = {bool: "add_bool", int: "add_uint32", float: "add_float32", str: "add_string"}
KEYS: dict[str, Any] = {
    "context_length": 512, "embedding_length": 64, "block_count": 7, "feed_forward_length": 96,
    "attention.head_count": 2, "attention.head_count_kv": 1, "attention.key_length": 32,
    "attention.value_length": 32, "attention.layer_norm_rms_epsilon": 1e-6,
}  # fmt: skip


def write_directory(
    path: Path, name: str = "gemma3-gqa", head: bool = False, **config: Any
) -> Path:
    """Writes what transformers saves, and a tokenizer. head: the model has an output head of its
    own, although its config says that it is tied; config: fields to set in config.json"""
    source = CONFIGS["gemma3-gqa" if name == "multimodal" else name]
    backend = tiny_backend(source.model_type)
    source = replace(source, vocab_size=backend.get_vocab_size())
    model = multimodal(source) if name == "multimodal" else random_transformers_model(source)
    if head:
        rows, hidden = model.get_input_embeddings().weight.shape
        torch.manual_seed(0)
        model.set_output_embeddings(nn.Linear(hidden, rows, bias=False))
    model.save_pretrained(path)
    if config:
        file = path / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | config))
    backend.save(str(path / "tokenizer.json"))
    return path


def multimodal(text: GemmaConfig) -> transformers.PreTrainedModel:
    """Returns a Gemma 3 that also reads images, with random weights."""
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
    path: Path, family: str, tensors: dict[str, Tensor] | None = None, **keys: Any
) -> Path:
    """Writes a GGUF file of 7 layers, with a tokenizer, with the names that llama.cpp uses.

    tensors: further tensors, under their stored names
    keys: metadata below the family's name, with __ for the dot; None: without this key
    """
    vocabulary = gguf_metadata(family)
    sizes = {"vocab_size": len(vocabulary["tokenizer.ggml.tokens"]), "num_hidden_layers": 7}
    arch = next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == family)
    names = gguf.get_tensor_name_map(arch, 7)
    writer = gguf.GGUFWriter(path, family)
    given = KEYS | {name.replace("__", "."): value for name, value in keys.items()}
    given = {f"{family}.{name}": value for name, value in given.items()}
    given |= vocabulary | {"tokenizer.ggml.bos_token_id": 2, "tokenizer.ggml.eos_token_id": 1}
    given["tokenizer.ggml.add_space_prefix"] = False
    del given["general.architecture"]  # the writer adds it
    for name, value in given.items():
        if isinstance(value, list):
            writer.add_array(name, value)
        elif value is not None:
            getattr(writer, ADD[type(value)])(name, value)
    for name, tensor in random_tensors(family, **sizes).items():
        weight = tensor * 0.3 + (tensor.dim() == 1)  # GGUF stores 1 + weight of norms
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), weight.numpy())
    for name, tensor in (tensors or {}).items():
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
