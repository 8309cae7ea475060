"""Metrics of a server, for Prometheus. docs/server.md lists them."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.3, 0.5, 1, 2, 5, 10, 30, 60, 120)


class Metrics:
    """Metrics in a registry of their own, so that a process can have several servers."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()

        def counter(name: str, text: str, labels: tuple[str, ...] = ()) -> Counter:
            return Counter(f"gemma_fast_{name}", text, labels, registry=self.registry)

        def histogram(name: str, text: str) -> Histogram:
            return Histogram(f"gemma_fast_{name}", text, buckets=SECONDS, registry=self.registry)

        self.responses = counter("responses", "HTTP responses.", ("path", "status"))
        self.texts = counter("texts", "Texts that ended, by reason.", ("reason",))
        self.prompt_tokens = counter("prompt_tokens", "Tokens of prompts that were read.")
        self.new_tokens = counter("new_tokens", "Tokens that were generated.")
        self.first_token = histogram(
            "time_to_first_token_seconds", "From the queue to a text's first token."
        )
        self.next_token = histogram(
            "time_per_token_seconds", "Between two successive tokens of a text."
        )

    def gauge(self, name: str, text: str, value: Callable[[], float]) -> None:
        """Adds a gauge that calls `value` whenever it is read."""
        Gauge(f"gemma_fast_{name}", text, registry=self.registry).set_function(value)

    def page(self) -> bytes:
        """Returns all metrics in Prometheus' text format."""
        return generate_latest(self.registry)
