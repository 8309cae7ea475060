"""Renders an untrusted chat template. jinja_template.py runs this file in a separate process.

A checkpoint's template is untrusted code. Jinja's sandbox blocks access to Python's objects, but
not endless loops or large allocations, so this process sets limits on its own time and memory.
"""

import json
import sys
from datetime import datetime


def main() -> None:
    request = json.loads(sys.stdin.readline())
    if sys.platform == "linux":  # elsewhere RLIMIT_AS is missing or has no effect
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (request["max_bytes"],) * 2)
        resource.setrlimit(resource.RLIMIT_CPU, (request["max_seconds"] + 1,) * 2)
    sys.path[:] = request["path"]
    try:
        reply = render(request, json.load(sys.stdin))
    except Exception as error:  # a template can raise any exception, also MemoryError
        reply = {"error": ": ".join(filter(None, [type(error).__name__, str(error)]))}
    sys.stdout.write(json.dumps(reply))


def render(request: dict, variables: dict) -> dict:
    """Returns the template's text, and the spans of its generation blocks."""
    blocks: list[str] = []
    spans: list[list[int]] = []
    length = [0]
    template = environment(length, spans).from_string(request["template"])
    for block in template.generate(variables):
        blocks.append(block)
        length[0] += len(block)
        if length[0] > request["max_length"]:
            raise ValueError(
                f"the rendered text has {length[0]} characters; the limit is"
                f" {request['max_length']}"
            )
    return {"text": "".join(blocks), "spans": spans}


def environment(length: list, spans: list):
    """Returns an environment with the filters, globals and extensions that transformers provides.

    length  one item, the number of characters that have been rendered so far
    spans   receives start and stop of each `{% generation %}` block
    """
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    made = ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_generation_tag(length, spans), "jinja2.ext.loopcontrols"],
    )
    made.filters["tojson"] = _tojson
    made.globals |= _globals()
    return made


def _generation_tag(length: list, spans: list):
    from jinja2 import nodes, pass_eval_context
    from jinja2.ext import Extension

    class Generation(Extension):
        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.CallBlock(self.call_method("_record"), [], [], body).set_lineno(line)

        @pass_eval_context
        def _record(self, context, caller):
            text = caller()
            spans.append([length[0], length[0] + len(text)])
            return text

    return Generation


def _tojson(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    return json.dumps(
        x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _globals() -> dict:
    from jinja2.exceptions import SecurityError, TemplateError
    from jinja2.utils import Namespace

    class SafeNamespace(Namespace):
        def __init__(*args, **kwargs):  # `self` may be the name of an attribute
            self, args = args[0], args[1:]
            Namespace.__init__(self)
            for name, value in dict(*args, **kwargs).items():
                self[name] = value

        def __setitem__(self, name, value):
            if isinstance(name, str) and name.startswith("_"):
                # the sandbox does not check `ns.__call__`
                raise SecurityError(f"a namespace may not have an attribute {name}")
            super().__setitem__(name, value)

    class Dict:
        def __call__(self, *args, **kwargs):
            return dict(*args, **kwargs)

        def fromkeys(self, *args, **kwargs):
            return dict.fromkeys(*args, **kwargs)

    def raise_exception(message):
        raise TemplateError(message)

    return {
        "dict": Dict(),
        "namespace": SafeNamespace,
        "raise_exception": raise_exception,
        "strftime_now": lambda format: datetime.now().strftime(format),
    }


if __name__ == "__main__":
    main()
