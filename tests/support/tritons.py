"""Compiles every kernel under several versions of Triton, applies the gates, and prints a table.

    make tritons
    python tests/support/tritons.py .venv/triton-3.6.0 .venv/triton-3.9.0 --gpu 90

A folder holds one version, installed without its torch (pip install --no-deps --target); the
environment's own version is always compiled with. Exits with 1 if a kernel breaks a gate.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import click
from compile_kernels import GPUS
from gates import GATES, is_prefill_attention
from rich.console import Console
from rich.progress import track
from rich.table import Table

REPORT = Path(__file__).with_name("compile_kernels.py")


def compile_with(folder: Path | None, *arguments: str) -> list[dict]:
    """What compile_kernels.py reports with the Triton in the folder, or with the environment's."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    if folder:
        environment["PYTHONPATH"] = f"{folder.resolve()}:{environment.get('PYTHONPATH', '')}"
    command = [sys.executable, "-W", "error::UserWarning", REPORT, *arguments]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    if run.returncode:
        raise click.ClickException(run.stderr[-3000:])
    return [json.loads(line) for line in run.stdout.splitlines()]


def version(folder: Path | None) -> str:
    if folder is None:
        from triton import __version__

        return __version__
    return next(folder.glob("triton-*.dist-info")).name.split("-")[1].removesuffix(".dist")


@click.command(help=__doc__.split("\n")[0])
@click.argument("folders", nargs=-1, type=click.Path(exists=True, path_type=Path))
@click.option("--gpu", "gpus", multiple=True, type=int, help="90: compute capability 9.0.")
def main(folders: tuple[Path, ...], gpus: tuple[int, ...]) -> None:
    todo = [(x, gpu) for x in sorted([None, *folders], key=version) for gpu in gpus or GPUS]
    table = Table("Triton", "GPU", "kernels", "prefill attention, registers", *GATES)
    broken = []
    for folder, gpu in track(todo, "Compiling", console=Console(stderr=True)):
        kernels = compile_with(folder, str(gpu))
        registers = [k["registers"] for k in kernels if is_prefill_attention(k)]
        cells = []
        for name, gate in GATES.items():
            found = [(k, wrong) for k in kernels if (wrong := gate(k, GPUS[gpu]))]
            cells.append(f"{len(found)} broken" if found else "ok")
            broken += [
                f"{version(folder)} {gpu} {name}: {wrong}: {k['kernel']} {k['types'][0]} "
                f"{k['options']}"
                for k, wrong in found
            ]
        span = f"{min(registers)} to {max(registers)}"
        table.add_row(version(folder), f"{gpu / 10}", str(len(kernels)), span, *cells)
    Console(width=None if sys.stdout.isatty() else 200).print(table)
    print("\n".join(broken))
    sys.exit(bool(broken))


if __name__ == "__main__":
    main()
