"""Tests overrides of launch configs, and as_on, which replaces the GPU's limits. Also tests when
kernels may use programmatic dependent launch and tensor descriptors."""

import torch

from gemma_fast.kernels.launch import Gpu, as_on, gpu, launch_config, override

CPU, H100, A100 = torch.device("cpu"), Gpu(90, 232_448, 132), Gpu(80, 166_912, 108)


def test_an_override_ends_with_its_context():
    table = launch_config("a kernel", {"BLOCK": 4, "num_warps": 8})
    with override("a kernel", BLOCK=2):
        assert launch_config("a kernel", table) == table | {"BLOCK": 2}
        assert launch_config("another", table) == table
        with override("a kernel", num_warps=1):
            assert launch_config("a kernel", table) == table | {"BLOCK": 2, "num_warps": 1}
        assert launch_config("a kernel", table) == table | {"BLOCK": 2}
    assert launch_config("a kernel", table) == table


def test_as_on_replaces_the_gpus_limits():
    own = gpu(CPU)
    with as_on(H100):
        assert gpu(CPU) == H100
        with as_on(A100):
            assert gpu(CPU) == A100
        assert gpu(CPU) == H100
    assert gpu(CPU) == own


def test_kernels_overlap_from_capability_9_0_on():
    """Kernels overlap by programmatic dependent launch (PDL)."""
    assert H100.pdl_options(True) == {"PDL": True, "launch_pdl": True}
    assert H100.pdl_options(False) == A100.pdl_options(True) == {"PDL": False}


def test_descriptors_need_16_bit_elements_and_16_byte_strides():
    x = torch.zeros(4, 72, dtype=torch.float16)
    assert H100.can_describe(x, x[1:]) and not A100.can_describe(x)
    assert not H100.can_describe(x, x.float())
    assert not H100.can_describe(x[:, 1:]) and not H100.can_describe(torch.zeros(4, 60).half())
