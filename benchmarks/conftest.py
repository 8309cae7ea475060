import torch

from gemma_fast.benchmarks.measure.report import NOTHING


def pytest_terminal_summary(terminalreporter):
    if not torch.cuda.is_available():
        terminalreporter.write_line(NOTHING)
