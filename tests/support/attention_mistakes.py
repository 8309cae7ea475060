"""Oracles of attention with one mistake each, which the checks of the tests must detect."""

import inspect
from collections.abc import Callable

import oracles
from kernel_checks import tf32


def attend(**changes: Callable) -> dict[str, Callable]:
    """Returns softmax_attention with changed arguments: name → function of the right value."""
    names = inspect.signature(oracles.softmax_attention).parameters

    def wrong(*args):
        given = dict(zip(names, args, strict=True))
        given |= {name: change(given[name]) for name, change in changes.items()}
        return oracles.softmax_attention(**given)

    return {"softmax_attention": wrong}


def norm(x, positions, weight, offset):
    return oracles.normed_and_rotated(x, positions, weight, offset - 1)


def norm_plus_one(x, positions, weight, offset):
    return oracles.normed_and_rotated(x, positions, weight, offset + 1)


def rounded_angles(*args):
    return tuple(x.half().float() for x in oracles.angles(*args))


# Mistakes of attention over rotated queries and keys, and mistakes of their norms and rotation:
# name → {name of an oracle: the wrong oracle}.
OF_SOFTMAX = {
    "window one too long": attend(window=lambda w: w + 1),
    "window one too short": attend(window=lambda w: w - 1),
    "next key visible": attend(k_positions=lambda p: p - 1),
    "no soft cap": attend(softcap=lambda _: None),
    "another soft cap": attend(softcap=lambda cap: 1.01 * cap),
    "another scale": attend(scale=lambda scale: 1.001 * scale),
    "queries in TF32": attend(q=lambda q: tf32(q.float()).double()),
    "values in TF32": attend(v=lambda v: tf32(v.float())),
}
OF_ROTATION = {
    "norm without 1 +": {"normed_and_rotated": norm},
    "cos and sin rounded": {"angles": rounded_angles},
}
OF_GEMMA_4 = {
    "norm with 1 +": {"normed_and_rotated": norm_plus_one},
    "values not normalized": {"normed": lambda v: v.double()},
    "values 0.01 % smaller": {"normed": lambda v: oracles.normed(v) * (1 - 1e-4)},
}
