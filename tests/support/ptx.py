"""Inspects a kernel's PTX: what it loads before it waits for the previous kernel (PDL)."""

import re

import networkx

WAIT = "griddepcontrol.wait"
LOAD = re.compile(r"ld\.global\S* ")
WIDE_LOAD = re.compile(r"ld\.global\S*\.v4\S* ")
NARROW_LOAD = re.compile(r"ld\.global(?!\S*\.v4)\S* ")


def before_waits(ptx: str) -> list[dict[str, int]]:
    """Returns a dict per wait, in the order of the PTX: the number of loads on the paths from the
    start to this wait that pass no other wait (`loads`), of those that load 16 bytes (`wide`), and
    of prefetches into the L2 cache (`prefetches`)."""
    lines = [x.strip() for x in ptx.splitlines()]
    lines = lines[next(i for i, x in enumerate(lines) if ".entry" in x) :]
    labels = {found[1]: i for i, x in enumerate(lines) if (found := re.match(r"(\$\w+):", x))}
    graph = networkx.DiGraph()
    graph.add_nodes_from(range(len(lines)))
    for i, line in enumerate(lines[:-1]):
        if WAIT in line:
            continue
        if branch := re.search(r"\bbra\S*\s+(\$\w+)", line):
            graph.add_edge(i, labels[branch[1]])
        if not re.match(r"(bra|ret|exit)\b", line):
            graph.add_edge(i, i + 1)
    reached = networkx.descendants(graph, 0)
    found = []
    for i in (i for i, line in enumerate(lines) if WAIT in line):
        before = [lines[j] for j in networkx.ancestors(graph, i) & reached]
        found.append({
            "loads": sum(bool(LOAD.search(x)) for x in before),
            "wide": sum(bool(WIDE_LOAD.search(x)) for x in before),
            "prefetches": sum("prefetch.global.L2" in x for x in before),
        })  # fmt: skip
    return found
