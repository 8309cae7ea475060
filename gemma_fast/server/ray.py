"""The server as a deployment of Ray Serve: the same application, in replicas that Ray starts.

    GEMMA_FAST_MODEL=path/to/gemma-it serve run gemma_fast.server.ray:app
    serve run gemma_fast.server.ray:build model=path/to/gemma-it max_replicas=8 gpus=1

`app` reads its settings from environment variables, GEMMA_FAST_ and the name of the setting in
capitals.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastapi import FastAPI
from pydantic import Field
from ray import serve

from gemma_fast.causal_lm import GemmaForCausalLM
from gemma_fast.demo import demo_checkpoint
from gemma_fast.server.settings import KEY, Settings
from gemma_fast.text.tokenizer import Tokenizer

MORE_REQUESTS = 64  # besides one for each place: requests without a text, or that are refused


class RaySettings(Settings):
    """replicas      number of replicas; with max_replicas, the least number
    max_replicas  Ray adds replicas up to this number while each has more requests than batch_size;
                  None: no autoscaling
    gpus, cpus    of each replica; parts of a GPU are possible
    """

    replicas: int = Field(1, ge=0)
    max_replicas: int | None = Field(None, ge=1)
    gpus: float = Field(0.0, ge=0)
    cpus: float = Field(1.0, ge=0)


def build(arguments: dict[str, Any]) -> Any:
    """Returns the application of Ray Serve. The API keys are not part of it: each replica reads the
    file, or the environment variable, on its own machine.

    arguments  settings, which override those of the environment. Values may be text, as those of
               `serve run`
    """
    settings = RaySettings.from_environment(**arguments)
    scaling: dict[str, Any] = {"num_replicas": settings.replicas}
    if settings.max_replicas is not None:
        scaling = {
            "autoscaling_config": {
                "min_replicas": settings.replicas, "max_replicas": settings.max_replicas,
                "target_ongoing_requests": settings.batch_size,
            }
        }  # fmt: skip
    deploy = serve.deployment(
        name="gemma_fast",
        max_ongoing_requests=settings.batch_size + settings.queue + MORE_REQUESTS,
        ray_actor_options={"num_gpus": settings.gpus, "num_cpus": settings.cpus},
        graceful_shutdown_timeout_s=settings.max_time,
        **scaling,
    )
    load = _loader(settings, bool(settings.keys()))
    return deploy(serve.ingress(load)()).bind()


def _loader(settings: RaySettings, needs_key: bool) -> Callable[[], FastAPI]:
    """Returns the function that a replica calls to get its application."""

    def load() -> FastAPI:
        if needs_key and not settings.keys():
            raise ValueError(f"set {KEY} on each machine of the cluster, or pass api_key_file")
        path = settings.model or demo_checkpoint()
        tokenizer = Tokenizer.from_pretrained(path)
        tokenizer.require_bos()
        model = GemmaForCausalLM.from_pretrained(
            path, dtype=settings.dtype, device=settings.device, quantize=settings.quantize
        )
        return settings.app(model, tokenizer)

    return load


app = build({})
