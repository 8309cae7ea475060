"""Fetches data into the L2 cache before they are loaded."""

from gemma_fast.kernels._triton import tl, triton


@triton.jit
def prefetch(pointer):
    """Fetches the lines of 128 bytes at these pointers."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [pointer],
        dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip
