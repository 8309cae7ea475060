"""Tests that the command `gemma-fast verify` detects mistakes in a model. Also tests its output.

The output is called the certificate: one line per check, with errors, their limits and a verdict.
"""

import json
import subprocess
import sys

import pytest
import torch
from c_kernels import without_c
from certificate_lines import BF16, CPU, FP32, exact_gelu, failed, model_lines
from click.testing import CliRunner
from tiny_models import CONFIGS
from verified_files import write_directory, write_gguf_file

from gemma_fast.benchmarks.kernels import rmsnorm
from gemma_fast.benchmarks.verify import certificate as verify
from gemma_fast.benchmarks.verify import kernels as verify_kernels
from gemma_fast.benchmarks.verify import margins
from gemma_fast.benchmarks.verify import model as verify_model
from gemma_fast.causal_lm import GemmaForCausalLM
from gemma_fast.checkpoint.random import RandomCheckpoint
from gemma_fast.cli.commands import main
from gemma_fast.kernels import geglu as geglu_file
from gemma_fast.model.layer import Layer

TINY = ("verify", "--model", "tiny", "--device", "cpu", "--tokens", "8")


def test_exact_gelu_fails_the_certificate(monkeypatch):
    monkeypatch.setattr(geglu_file, "geglu_reference", exact_gelu)
    with without_c():  # so that the reference runs
        assert "|Δ logit|, mean / max" in failed(model_lines().values())


def test_window_off_by_one_fails_the_certificate(monkeypatch):
    attend = Layer.attend

    def wider(self, *args):
        with pytest.MonkeyPatch.context() as patch:
            window = self.shape.window
            patch.setattr(self, "shape", self.shape._replace(window=window and window + 1))
            return attend(self, *args)

    monkeypatch.setattr(Layer, "attend", wider)
    assert "|Δ logit|, mean / max" in failed(model_lines().values())


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_wrong_first_new_token_fails_the_certificate(dtype, monkeypatch):
    generate = GemmaForCausalLM.generate

    def wrong(self, ids, *args, **options):
        out = generate(self, ids, *args, **options)
        first = ids.shape[1]  # index of the first new token
        out[:, first] = (out[:, first] + 1) % 190
        return out

    monkeypatch.setattr(GemmaForCausalLM, "generate", wrong)
    assert failed(model_lines(dtypes=[dtype]).values()) == {
        "24 greedy tokens: until they differ / gap", "batch 8: |Δ logit| / equal texts / gap",
    }  # fmt: skip


def test_logits_that_vary_between_runs_fail_the_certificate(monkeypatch):
    forward = GemmaForCausalLM.forward

    def noisy(self, *args, **options):
        out = forward(self, *args, **options)
        return out._replace(logits=out.logits * (1 + 1e-6 * torch.rand(())))

    monkeypatch.setattr(GemmaForCausalLM, "forward", noisy)
    assert failed(model_lines().values()) == {"3 runs: differing logits / texts"}


def test_ignored_attention_mask_fails_the_certificate(monkeypatch):
    forward = GemmaForCausalLM.forward

    def without_mask(self, ids, attention_mask=None, position_ids=None, **options):
        return forward(self, ids, **options)

    monkeypatch.setattr(GemmaForCausalLM, "forward", without_mask)
    (check,) = failed(model_lines().values())
    assert check.startswith("batch 8")


def test_checked_dtypes_depend_on_model_device_and_memory():
    gemma2, gemma3 = (RandomCheckpoint(CONFIGS[f"{name}-gqa"]) for name in ("gemma2", "gemma3"))
    assert verify_model.dtypes_of(gemma3, CPU, "auto") == [FP32, BF16]
    cuda = torch.device("cuda")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verify_model, "free_bytes", lambda device: 1e12)
        assert verify_model.dtypes_of(gemma2, cuda, "auto") == [FP32, BF16, torch.float16]
        patch.setattr(verify_model, "free_bytes", lambda device: 0)
        assert verify_model.dtypes_of(gemma3, cuda, "auto") == [BF16]
    with pytest.raises(ValueError, match="overflows float16"):
        verify_model.dtypes_of(gemma3, CPU, "float16")


def run(*args: str):
    return CliRunner().invoke(main, [*TINY, *args])


@pytest.fixture
def few_checks(monkeypatch):
    """Keeps only two kernel checks. The interpreter's process is replaced by one passed line."""
    monkeypatch.setattr(verify_kernels, "CHECKS", rmsnorm.CHECKS[:2])
    line = margins.finding(margins.INTERPRETER, "rms_norm", FP32, {margins.MAX_ULP: (1.0, 1.0)})
    monkeypatch.setattr(verify, "interpreted", lambda: [line])


@pytest.mark.slow
def test_kernels_pass_every_check_in_the_interpreter_process():
    lines = verify.interpreted()
    assert len(lines) == 2 * len(verify_kernels.CHECKS)
    assert all(line.ok and line.part == margins.INTERPRETER for line in lines)
    assert {line.dtype for line in lines} == {"float32", "float16"}


def test_interpreter_process_that_fails_is_reported_as_a_failed_line(monkeypatch):
    monkeypatch.setattr(verify.sys, "executable", "/bin/false")
    (line,) = verify.interpreted()
    assert not line.ok and "status 1" in line.note


@pytest.mark.usefixtures("few_checks")
def test_certificate_is_printed_and_passes():
    result = run()
    assert result.exit_code == 0, result.output
    for text in (
        "torch ", "in Triton's interpreter only", "runs the CPU path", "add_rms_norm",
        "tiny against transformers", "random weights are in no file, in float32",
        "top-1 agreement", "3 × eager +16",
        "Every line passed. gemma_fast's reader of checkpoints was not checked.",
    ):  # fmt: skip
        assert text in " ".join(result.stdout.split())  # lines are wrapped
    assert "FAIL" not in result.stdout
    assert "gemma_fast, bfloat16" in result.stderr, "progress must be printed to stderr"


@pytest.mark.usefixtures("few_checks")
def test_certificate_is_printed_as_json():
    result = run("--json", "--dtype", "bfloat16")
    found = json.loads(result.stdout)
    assert result.exit_code == 0 and found["passed"]
    truth = found["stamp"]["truth"]
    assert truth.startswith("transformers 5") and "given what gemma_fast's reader read" in truth
    assert found["stamp"]["model"] == "tiny" and found["stamp"]["torch"] == torch.__version__
    assert found["margins"].keys() >= {x["name"] for y in found["lines"] for x in y["figures"]} - {
        "greedy tokens until they differ", "equal greedy texts",
    }  # fmt: skip
    dtypes = {line["dtype"] for line in found["lines"] if line["part"] == margins.MODEL}
    assert dtypes == {"bfloat16"}
    assert {line["verdict"] for line in found["lines"]} == {"pass"}


@pytest.mark.usefixtures("few_checks")
@pytest.mark.parametrize(
    ("name", "reader"),
    [("multimodal", "the checkpoint itself"), ("x.gguf", "the GGUF file by llama.cpp's rules")],
)
def test_certificate_of_files_states_who_read_them(name, reader, tmp_path):
    path = tmp_path / name
    if name.endswith(".gguf"):
        write_gguf_file(path, "gemma2", rope__freq_base=1e4)
    else:
        write_directory(path, name)
    result = run("--model", str(path), "--json", "--dtype", "bfloat16")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["stamp"]["truth"].endswith(f", reading {reader}")
    assert found["stamp"]["reader_checked"]
    assert any(x["check"].startswith("differing ids of the text") for x in found["lines"])


@pytest.mark.usefixtures("few_checks")
@pytest.mark.parametrize("as_json", [(), ("--json",)], ids=["table", "json"])
def test_exit_status_is_1_if_a_kernel_is_wrong(as_json, monkeypatch):
    monkeypatch.setattr(rmsnorm, "EPS", 1.0)
    result = run("--dtype", "float32", *as_json)
    assert result.exit_code == 1
    if as_json:
        assert not json.loads(result.stdout)["passed"]
    else:
        assert "A line FAILED." in result.stdout


@pytest.mark.usefixtures("few_checks")
def test_errors_that_are_not_finite_are_null_in_json(monkeypatch):
    check = verify_kernels.CHECKS[0]
    wrong = check._replace(ours=lambda x, weight: lambda: x * torch.nan)
    monkeypatch.setattr(verify_kernels, "CHECKS", [wrong])
    found = json.loads(
        run("--json", "--dtype", "float32").stdout, parse_constant=lambda x: pytest.fail(x)
    )
    line = next(x for x in found["lines"] if x["part"] == margins.CPU_PATH)
    assert line["verdict"] == "FAIL" and line["figures"][0]["ours"] is None


@pytest.mark.usefixtures("few_checks")
def test_certificate_without_triton_checks_no_kernel(monkeypatch):
    monkeypatch.setattr(verify, "find_spec", lambda name: None)
    result = run("--dtype", "float32")
    assert result.exit_code == 0
    assert "Triton is not installed: no kernel was checked" in result.stdout.replace("\n", " ")
    assert margins.INTERPRETER not in result.stdout


def test_new_tokens_that_leave_no_room_for_a_prompt_are_an_error():
    result = run("--tokens", "16380", "--dtype", "float32")
    assert result.exit_code == 1
    assert "no room for a prompt in a context of 16384" in result.output


def test_importing_the_model_check_does_not_import_transformers():
    module = "gemma_fast.benchmarks.verify.model"
    code = f"import sys, {module}; assert 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_limits_of_gaps_are_larger_for_a_mixture_of_experts():
    """In 16 bits, by eager's largest |Δ logit|. Other limits are the same."""
    pairs = {margins.GAP: (0.9, 0.0), margins.KL_MEAN: (1.0, 1.0)}
    plain, mixture = (
        margins.finding(margins.MODEL, "x", BF16, pairs, by_experts=extra) for extra in (0.0, 0.7)
    )
    assert [x.limit for x in plain.figures] == [0.25, 1.25 + 1e-5]
    assert [x.limit for x in mixture.figures] == [0.25 + 0.7, 1.25 + 1e-5]
    assert not plain.ok and mixture.ok
