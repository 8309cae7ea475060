"""Renders an untrusted chat template. jinja_template.py runs this file in a separate process.

A checkpoint's template is untrusted code. Jinja's sandbox blocks access to Python's objects, but
not endless loops or large allocations, so this process sets limits on its own time and memory.
"""

import json
import sys
from datetime import datetime


def main() -> None:
    request = json.load(sys.stdin)
    if sys.platform == "linux":  # elsewhere RLIMIT_AS is missing or has no effect
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (request["max_bytes"],) * 2)
        resource.setrlimit(resource.RLIMIT_CPU, (request["max_seconds"] + 1,) * 2)
    sys.path[:] = request["path"]
    try:
        reply = {"text": render(request)}
    except Exception as error:  # a template can raise any exception, also MemoryError
        reply = {"error": f"{type(error).__name__}: {error}"}
    sys.stdout.write(json.dumps(reply))


def render(request: dict) -> str:
    """Returns the text of the template, which can use the functions that transformers provides."""
    from jinja2.exceptions import SecurityError, TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from jinja2.utils import Namespace

    class SafeNamespace(Namespace):
        def __setitem__(self, name, value):
            if name.startswith("_"):  # the sandbox does not check `ns.__call__`
                raise SecurityError(f"a namespace may not have an attribute {name}")
            super().__setitem__(name, value)

    def namespace(*args, **kwargs):
        space = SafeNamespace()
        for name, value in dict(*args, **kwargs).items():
            space[name] = value
        return space

    def raise_exception(message):
        raise TemplateError(message)

    def tojson(value, ensure_ascii=False, **options):
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = tojson
    environment.globals = {
        "range": environment.globals["range"],  # the sandbox's range, of limited length
        "dict": lambda *args, **kwargs: dict(*args, **kwargs),
        "namespace": namespace,
        "raise_exception": raise_exception,
        "strftime_now": lambda format: datetime.now().strftime(format),
    }
    text = environment.from_string(request["template"]).render(request["variables"])
    if len(text) > request["max_length"]:
        raise ValueError(
            f"the rendered text has {len(text)} characters; the limit is {request['max_length']}"
        )
    return text


if __name__ == "__main__":
    main()
