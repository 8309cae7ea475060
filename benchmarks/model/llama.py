"""Defines llama.cpp as a provider, through the functions of C that llama-cpp-python exports.

    CMAKE_ARGS=-DGGML_NATIVE=ON pip install llama-cpp-python    # builds from source, for minutes

llama.cpp rounds activations to 8 bits before each matmul with packed weights.
"""

from __future__ import annotations

import ctypes
from typing import Any
from weakref import finalize

import numpy as np
import torch
from torch import Tensor

from gemma_fast.benchmarks.model.cases import Sizes
from gemma_fast.checkpoint.base import Checkpoint
from gemma_fast.checkpoint.rounded import RoundedCheckpoint

CHUNK = 512  # tokens of a prompt that are decoded at once, as in llama-bench


class LlamaCpp:
    """Runs llama.cpp on the checkpoint's .gguf file, one sequence, with as many threads as PyTorch
    and otherwise the settings of llama-bench.

    Has the methods of eager.Eager. Raises NotImplementedError for other checkpoints.
    """

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device) -> None:
        if isinstance(checkpoint, RoundedCheckpoint) or checkpoint.path.suffix != ".gguf":
            raise NotImplementedError("reads .gguf files, without --quantize")
        import llama_cpp

        self.c: Any = llama_cpp
        self.dtype, self.device, self.vocab = dtype, device, checkpoint.config.vocab_size
        self.quiet = llama_cpp.llama_log_callback(lambda *_: None)  # must outlive the calls
        llama_cpp.llama_log_set(self.quiet, ctypes.c_void_p())
        llama_cpp.llama_backend_init()
        options = llama_cpp.llama_model_default_params()
        options.n_gpu_layers = 999 if device.type == "cuda" else 0
        path = str(checkpoint.path).encode()
        self.model = llama_cpp.llama_model_load_from_file(path, options)
        if not self.model:
            raise ValueError(f"llama.cpp does not load {checkpoint.path}")
        finalize(self, llama_cpp.llama_model_free, self.model)
        # llama.cpp keeps all tensors as they are in the file.
        stored = getattr(checkpoint, "stored", {})
        self.bytes = {name: x.n_bytes / x.n_elements for name, x in stored.items()}
        self.free: Any = lambda: None

    def start(self, batch: int, max_length: int, kind: str) -> None:
        if batch > 1:
            raise NotImplementedError("one sequence only")
        self.free()
        options = self.c.llama_context_default_params()
        options.n_ctx = max_length + 1
        options.n_batch = options.n_ubatch = CHUNK
        options.n_threads = options.n_threads_batch = torch.get_num_threads()
        options.swa_full = False  # layers with a window keep only the window
        self.context = self.c.llama_init_from_model(self.model, options)
        if not self.context:
            raise ValueError(f"llama.cpp has no memory for {max_length} tokens")
        self.batch = self.c.llama_batch_init(CHUNK, 0, 1)
        self.free = finalize(self, _free, self.c, self.batch, self.context)

    def prefill(self, ids: Tensor) -> Tensor:
        self.c.llama_memory_clear(self.c.llama_get_memory(self.context), True)
        self.length = 0
        return self.extend(ids)

    def extend(self, ids: Tensor) -> Tensor:
        # NumPy's argmax, because PyTorch's would leave threads spinning beside llama.cpp's.
        (row,) = self._decode(ids, keep=1)
        self.token = torch.tensor([int(row.argmax())], device=self.device)
        return self.token

    def step(self) -> Tensor:
        return self.extend(self.token[:, None])

    def logits(self, ids: Tensor) -> Tensor:
        rows = torch.from_numpy(np.stack(self._decode(ids, keep=ids.shape[1])))
        return rows[None].to(self.device, self.dtype)

    def memory(self) -> dict[str, float]:
        return {}

    def sizes(self) -> Sizes:
        return self.bytes

    def _decode(self, ids: Tensor, keep: int) -> list[np.ndarray]:
        """Returns the logits :: [vocab] of each of the last `keep` tokens of ids :: [1, t]. Those
        of the last part are llama.cpp's memory, which the next call overwrites."""
        tokens, found = ids[0].tolist(), list[np.ndarray]()
        for start in range(0, len(tokens), CHUNK):
            part = tokens[start : start + CHUNK]
            wanted = [start + i >= len(tokens) - keep for i in range(len(part))]
            for i, token in enumerate(part):
                self.batch.token[i], self.batch.pos[i] = token, self.length + i
                self.batch.n_seq_id[i], self.batch.seq_id[i][0] = 1, 0
                self.batch.logits[i] = wanted[i]
            self.batch.n_tokens = len(part)
            found = [x.copy() for x in found]
            if status := self.c.llama_decode(self.context, self.batch):
                raise RuntimeError(f"llama_decode returns {status}")
            self.length += len(part)
            for i in (i for i, x in enumerate(wanted) if x):
                row = self.c.llama_get_logits_ith(self.context, i)
                found.append(np.ctypeslib.as_array(row, shape=(self.vocab,)))
        return found


def _free(c: Any, batch: Any, context: Any) -> None:
    c.llama_batch_free(batch)
    c.llama_free(context)
