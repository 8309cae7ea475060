"""Compiles every kernel with several versions of Triton, applies gates.py, and prints a table.

    make tritons
    python tests/support/tritons.py .venv/triton-3.6.0 .venv/triton-3.9.0 --gpu 90

Each folder contains one version of Triton, installed without dependencies (pip install --no-deps
--target). The environment's own version is always included. The script exits with 1 if a kernel
fails a gate, which is a condition of gates.py, or if a version cannot compile the kernels.
"""

import json
import os
import subprocess
import sys
from importlib.metadata import distributions
from pathlib import Path

import click
import triton
from gates import GATES, is_prefill_attention
from gemma_launches import GPUS
from rich.console import Console
from rich.progress import track
from rich.table import Table

REPORT = Path(__file__).with_name("compile_kernels.py")


def compile_with(folder: Path | None, *arguments: str) -> list[dict]:
    """Runs compile_kernels.py with the Triton in `folder` (None: the environment's Triton), and
    returns its reports."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    if folder:
        path = [str(folder.resolve()), environment.get("PYTHONPATH", "")]
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, path))
    command = [sys.executable, "-W", "error::UserWarning", REPORT, *arguments]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    if run.returncode:
        raise RuntimeError(run.stderr[-3000:])
    return [json.loads(line) for line in run.stdout.splitlines()]


def version(folder: Path | None) -> str:
    if folder is None:
        return triton.__version__
    found = [x.version for x in distributions(name="triton", path=[str(folder)])]
    if not found:
        raise click.BadParameter(f"there is no Triton in {folder}: `make tritons` installs it")
    return found[0]


def by_version(folder: Path | None) -> list[int]:
    return [int(x) for x in version(folder).split("+")[0].split(".")]


@click.command(help=__doc__.split("\n")[0])
@click.argument("folders", nargs=-1, type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option(
    "--gpu", "gpus", multiple=True, type=click.Choice([str(x) for x in GPUS]),
    help="90 is compute capability 9.0. May be repeated. Default: all.",
)  # fmt: skip
def main(folders: tuple[Path, ...], gpus: tuple[str, ...]) -> None:
    ordered = sorted([None, *folders], key=by_version)
    todo = [(folder, int(gpu)) for folder in ordered for gpu in gpus or GPUS]
    table = Table("Triton", "GPU", "kernels", "prefill attention, registers", *GATES)
    broken = []
    for folder, gpu in track(todo, "Compiling", console=Console(stderr=True)):
        where = version(folder), f"{gpu / 10}"
        try:
            kernels = compile_with(folder, str(gpu))
        except RuntimeError as problem:
            table.add_row(*where, "failed")
            broken.append(f"{' '.join(where)}: {problem}")
            continue
        registers = [k["registers"] for k in kernels if is_prefill_attention(k)]
        cells = []
        for name, gate in GATES.items():
            found = [(k, wrong) for k in kernels if (wrong := gate(k, GPUS[gpu]))]
            cells.append(f"{len(found)} broken" if found else "ok")
            broken += [
                f"{' '.join(where)} {name}: {wrong}: {k['kernel']} {k['types'][0]} {k['options']}"
                for k, wrong in found
            ]
        table.add_row(*where, str(len(kernels)), f"{min(registers)} to {max(registers)}", *cells)
    Console(width=None if sys.stdout.isatty() else 200).print(table)
    for line in broken:
        print(line)
    sys.exit(bool(broken))


if __name__ == "__main__":
    main()
