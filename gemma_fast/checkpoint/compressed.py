"""Finds the weights that the library compressed-tensors has quantized among the tensors of a file.

A weight is quantized if its tensors say so, whatever `targets` and `ignore` in config.json say. The
tensors' names, dtypes and shapes tell to which of the config's groups it belongs.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from gemma_fast.checkpoint.compressed_weight import LAYOUTS, CompressedWeight, Part, Read
from gemma_fast.checkpoint.quantization_config import Quantization, Scheme

PART = re.compile(r"(.+)\.(weight(?:_(?:packed|scale|zero_point|shape|g_idx|global_scale))?)")
# Tensors for quantizing activations, keys and values, which this project does not do.
ACTIVATION = re.compile(r".+\.(?:input|output|[qkv])_(?:scale|zero_point|global_scale)")


def find_weights(
    tensors: Mapping[str, Part], quantization: Quantization | None, read: Read
) -> tuple[dict[str, CompressedWeight], set[str]]:
    """Returns name → weight for the quantized weights among the tensors of a model, and the names
    of the tensors that only quantization needs. Raises ValueError for a weight that fits none of
    the schemes."""
    modules: dict[str, dict[str, Part]] = {}
    used = {name for name in tensors if quantization and ACTIVATION.fullmatch(name)}
    schemes = quantization.schemes if quantization else ()
    for name, part in tensors.items():
        if match := PART.fullmatch(name):
            modules.setdefault(match[1], {})[match[2]] = part
    found = {}
    for module, parts in modules.items():
        narrow = schemes and "weight" in parts and parts["weight"].dtype in ("I8", "F8_E4M3")
        if narrow or parts.keys() != {"weight"}:
            found[f"{module}.weight"] = _weight(parts, schemes, read)
            used |= {f"{module}.{suffix}" for suffix in parts}
    return found, used


def warn_of_unpacked(path: Path, weights: Iterable[CompressedWeight]) -> None:
    """Warns if weights cannot stay packed."""
    unpacked = [weight for weight in weights if weight.packing is None]
    if not unpacked:
        return
    sizes = {weight: weight.shape[0] * weight.shape[1] / 1e9 for weight in unpacked}
    stored = sum(size * weight.scheme.bits / 8 for weight, size in sizes.items())
    first = unpacked[0]
    warnings.warn(
        f"{path}: {len(unpacked)} weights, for example {first.values.name} ({first.scheme.format}),"
        f" do not stay packed. Unpacked to 16 bits, they take {2 * sum(sizes.values()):.3g} GB"
        f" instead of {stored:.3g} GB, and twice that in float32, and decoding is as much slower."
        " quantize='int8' rounds them to 8 bits",
        stacklevel=2,
    )


def warn_of_computed(path: Path, computed: Sequence[str]) -> None:
    """Warns if the file's scheme quantizes more than weights."""
    if computed:
        warnings.warn(
            f"{path}: its scheme also quantizes {' and '.join(computed)} while the model runs; here"
            " only weights are quantized, so logits differ slightly from those of vLLM",
            stacklevel=2,
        )


def _weight(parts: Mapping[str, Part], schemes: Sequence[Scheme], read: Read) -> CompressedWeight:
    """Returns the weight that some tensors store, in the one scheme that they fit."""
    first = parts[max(parts)]  # not X.weight itself, if there is another
    if not schemes:
        raise first.error(
            "belongs to a quantized weight, but config.json describes none: download it again"
        )
    stored = {(suffix, part.dtype) for suffix, part in parts.items()}
    fitting = [scheme for scheme in schemes if LAYOUTS[scheme.format][:2] in stored]
    found: dict[tuple[int, int], CompressedWeight] = {}  # by block
    problems = []
    for scheme in fitting or schemes:
        try:
            weight = CompressedWeight(parts, scheme, read)
        except ValueError as error:
            problems.append(error)
            continue
        known = found.setdefault(weight.block, weight)
        if scheme.bits > known.scheme.bits:  # both read the same values, in int8
            found[weight.block] = weight
    if len(found) > 1:
        raise first.error(f"fits several config groups, with blocks {', '.join(map(str, found))}")
    if not found:
        raise problems[0]
    return next(iter(found.values()))
