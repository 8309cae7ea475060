"""Records launches of every kernel with the shapes of Gemma 1 to 4, but does not run them.

    record_launches()
    with as_on(GPUS[90]):
        launch_all(torch.float16, PROMPTS)
        launch_gemma_4(torch.float16, GEMMA_4)
    kernel, args, kwargs = launches[0]

Use it in a separate process: record_launches() replaces the kernels permanently.
"""

import math
from collections.abc import Callable, Sequence
from importlib import import_module
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from triton import knobs

from gemma_fast.config import GemmaConfig
from gemma_fast.kernels import (
    attention,
    decode_attention,
    embed,
    experts,
    geglu,
    grouped_experts,
    lm_head,
    matvec,
    packed_linear,
    per_layer,
    rmsnorm,
    rotary,
    router,
    sample,
)
from gemma_fast.kernels.launch import Gpu
from gemma_fast.kernels.packed import PackedWeight, Packing, Weight
from gemma_fast.presets import PRESETS

# Limits of an A100, A10, L4, H100, B200 and RTX 5090. The key 90 is compute capability 9.0.
GPUS = {
    gpu.capability: gpu
    for gpu in (
        Gpu(80, 166_912, 108), Gpu(86, 101_376, 72), Gpu(89, 101_376, 58), Gpu(90, 232_448, 132),
        Gpu(100, 232_448, 148), Gpu(120, 101_376, 170),
    )
}  # fmt: skip
WHOLE = 90  # the GPU for which MORE_PROMPTS, MORE_PACKED and fp32 kernels are compiled, too
PROMPTS = (  # kv heads, query heads per kv head, head dim, window, soft cap, q and k norms
    (1, 8, 256, None, None, False),  # Gemma 2B
    (4, 2, 256, 4096, 50.0, False),  # Gemma 2 2B, layers with a window
    (16, 2, 128, None, 50.0, False),  # Gemma 2 27B, layers without a window
    (16, 2, 128, 4096, 50.0, False),  # Gemma 2 27B, layers with a window
    (1, 4, 256, 512, None, True),  # Gemma 3 270M and 1B, layers with a window
)
MORE_PROMPTS = (  # shapes with nearly the same launch configs as PROMPTS
    (16, 1, 256, None, None, False),  # Gemma 7B
    (8, 2, 256, 1024, None, True),  # Gemma 3 12B, layers with a window
    (16, 2, 128, None, None, True),  # Gemma 3 27B, layers without a window
    (16, 2, 128, 1024, None, True),  # Gemma 3 27B, layers with a window
    (1, 4, 256, None, None, True),  # Gemma 3 270M and 1B, layers without a window
    (4, 2, 256, None, 50.0, False),  # Gemma 2 2B, layers without a window
    (2, 4, 64, None, None, False),  # one kv head would give too few rows for BLOCK_M = 128
    (2, 4, 32, None, None, False),
)
GEMMA_4 = (  # kv heads, query heads per kv head, head dim, window, `heads` of decode_attention
    (1, 8, 256, 512, ("qkv", "q")),  # E2B, layers with a window; "q": layers that share K and V
    (1, 8, 512, None, ("qkv", "q")),  # E2B, layers without a window
    (1, 16, 512, None, ("qk",)),  # 12B, layers without a window
)
MORE_GEMMA_4 = (
    (2, 4, 256, 512, ("qkv", "q")),  # E4B
    (2, 4, 512, None, ("qkv", "q")),
    (8, 2, 256, 1024, ("qkv",)),  # 12B
    (16, 2, 256, 1024, ("qkv",)),  # 31B
    (4, 8, 512, None, ("qk",)),
)
# hidden, rows of qkv_proj, columns of o_proj, MLP width, layers with per-layer inputs
GEMMA_4_WEIGHTS = (
    (1536, 8 * 512, 8 * 512, 12288, 35),  # E2B, full layers that share K and V
    (3840, (16 + 2 * 8) * 256, 16 * 256, 15360, 0),  # 12B, layers with a window
)
PER_LAYER = 256  # columns of a layer's per-layer input
E4B = 2560, (8 + 2 * 2) * 256, 8 * 256, 10240, 42  # as in GEMMA_4_WEIGHTS: layers with a window
GEMMA_4_31B = 5376, (32 + 2 * 16) * 256, 32 * 256, 21504, 0
PACKED = (  # preset or dimensions, packing, rows of x: the kinds of GGUF and compressed-tensors
    ("gemma-2b", Packing(4, 32, False, torch.float16), 1),
    ("gemma-2b", Packing(8, 128, False, torch.float16), 8),
    (E4B, Packing(4, 32, True, torch.float16), 8),
    ("gemma-3-270m", Packing(8, 16, True, torch.float16), 1),
)
MORE_PACKED = (
    (E4B, Packing(4, 32, True, torch.float16), 1),
    (E4B, Packing(8, 32, False, torch.float16), 1),
    ("gemma-3-270m", Packing(4, 128, False, torch.bfloat16), 8),
    (GEMMA_4_31B, Packing(4, 32, True, torch.float16), 1),  # widest rows
)
A4B = 2816, 2112, 128, 704, 8  # Gemma 4 26B-A4B: hidden, dense MLP, experts, their width, top k
# Packings of the experts' gate and up, of their down, and of the dense MLP; rows of x. GGUF mixes.
PACKED_EXPERTS = (
    ((None,) * 3, 1),
    ((None,) * 3, 8),
    ((Packing(4, 32, False, torch.float16),) * 3, 1),
    ((Packing(4, 32, True, torch.float16), *(Packing(8, 32, True, torch.float16),) * 2), 8),
)
MORE_PACKED_EXPERTS = (
    ((Packing(4, 32, False, torch.float16),) * 3, 8),
    ((Packing(4, 32, True, torch.float16), *(Packing(8, 32, True, torch.float16),) * 2), 1),
    ((Packing(8, 16, True, torch.float16),) * 3, 1),
    ((Packing(8, 32, False, torch.float16),) * 3, 8),
    ((Packing(4, 64, True, torch.bfloat16), Packing(8, 704, False, torch.bfloat16), None), 1),
)
MODULES = [
    import_module(f"gemma_fast.kernels.{file.stem}")
    for file in sorted((Path(__file__).parents[2] / "kernels").glob("*.py"))
]
launches: list[tuple] = []
PACKED_MEMORY = torch.empty(2**30, dtype=torch.uint8)  # of all packed weights; never written


class Recorder:
    """Replaces a kernel. Records the kernel's launches instead of running them."""

    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        return lambda *args, **kwargs: launches.append((self.kernel, args, kwargs))


def record_launches() -> None:
    """Makes all ops append their launches to `launches` instead of running kernels."""
    for module in MODULES:
        for name, value in vars(module).copy().items():
            if name.startswith("_") and name.endswith("_kernel"):
                setattr(module, name, Recorder(value))
    knobs.runtime.interpret = True  # makes ops launch kernels for CPU tensors


def blank_packed(shape: tuple[int, int], packing: Packing) -> PackedWeight:
    """Returns a weight without memory of its own: a process must be small enough to fork."""
    with torch.device("meta"):
        weight = PackedWeight(shape, packing)
    for name, x in list(weight.named_parameters()):
        part = PACKED_MEMORY[: x.nbytes].view(x.dtype).view(x.shape)
        setattr(weight, name, nn.Parameter(part, requires_grad=False))
    return weight


def launch_all(dtype: torch.dtype, prompts: Sequence[tuple]) -> None:
    """Calls each op with the shapes of Gemma 1 to 4, for prompts and for decode steps."""
    memory = torch.empty(256_000 * 2304, dtype=dtype)  # never written, so it takes no memory

    def blank(*shape: int) -> Tensor:
        return memory[: math.prod(shape)].view(shape)

    launch_prompts(dtype, blank, prompts)
    for shapes in GEMMA_4_WEIGHTS * (dtype != torch.float32):
        for batch in (1, 8):
            launch_gemma_4_step(*shapes, batch, blank, blank)
    for name in ("gemma-2b", "gemma-2-2b", "gemma-3-270m")[2 * (dtype == torch.float32) :]:
        for batch in (1, 8):
            launch_step(PRESETS[name], batch, blank)


def launch_packed(dtype: torch.dtype, steps: Sequence[tuple]) -> None:
    """Calls the matmuls of decode steps with packed weights."""
    memory = torch.empty(2**24, dtype=dtype)  # never written, so it takes no memory

    def blank(*shape: int) -> Tensor:
        return memory[: math.prod(shape)].view(shape)

    for model, packing, batch in steps:

        def weight(out: int, dim: int, packing: Packing = packing) -> PackedWeight:
            return blank_packed((out, dim), packing)

        if isinstance(model, str):
            launch_matmuls(PRESETS[model], batch, blank, weight)
        else:
            launch_gemma_4_step(*model, batch, blank, weight)


def launch_matmuls(
    config: GemmaConfig, batch: int, blank: Callable[..., Tensor], weight: Callable[..., Any]
) -> None:
    """Calls the matmuls of a decode step. `weight` makes a weight, and `blank` other tensors."""
    dim, ffn, d = config.hidden_size, config.intermediate_size, config.head_dim
    heads, n = config.num_attention_heads, config.num_key_value_heads
    x, norm, vocab = blank(batch, dim), blank(dim), weight(config.vocab_size, dim)
    post_norm = norm if config.post_norms else None
    token, position = torch.zeros(batch, dtype=torch.long), torch.zeros(batch, dtype=torch.int32)
    counter = torch.zeros(128, dtype=torch.int32)
    for out, geglu_too in (((heads + 2 * n) * d, False), (2 * ffn, True)):
        matvec.norm_linear(
            x, x, norm, post_norm, weight(out, dim), geglu=geglu_too, pdl=True
        )  # fmt: skip
    for columns in (heads * d, ffn):
        matvec.linear(blank(batch, columns), weight(dim, columns), pdl=True)
    for sampling in ((), (torch.ones(batch), torch.ones(batch).long())):
        lm_head.next_token(
            x, x, norm, post_norm, vocab, position, token, counter, *sampling,
            softcap=config.final_logit_softcapping, pdl=True,
        )  # fmt: skip


def launch_step(config: GemmaConfig, batch: int, blank: Callable[..., Tensor]) -> None:
    """Calls the ops of a decode step, and split_attention, which transformers' layers call."""
    dim, d = config.hidden_size, config.head_dim
    heads, n = config.num_attention_heads, config.num_key_value_heads
    token, position = torch.zeros(batch, dtype=torch.long), torch.zeros(batch, dtype=torch.int32)
    counter = torch.zeros(128, dtype=torch.int32)
    embed.embed(token.unsqueeze(1), blank(config.vocab_size, dim), dim**0.5, pdl=True)
    launch_matmuls(config, batch, blank, blank)
    for sampling in ((), (torch.ones(batch), torch.ones(batch).long())):
        sample.sample_token(
            torch.empty(batch, config.vocab_size), position, token, counter, *sampling
        )
    qk_norm = blank(d) if config.qk_norm else None
    for slots in (512, 8192):
        ring = blank(batch, n, slots, d)
        decode_attention.decode_attention(
            blank(batch, heads + 2 * n, d), ring, ring, *torch.empty(2, slots, d // 2), position,
            counter, qk_norm, qk_norm, scale=1.0, window=config.window(0),
            softcap=config.attn_logit_softcapping, pdl=True,
        )  # fmt: skip
        for left_padding in (None, position):
            decode_attention.split_attention(
                blank(batch, heads, d), ring, ring, position, left_padding, counter, scale=1.0,
                window=config.window(0), softcap=config.attn_logit_softcapping,
            )  # fmt: skip


def launch_gemma_4_step(
    dim: int, qkv: int, o: int, ffn: int, layers: int, batch: int, blank: Callable[..., Tensor],
    weight: Callable[..., Any],
) -> None:  # fmt: skip
    """Calls the matmuls of a Gemma 4 decode step that differ from those of other Gemmas: norms
    have no offset, h is scaled, and E2B and E4B have per-layer inputs. `weight`, `blank`: as in
    launch_matmuls."""
    x, norm, options = blank(batch, 1, dim), blank(dim), {"offset": 0.0, "pdl": True}
    scaled = options | {"layer_scalar": blank(1)}
    matvec.norm_linear(x, x, norm, norm, weight(qkv, dim), **scaled)
    matvec.norm_linear(x, x, norm, norm, weight(2 * ffn, dim), geglu=True, **options)
    for columns in (o, ffn):
        matvec.linear(blank(batch, 1, columns), weight(dim, columns), pdl=True)
    if not layers:
        return
    ids, vocab = torch.zeros(batch, 1, dtype=torch.long), weight(262_144, dim)
    matvec.linear(x, weight(layers * PER_LAYER, dim), pdl=True)
    table = blank(1024, layers * PER_LAYER)
    inputs = per_layer.per_layer_inputs(
        blank(batch, 1, layers * PER_LAYER), ids, table, norm[:PER_LAYER], scale=dim**-0.5,
        **options,
    )  # fmt: skip
    gate = weight(PER_LAYER, dim)
    matvec.norm_linear(x, x, None, norm, gate, up=inputs[:, :, 0], **options)
    matvec.linear(blank(batch, 1, PER_LAYER), weight(dim, PER_LAYER), pdl=True)
    lm_head.next_token(
        x[:, 0], x[:, 0], norm, norm, vocab, torch.zeros(batch, dtype=torch.int32), ids[:, 0],
        torch.zeros(128, dtype=torch.int32), softcap=30.0, **scaled,
    )  # fmt: skip


def launch_experts(dtype: torch.dtype, steps: Sequence[tuple]) -> None:
    """Calls the ops of a mixture of experts for decode steps, and the router for a prompt."""
    dim, ffn, count, width, top_k = A4B
    memory = torch.empty(count * 2 * width * dim, dtype=dtype)  # never written

    def blank(*shape: int) -> Tensor:
        return memory[: math.prod(shape)].view(shape)

    def weight(packing: Packing | None, out: int, columns: int) -> Any:
        return blank(out, columns) if packing is None else blank_packed((out, columns), packing)

    options: dict[str, Any] = {"top_k": top_k, "offset": 0.0, "pdl": True}
    counter, norm = torch.zeros(8, dtype=torch.int32), blank(dim)
    for (gate_up, down, dense), batch in (*steps, ((None,) * 3, 100)):
        x = blank(batch, 1, dim)
        _, hidden, x, chosen, weights = router.norm_router(
            x, x, norm, norm, weight(dense, 2 * ffn, dim), norm, norm, blank(count, dim),
            blank(count), counter, **options,
        )  # fmt: skip
        if batch > 8:
            continue
        parts = (
            weight(gate_up, count * 2 * width, dim), weight(down, count * dim, width), chosen,
            weights,
        )  # fmt: skip
        experts.experts(x, *parts, hidden, weight(dense, dim, ffn), pdl=True)
        experts.experts(x, *parts, pdl=True)
        rmsnorm.add_norm(x, x, norm, offset=0.0, residual_weight=norm, pdl=True)


def launch_prompts(
    dtype: torch.dtype, blank: Callable[..., Tensor], prompts: Sequence[tuple]
) -> None:
    weight = blank(5376)
    for dim in (640, 2048, 2304, 3072, 5376):
        x = blank(2, dim)
        rmsnorm.rms_norm(x, weight[:dim])
        rmsnorm.add_rms_norm(x, x, weight[:dim])
        rmsnorm.add_rms_norm(x, x, weight[:dim], weight[:dim])
    for dim in (1536, 3840):  # Gemma 4 E2B and 12B
        x, norm = blank(2, dim), weight[:dim]
        rmsnorm.rms_norm(x, norm, offset=0.0)
        rmsnorm.add_norm(x, x, norm, offset=0.0)
        for scalar in (None, weight[:1]):
            rmsnorm.add_rms_norm(x, x, norm, norm, offset=0.0, layer_scalar=scalar)
    x, ids = blank(1, 2, 35, PER_LAYER), torch.zeros(1, 2, dtype=torch.long)
    rmsnorm.rms_norm(x, None)
    per_layer.per_layer_inputs(
        x.flatten(2), ids, blank(1024, 35 * PER_LAYER), weight[:PER_LAYER], scale=1536**-0.5,
        pdl=True,
    )  # fmt: skip
    geglu.geglu(blank(1, 2, PER_LAYER), x[:, :, 0])
    for rows in (1, 512):
        geglu.geglu(*blank(rows, 32768).chunk(2, dim=-1))
        geglu.geglu(*blank(2, rows, 6912))
        geglu.gate_up_geglu(blank(rows, 2048), blank(4096, 2048))
    for n, m, d, window, softcap, norm in prompts:
        for t, spare in ((2, 0), (128, 0), (128, 8), (8192, 0), (8192, 8)):
            qkv = blank(1, t, n * m + 2 * n, d)
            q, k, v = qkv.split((n * m, n, n), dim=2)
            keys, values = blank(2, 1, n, max(t, 128) + spare, d)
            cos, sin = torch.empty(2, 1, t, d // 2)
            query_offset = torch.zeros(1, dtype=torch.int32)
            norm_weight = weight[:d] if norm else None
            rotary.rotary_write(k, v, keys, values, cos, sin, query_offset, norm_weight)
            attention.attention(
                q, keys, values, cos, sin, query_offset, norm_weight,
                scale=d**-0.5, window=window, softcap=softcap,
            )  # fmt: skip
            attention.attention(  # as called by transformers' layers: rotated q, left padding
                q, keys, values, None, None, query_offset,
                scale=d**-0.5, left_padding=query_offset, window=window, softcap=softcap,
            )  # fmt: skip


# Weights of prompts, packed: rows, columns, rows of x, packing. One has a scale per row.
PACKED_PROMPTS = (
    (32768, 2048, 1024, Packing(4, 32, False, torch.float16)),  # Gemma 2B, gate and up
    (32768, 2048, 1024, Packing(4, 32, True, torch.float16)),
    (32768, 2048, 1024, Packing(8, 16, True, torch.float16)),
    (32768, 2048, 1024, Packing(8, 128, False, torch.float16)),
    (2048, 16384, 512, Packing(4, 32, False, torch.float16)),  # Gemma 2B, down
    (2048, 16384, 16, Packing(4, 32, True, torch.float16)),
    (2560, 2048, 64, Packing(8, 32, True, torch.float16)),  # Gemma 2B, qkv
    (4096, 640, 300, Packing(4, 640, False, torch.float16)),  # Gemma 3 270M, gate and up
    (640, 2048, 100, Packing(8, 16, True, torch.float16)),  # Gemma 3 270M, down
    (12288, 1536, 40, Packing(8, 32, True, torch.float16)),  # Gemma 4 E2B, gate and up
)


def launch_packed_prompts(dtype: torch.dtype) -> None:
    """Calls the ops that gather packed rows, and packed_linear for prompts."""
    ids = torch.zeros(1, 2, dtype=torch.long)
    for rows, columns, tokens, packing in PACKED_PROMPTS:
        weight = blank_packed((rows, columns), packing).weight
        packed_linear.packed_linear(torch.empty(tokens, columns, dtype=dtype), weight)
    for bits, minimum in product((8, 4), (False, True)):
        packing = Packing(bits, 32, minimum, torch.float16)
        embed.embed(ids, blank_packed((512, 2048), packing), 45.0, dtype=dtype, pdl=True)
        per_layer.per_layer_inputs(
            torch.empty(1, 2, 35 * PER_LAYER, dtype=dtype), ids,
            blank_packed((512, 35 * PER_LAYER), packing), torch.empty(PER_LAYER, dtype=dtype),
            scale=1.0, offset=0.0, pdl=True,
        )  # fmt: skip


# Experts of prompts, packed: rows of x, packing of gate_up_proj and of down_proj.
PACKED_EXPERT_PROMPTS = (
    (8192, Packing(4, 32, False, torch.float16), Packing(4, 32, False, torch.float16)),
    (16, Packing(4, 32, False, torch.float16), Packing(4, 32, False, torch.float16)),
    (1024, Packing(4, 32, True, torch.float16), Packing(8, 32, True, torch.float16)),
    (300, Packing(4, 32, True, torch.float16), Packing(8, 32, False, torch.float16)),
    (600, Packing(8, 16, True, torch.float16), Packing(8, 16, True, torch.float16)),
    (16, Packing(8, 16, True, torch.float16), Packing(8, 16, True, torch.float16)),
    (8192, Packing(8, 128, False, torch.float16), Packing(8, 64, False, torch.float16)),
    (600, Packing(4, 2816, False, torch.bfloat16), Packing(4, 704, False, torch.bfloat16)),
)


def launch_grouped_experts(dtype: torch.dtype) -> None:
    """Calls grouped_experts with the shapes of Gemma 4 26B-A4B. Blocks depend on the number of rows
    per expert."""
    count, top_k, dim, width = 128, 8, 2816, 704
    memory = torch.empty(2 * count * width * dim, dtype=dtype)  # never written
    shapes = (2 * count * width, dim), (count * dim, width)
    plain = [Weight(memory[: math.prod(shape)].view(shape)) for shape in shapes]
    packed = [
        (rows, *(blank_packed(*x).weight for x in zip(shapes, packings, strict=True)))
        for rows, *packings in PACKED_EXPERT_PROMPTS
    ]
    for rows, gate_up, down in [(rows, *plain) for rows in (16, 300, 600, 8192)] + packed:
        x = torch.empty(rows, dim, dtype=dtype)
        chosen, weight = torch.empty(rows, top_k, dtype=torch.int32), torch.empty(rows, top_k)
        grouped_experts.grouped_experts(x, gate_up, down, chosen, weight)


def launch_gemma_4(dtype: torch.dtype, layers: Sequence[tuple]) -> None:
    """Calls the ops of Gemma 4's attention layers, for prompts and for decode steps."""
    memory = torch.empty(2**28, dtype=dtype)  # never written, so it takes no memory

    def blank(*shape: int) -> Tensor:
        return memory[: math.prod(shape)].view(shape)

    for n, m, d, window, inputs in layers:
        for t, spare in ((2, 0), (128, 0), (128, 8), (8192, 0), (8192, 8)):
            launch_gemma_4_prompt(blank, t, spare, n, m, d, window)
        norm, counter = blank(d), torch.zeros(128, dtype=torch.int32)
        for batch, slots, heads in product((1, 8), (512, 8192), inputs):
            ring, position = blank(batch, n, slots, d), torch.zeros(batch, dtype=torch.int32)
            decode_attention.decode_attention(
                blank(batch, n * (m + len(heads) - 1), d), ring, ring,
                *torch.empty(2, slots, d // 2), position, counter, norm,
                None if heads == "q" else norm,
                heads=heads, v_norm=True, offset=0.0, scale=1.0, window=window, pdl=True,
            )  # fmt: skip


def launch_gemma_4_prompt(
    blank: Callable[..., Tensor], t: int, spare: int, n: int, m: int, d: int, window: int | None
) -> None:
    """Calls rotary_write and attention for a prompt of t tokens, and attention as transformers'
    layers call it: rotated queries, left padding."""
    q, k, v = blank(1, t, n * (m + 2), d).split((n * m, n, n), dim=2)
    keys, values = blank(2, 1, n, max(t, 128) + spare, d)
    cos, sin = torch.empty(2, 1, t, d // 2)
    query_offset, norm = torch.zeros(1, dtype=torch.int32), blank(d)
    rotary.rotary_write(
        k, v, keys, values, cos, sin, query_offset, norm, offset=0.0, v_norm=True
    )  # fmt: skip
    attention.attention(
        q, keys, values, cos, sin, query_offset, norm, offset=0.0, scale=1.0, window=window
    )
    attention.attention(
        q, keys, values, None, None, query_offset, left_padding=query_offset, scale=1.0,
        window=window,
    )  # fmt: skip
