"""Runs a job on Ray Data: rows of files → actors with a model each → answers in files of a folder.

Ray schedules, retries and moves the data, and its checkpoints let a job go on. Each actor computes
its rows as a job on one machine does.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import PurePosixPath
from typing import Any, NamedTuple

import torch

from gemma_fast.batch.answers import as_line, check_record
from gemma_fast.batch.job import Job
from gemma_fast.batch.local import answers_of
from gemma_fast.batch.rows import READERS, Numbered, parse_line, read_rows
from gemma_fast.causal_lm import GemmaForCausalLM
from gemma_fast.text.tokenizer import Tokenizer

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # read when Ray is imported
try:
    import pyarrow as pa
    import ray
    from pyarrow import fs
    from ray.data import ActorPoolStrategy, DataContext, Dataset
    from ray.data.checkpoint import CheckpointConfig
    from ray.data.datasource import BlockBasedFileDatasink, FileBasedDatasource
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(f'--ray needs Ray ({error}): pip install ".[ray]"') from error

# Other formats, whose rows get no numbers: suffix → function of ray.data.
RAY_READERS = {
    ".csv": "read_csv", ".json": "read_json", ".avro": "read_avro", ".orc": "read_orc",
    ".txt": "read_text",
}  # fmt: skip
BLOCK = 8  # batches of texts that an actor gets at a time
OTHER_CPUS = 2  # that read, write, and leave out the rows that are done
KEY = "key"  # column with the file and number of a row


class Summary(NamedTuple):
    """Numbers of answers that this run of a job wrote, and of errors in them."""

    rows: int
    errors: int


class Place(NamedTuple):
    """A path on a filesystem that Ray reads and writes."""

    system: Any
    path: str

    @classmethod
    def of(cls, uri: str) -> Place:
        """uri  a path of this machine, or s3://…, gs://…, hdfs://…"""
        return cls(*fs.FileSystem.from_uri(uri if "://" in uri else os.path.abspath(uri)))

    def files(self) -> list[str]:
        """Returns the paths of the files in the folder, or of the file. Ray ignores those whose
        names begin with . or _."""
        info = self.system.get_file_info(self.path)
        if info.type == fs.FileType.File:
            return [self.path]
        found = self.system.get_file_info(
            fs.FileSelector(self.path, allow_not_found=True, recursive=True)
        )
        paths = [x.path for x in found if x.type == fs.FileType.File]
        return [path for path in paths if PurePosixPath(path).name[0] not in "._"]


def run_on_ray(
    job: Job, source: str, out: str, *, address: str = "local", workers: int | None = None
) -> Summary:
    """Runs a job, and writes files of JSON Lines into a folder.

    source   a file or folder, as a path or URI that all machines can read: .jsonl, .parquet, or a
             format of RAY_READERS
    out      a folder, as a path or URI that all machines can write
    address  of a Ray cluster; "local": starts Ray on this machine, and stops it at the end
    workers  number of models; None: one for each GPU of the cluster, or one without GPUs

    Raises ValueError if `source` has no rows that can be read, if `out` has answers of another job,
    or if Ray gives up, for example because the model cannot be loaded. Raises ConnectionError if
    there is no cluster at `address`. With "local", raises the errors of Tokenizer.from_pretrained.
    """
    suffix = _suffix(Place.of(source), source)
    if address == "local":  # without a model, the job ends before Ray starts
        Tokenizer.from_pretrained(job.model).require_bos()
    cpus = (os.cpu_count() or 1) + OTHER_CPUS
    local: dict[str, Any] = (
        {"include_dashboard": False, "num_cpus": cpus} if address == "local" else {}
    )
    ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, **local)
    try:
        context = DataContext.get_current()
        context.enable_progress_bars = sys.stderr.isatty()
        logging.getLogger("ray.data").setLevel(logging.CRITICAL)
        checkpoint = _prepare_folder(job, source, out)
        if suffix in READERS:
            context.checkpoint_config = checkpoint
            rows = ray.data.read_datasource(_RowSource(_plain(source)))
        else:
            context.checkpoint_config = None
            rows = getattr(ray.data, RAY_READERS[suffix])(_plain(source))
        answers = _Answers(_plain(out))
        _answered(rows, job, workers).write_datasink(answers)
        return Summary(int(answers.rows), int(answers.errors))
    except ray.exceptions.RayError as error:
        reason = str(error).strip().rpartition("\n")[2]
        raise ValueError(f"the job on Ray ended: {reason}") from error
    finally:
        ray.shutdown()


def _plain(path: str) -> str:
    return path if "://" in path else os.path.abspath(path)


def _suffix(place: Place, source: str) -> str:
    """Returns the suffix of the files, which have one format."""
    found = {PurePosixPath(path).suffix for path in place.files()}
    known = [*READERS, *RAY_READERS]
    if len(found) != 1 or not found <= {*known}:
        shown = ", ".join(sorted(found)) or "no files"
        raise ValueError(f"{source}: found {shown}: all files must have one of {', '.join(known)}")
    return found.pop()


def _prepare_folder(job: Job, source: str, out: str) -> CheckpointConfig:
    """Checks that the folder is empty, or that this job began and did not end it. Returns where Ray
    keeps the rows that are done."""
    place = Place.of(out)
    record = {**job.record(), "source": source}
    side, checkpoint = f"{place.path}.job.json", f"{place.path}.checkpoint"
    system = place.system
    if not place.files():
        system.create_dir(str(PurePosixPath(side).parent))
        with system.open_output_stream(side) as file:
            file.write(json.dumps(record, indent=1).encode() + b"\n")
        if system.get_file_info(checkpoint).type == fs.FileType.Directory:
            system.delete_dir(checkpoint)
        return CheckpointConfig(KEY, f"{_plain(out)}.checkpoint")
    try:
        with system.open_input_stream(side) as file:
            begun = json.loads(file.readall())
    except (OSError, ValueError) as error:
        raise ValueError(f"{out} is not empty: pass another --out") from error
    check_record(begun, record, out)
    if system.get_file_info(checkpoint).type != fs.FileType.Directory:
        raise ValueError(f"{out} has all answers of this job, or cannot go on: pass another --out")
    return CheckpointConfig(KEY, f"{_plain(out)}.checkpoint")


def _answered(rows: Dataset, job: Job, workers: int | None) -> Dataset:
    resources = ray.cluster_resources()
    gpus = 0 if job.device == "cpu" else int(resources.get("GPU", 0))
    workers = workers or gpus or 1
    share = max(resources.get("CPU", 1) - OTHER_CPUS, 0) / workers
    threads = None if gpus else max(int(share), 1)
    # Ray wants a whole number of CPUs above 1.
    cost: dict[str, Any] = {"num_gpus": 1} if gpus else {"num_cpus": int(share) or share}
    size = BLOCK * job.batch_size
    return rows.repartition(target_num_rows_per_block=size).map_batches(
        _Actor, fn_constructor_args=(job, threads), batch_size=size,
        batch_format="pyarrow", compute=ActorPoolStrategy(size=workers), **cost,
    )  # fmt: skip


class _RowSource(FileBasedDatasource):
    """Reads rows as read_rows() does: a block has the file, number and JSON of rows, or their
    errors."""

    def _open_input_source(self, filesystem: Any, path: str, **open_args: Any) -> Any:
        return filesystem.open_input_file(path)  # Parquet is not read from start to end

    def _read_stream(self, f: Any, path: str) -> Iterator[pa.Table]:
        rows = enumerate(read_rows(io.BufferedReader(f), path))
        while part := [*islice(rows, 1024)]:
            yield pa.Table.from_pylist(
                [
                    {
                        KEY: f"{path}:{number}", "file": path, "number": number,
                        "line": "" if isinstance(row, ValueError) else as_line(row).decode(),
                        "error": str(row) if isinstance(row, ValueError) else "",
                    }
                    for number, row in part
                ]
            )  # fmt: skip


class _Actor:
    """Has a model, and answers the rows of a block."""

    def __init__(self, job: Job, threads: int | None) -> None:
        """threads  number of threads of PyTorch on CPUs; None: its default"""
        if threads is not None:
            torch.set_num_threads(threads)
        self.job = job
        self.tokenizer = Tokenizer.from_pretrained(job.model)
        self.tokenizer.require_bos()
        self.model = GemmaForCausalLM.from_pretrained(
            job.model, dtype=job.dtype, device=job.device, quantize=job.quantize
        )

    def __call__(self, table: pa.Table) -> Iterator[pa.Table]:
        numbered = [*map(_numbered, table.to_pylist())]
        for answer in answers_of(self.model, self.tokenizer, self.job, numbered):
            key = f"{answer.get('file')}:{answer['row']}"
            if "file" not in answer:
                del answer["row"]
            line = as_line(answer).decode()
            yield pa.table({KEY: [key], "line": [line], "error": ["error" in answer]})


def _numbered(row: dict[str, Any]) -> Numbered:
    """Returns a row of _RowSource or of a reader of Ray, which has no number: a hash of the row
    takes its place as the seed."""
    if {KEY, "file", "number", "line", "error"} <= row.keys():
        parsed = ValueError(row["error"]) if row["error"] else parse_line(row["line"].encode())
        return Numbered(row["number"], parsed, row["file"])
    row = {name: value for name, value in row.items() if value is not None}
    digest = hashlib.sha256(as_line(row)).digest()
    return Numbered(int.from_bytes(digest[:4], "big"), row)


class _Answers(BlockBasedFileDatasink):
    """Writes lines. After the job, rows and errors are the numbers of answers."""

    def __init__(self, path: str) -> None:
        super().__init__(path, file_format="jsonl")
        self.rows = self.errors = 0

    def write_block_to_file(self, block: Any, file: Any) -> None:
        for line in block.to_arrow()["line"].to_pylist():
            file.write(line.encode())

    def write(self, blocks: Any, ctx: Any) -> Any:
        blocks = [*blocks]
        super().write(blocks, ctx)
        return sum(sum(pa.table(block)["error"].to_pylist()) for block in blocks)

    def on_write_complete(self, write_result: Any) -> None:
        self.rows, self.errors = write_result.num_rows, sum(write_result.write_returns)
        super().on_write_complete(write_result)
