"""`ScoringLM` scores texts for lm_harness.py, by the rules of lm_eval's own model `hf`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from lm_eval import utils
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from torch import Tensor
from tqdm import tqdm

from gemma_fast.batch.scoring import token_logprobs
from gemma_fast.causal_lm import GemmaForCausalLM
from gemma_fast.text.batch import Encoding, pack

# (key in lm_eval's cache, token ids of the context, token ids of the continuation)
ScoreRequest = tuple[Any, list[int], list[int]]


class ScoringLM(TemplateLM):
    """Computes log-probabilities of texts. The subclass defines `tok_encode`.

    batch_size  rows of a batch; if `automatic`, it is halved when memory runs out
    max_length  maximum tokens of a text
    """

    model: GemmaForCausalLM
    tokenizer: Any
    automatic: bool
    batch_size: int
    max_length: int

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Returns each text's log-probability. A text longer than max_length is split into windows,
        and each of its tokens is scored in one of them."""
        texts = [request.args[0] for request in requests]
        windows: list[ScoreRequest] = []
        owners: list[int] = []
        for i, text in enumerate(texts):
            parts = utils.get_rolling_token_windows(
                token_list=self.tok_encode(text), prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length, context_len=1,
            )  # fmt: skip
            found = [(None, *utils.make_disjoint_window(part)) for part in parts]
            windows += found
            owners += [i] * len(found)
        totals = [0.0] * len(texts)
        scores = self._loglikelihood_tokens(windows, disable_tqdm)
        for i, (score, _) in zip(owners, scores, strict=True):
            totals[i] += score
        for text, total in zip(texts, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), total)
        return totals

    def _loglikelihood_tokens(
        self, requests: Sequence[ScoreRequest], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """Returns for each request the log-probability of its continuation, and whether greedy
        decoding would generate it. The last token of a request is not an input of the model, so
        requests that differ only in this token share one row of the batch."""
        same: dict[tuple[int, ...], list[int]] = {}
        for i, (asked, context, continuation) in enumerate(requests):
            if not (context and 0 < len(continuation) <= self.max_length):
                counts = f"{len(context)} + {len(continuation)} tokens"
                allowed = f"1 or more + 1 to {self.max_length}"
                raise ValueError(
                    f"{asked!r:.80} has {counts} (context + continuation), but only {allowed} can"
                    " be scored"
                )
            row = (context + continuation)[-(self.max_length + 1) : -1]
            same.setdefault(tuple(row), []).append(i)
        kept = {row: max(len(requests[i][2]) for i in same[row]) for row in same}
        answers = [(0.0, False)] * len(requests)
        with tqdm(total=len(requests), disable=disable_tqdm, desc="scoring") as progress:
            longest_first = sorted(same, key=len, reverse=True)
            run = self._logits
            for row, logits in self._in_batches(longest_first, lambda rows: run(rows, kept)):
                for i in same[row]:
                    asked, _, continuation = requests[i]
                    answers[i] = _answer(logits, continuation)
                    if asked is not None:
                        self.cache_hook.add_partial("loglikelihood", asked, answers[i])
                    progress.update()
        return answers

    def _logits(
        self, rows: Sequence[tuple[int, ...]], kept: dict[tuple[int, ...], int]
    ) -> list[Tensor]:
        """Returns for each row the logits :: [kept[row], vocab] of the tokens that follow its last
        kept[row] tokens."""
        most = max(kept[row] for row in rows)
        logits = self.model(**self._pad(rows), use_cache=False, logits_to_keep=most).logits
        return [x[most - kept[row] :] for x, row in zip(logits, rows, strict=True)]

    def _pad(self, rows: Sequence[Sequence[int]]) -> Encoding:
        """Pads rows of ids on the left, so that all rows end in the last column."""
        return pack([*map(list, rows)], self.tokenizer.pad_token_id, "pt", True, flat=False)

    def _in_batches(
        self, items: Sequence[Any], run: Callable[[Sequence[Any]], Sequence[Any]]
    ) -> Iterator[tuple[Any, Any]]:
        while items:
            batch = items[: self.batch_size]
            try:
                results = run(batch)
            except torch.OutOfMemoryError:
                if not self.automatic or len(batch) == 1:
                    raise
                self.batch_size = len(batch) // 2
                self.model.free_memory()
                continue
            yield from zip(batch, results, strict=True)
            items = items[len(batch) :]


def _answer(logits: Tensor, continuation: list[int]) -> tuple[float, bool]:
    """Returns the continuation's log-probability, and whether greedy decoding would generate it.
    The last row of logits :: [kept, vocab] is for the continuation's last token."""
    target = torch.tensor(continuation, device=logits.device)
    logp, greedy = token_logprobs(logits[-len(continuation) :], target)
    return float(logp.sum()), bool(greedy.all())
