"""Tests that lm-evaluation-harness gives `gemma-fast` the same scores as its own model `hf`."""

import inspect
import json
import shutil
import subprocess
import sys
from pathlib import Path

import lm_eval
import pytest
import torch
from chat_checkpoint import write_chat_checkpoint
from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager
from marks import slow

from gemma_fast.compat import FROM_PRETRAINED, LM_EVAL
from gemma_fast.engine.decoder import bucket_of
from gemma_fast.lm_harness import GemmaFastLM
from gemma_fast.text.tokenizer import Tokenizer

CHOICES = [
    ("hello", [" the world", " in", "the"]),
    ("the thinner ", ["a", "b", "c"]),
    ("in a world", [" ", "é漢", "<eos>"]),
    ("<bos>the winner", [" the", " world", " hello hello"]),
    ("a b c d e f", ["x", "xy", "xyz"]),
]
TEXTS = ["hello the world in the thinner", "<bos>a\n\nb", "é " * 200, "the " * 300]
PROMPTS = ["hello", "the thinner in the world", "<bos>a b", "in " * 150]
SHARED = """
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}, cache_dir: CACHE}
test_split: test
"""
TASKS = {
    "tiny_choice": """
output_type: multiple_choice
doc_to_text: "{{text}}"
doc_to_choice: "{{choices}}"
doc_to_target: 0
metric_list: [{metric: acc}, {metric: acc_norm}]
""",
    "tiny_rolling": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: word_perplexity}, {metric: byte_perplexity}, {metric: bits_per_byte}]
""",
    "tiny_generate": """
output_type: generate_until
doc_to_text: "{{text}}"
doc_to_target: "a"
generation_kwargs: {until: ["h", "th"], max_gen_toks: 24, do_sample: false}
metric_list: [{metric: exact_match}]
""",
}
DOCS = {
    "tiny_choice": [{"text": text, "choices": choices} for text, choices in CHOICES],
    "tiny_rolling": [{"text": text} for text in TEXTS],
    "tiny_generate": [{"text": text} for text in PROMPTS],
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return write_chat_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def tasks(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("tasks")
    for name, task in TASKS.items():
        file = path / f"{name}.jsonl"
        file.write_text("\n".join(map(json.dumps, DOCS[name])))
        shared = SHARED.replace("FILE", str(file)).replace("CACHE", str(path / "cache"))
        (path / f"{name}.yaml").write_text(f"task: {name}{shared}{task}")
    return path


@pytest.fixture(scope="module", params=[*slow("1"), "3"], ids=["batch 1", "batch 3"])
def both(request, checkpoint):
    """Returns the models `hf` and `gemma-fast`, created by name as the harness creates them."""
    args = f"pretrained={checkpoint},dtype=float32"
    options = {"batch_size": request.param, "device": "cpu"}
    return [
        lm_eval.api.registry.get_model(name).create_from_arg_string(args, options)
        for name in ("hf", "gemma-fast")
    ]


def evaluate(model, tasks: Path, **options) -> dict:
    """Returns, for each task, its metrics and the responses to its documents."""
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    out = lm_eval.simple_evaluate(
        model, tasks=list(TASKS), task_manager=manager, bootstrap_iters=0, **options
    )
    responses = {
        task: [sample["resps"] for sample in sorted(samples, key=lambda x: x["doc_id"])]
        for task, samples in out["samples"].items()
    }
    return {task: (out["results"][task], responses[task]) for task in TASKS}


def same(actual, expected) -> None:
    if isinstance(expected, dict):
        assert actual.keys() == expected.keys()
        same(list(actual.values()), list(expected.values()))
    elif isinstance(expected, list | tuple):
        assert len(actual) == len(expected)
        for pair in zip(actual, expected, strict=True):
            same(*pair)
    elif isinstance(expected, float):
        assert actual == pytest.approx(expected, rel=1e-6, abs=1e-4)
    else:
        assert actual == expected


@pytest.mark.parametrize(
    "options",
    [{}, {"num_fewshot": 1}, {"apply_chat_template": True}],
    ids=["zero-shot", "one-shot", "chat"],
)
def test_scores_and_responses_equal_those_of_hf(both, tasks, options):
    expected, actual = (evaluate(model, tasks, **options) for model in both)
    same(actual, expected)
    assert any(len(answer[0][0]) > 1 for answer in expected["tiny_generate"][1])


def requests(kind: str, *arguments: tuple) -> list[Instance]:
    return [Instance(kind, {}, arguments=x, idx=i) for i, x in enumerate(arguments)]


@pytest.mark.parametrize(
    "options",
    [
        {"max_length": 12},
        {"add_bos_token": False},
        {"prefix_token_id": 5},
    ],
    ids=str,
)
def test_windows_truncation_and_bos_are_those_of_hf(checkpoint, options):
    """Checks the windows of long texts, truncation on the left, <bos>, and the token that replaces
    an empty context."""
    args = {"pretrained": str(checkpoint), "dtype": "float32", "device": "cpu", "batch_size": 2}
    models = [
        lm_eval.api.registry.get_model(name)(**args, **options) for name in ("hf", "gemma-fast")
    ]
    pairs = [("", "the world"), ("hello ", "in"), ("a " * 30, "thinner a"), ("<bos>a", " the")]
    if "prefix_token_id" in options:  # with this option, `hf` does not detect <bos>
        pairs = pairs[:-1]
    kwargs = {"until": ["t"], "max_gen_toks": 5, "do_sample": False}
    for kind, arguments in (
        ("loglikelihood", pairs),
        ("loglikelihood_rolling", [(TEXTS[0],), (TEXTS[2],)]),
        ("generate_until", [(text, kwargs) for text in PROMPTS]),
    ):
        expected, actual = (getattr(m, kind)(requests(kind, *arguments)) for m in models)
        same(actual, expected)


def test_running_out_of_memory_halves_automatic_batches(checkpoint, monkeypatch):
    model = GemmaFastLM(str(checkpoint), dtype="float32", device="cpu", batch_size="auto")
    expected = model.loglikelihood(requests("loglikelihood", *[("a b", x) for x in ("cd", "ef")]))
    sizes, score = [], model._logits

    def scarce(rows, kept):
        sizes.append(len(rows))
        if len(rows) > 1:
            raise torch.OutOfMemoryError
        return score(rows, kept)

    monkeypatch.setattr(model, "_logits", scarce)
    actual = model.loglikelihood(requests("loglikelihood", *[("a b", x) for x in ("cd", "ef")]))
    same(actual, expected)
    assert sizes == [2, 1, 1]
    fixed = GemmaFastLM(model.model, tokenizer=model.tokenizer, batch_size=2)
    monkeypatch.setattr(fixed, "_logits", scarce)
    with pytest.raises(torch.OutOfMemoryError):
        fixed.loglikelihood(requests("loglikelihood", ("a b", "cd"), ("a b", "ef")))


@pytest.mark.slow
def test_command_line_scores_a_task(checkpoint, tasks):
    """`python -m gemma_fast.lm_harness` registers the model, then runs lm_eval's command."""
    command = [sys.executable, "-m", "gemma_fast.lm_harness", "--model", "gemma-fast"]
    command += ["--model_args", f"pretrained={checkpoint},dtype=float32", "--batch_size", "auto"]
    command += ["--include_path", str(tasks), "--tasks", "tiny_choice"]
    out = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert out.returncode == 0, out.stderr
    assert "acc_norm" in out.stdout


def test_requests_that_cannot_be_scored_are_named_in_the_error(checkpoint):
    model = GemmaFastLM(str(checkpoint), dtype="float32", device="cpu", max_length=8)
    with pytest.raises(ValueError, match=r"\('a', 'bbb.* has 2 \+ 21 tokens .* 1 to 8 can be"):
        model.loglikelihood(requests("loglikelihood", ("a", "b" * 21)))
    model.add_bos_token = False
    with pytest.raises(ValueError, match=r"\(' ', 'b'\) has 0 \+ 2 tokens"):
        model.loglikelihood(requests("loglikelihood", (" ", "b")))
    with pytest.raises(ValueError, match="max_gen_toks=8 leaves no room for a prompt: it must be"):
        model.generate_until(requests("generate_until", ("a", {"until": [], "max_gen_toks": 8})))
    kwargs = {"until": [], "max_gen_toks": 2, "num_beams": 3}
    with pytest.raises(TypeError, match="num_beams=3 is not supported"):
        model.generate_until(requests("generate_until", ("a", kwargs)))
    with pytest.raises(ValueError, match="tokenizer=… is needed"):
        GemmaFastLM(model.model)


def test_each_argument_of_hf_is_known():
    hf = lm_eval.api.registry.get_model("hf")
    theirs = inspect.signature(hf.__init__).parameters.keys()
    ours = inspect.signature(GemmaFastLM.__init__).parameters.keys()
    assert not theirs - ours - LM_EVAL.keys() - FROM_PRETRAINED.keys() - {"kwargs"}


@pytest.mark.parametrize(
    ("name", "value", "way_out"),
    [
        ("peft", "adapter", "peft='adapter' is not supported: merge it: .*merge_and_unload"),
        ("delta", "weights", "delta='weights' is not supported: add the weights"),
        ("parallelize", True, "parallelize=True is not supported: .*one device"),
        ("backend", "seq2seq", "backend='seq2seq' is not supported"),
        ("softmax_dtype", "bfloat16", "softmax_dtype='bfloat16' is not supported: .*float32"),
        ("subfolder", "x", "subfolder='x' is not supported: .*snapshot_download"),
        ("load_in_4bit", True, "load_in_4bit=True is not supported: pass quantize='int4'"),
        ("gguf_file", "a.gguf", "gguf_file='a.gguf' is not supported: pass the path"),
        ("nonsense", 1, "unexpected keyword argument 'nonsense'"),
    ],
)
def test_arguments_that_are_not_supported_name_a_way_out(checkpoint, name, value, way_out):
    ready = GemmaFastLM(str(checkpoint), device="cpu")
    for model in (str(checkpoint), ready.model):
        with pytest.raises(TypeError, match=way_out):
            GemmaFastLM(model, tokenizer=ready.tokenizer, **{name: value})


def test_arguments_of_hf_without_effect_are_accepted(checkpoint):
    """The arguments are given as a string, as on lm_eval's command line."""
    args = "trust_remote_code=True,revision=main,parallelize=False,use_fast_tokenizer=False"
    args += ",logits_cache=False,backend=causal,attn_implementation=eager,softmax_dtype=float32"
    args += ",truncation=True,max_memory_per_gpu=1GB,device_map=auto"
    make = GemmaFastLM.create_from_arg_string
    plain, other = (make(f"pretrained={checkpoint}{x},dtype=float32") for x in ("", f",{args}"))
    asked = requests("loglikelihood", ("a b", "cd"))
    assert plain.loglikelihood(asked) == other.loglikelihood(asked)


@pytest.mark.parametrize("family", ["gemma", "gemma2"])
def test_system_messages_are_left_out_if_the_template_refuses_them_as_in_hf(tmp_path, family):
    path = write_chat_checkpoint(tmp_path, family)
    chat = [{"role": "system", "content": "Be short."}, {"role": "user", "content": " Hi "}]
    args = {"pretrained": str(path), "dtype": "float32", "device": "cpu"}
    hf, ours = (lm_eval.api.registry.get_model(name)(**args) for name in ("hf", "gemma-fast"))
    for prompt in (True, False):
        expected = hf.apply_chat_template(chat, add_generation_prompt=prompt)
        with pytest.warns(UserWarning, match="system messages are left out: .*ystem"):
            assert ours.apply_chat_template(chat, add_generation_prompt=prompt) == expected
    assert "Be short" not in expected
    with pytest.raises(ValueError, match="must alternate"):
        ours.apply_chat_template([{"role": "assistant", "content": "Hi"}])


def test_template_variables_are_passed_on(checkpoint):
    class Recorder(Tokenizer):
        def apply_chat_template(self, messages, **options):
            seen.append(options)
            return "text"

    seen = []
    loaded = GemmaFastLM(str(checkpoint), device="cpu")
    recorder = Recorder(loaded.tokenizer.backend, "tiny")
    options = {"chat_template_args": {"mood": "calm"}, "enable_thinking": True}
    model = GemmaFastLM(loaded.model, tokenizer=recorder, think_end_token="</t>", **options)
    assert model.apply_chat_template([{"role": "user", "content": "a"}]) == "text"
    assert seen == [
        {
            "tokenize": False, "add_generation_prompt": True, "continue_final_message": False,
            "mood": "calm", "enable_thinking": True,
        }
    ]  # fmt: skip
    with pytest.raises(ValueError, match="enable_thinking=True needs tasks that only generate"):
        model.loglikelihood(requests("loglikelihood", ("a", "b")))
    with pytest.raises(ValueError, match="enable_thinking=True needs think_end_token"):
        GemmaFastLM(loaded.model, tokenizer=recorder, enable_thinking=True)


def both_models(checkpoint, **options) -> list:
    args = {"pretrained": str(checkpoint), "dtype": "float32", "device": "cpu", "batch_size": 2}
    return [lm_eval.api.registry.get_model(n)(**args, **options) for n in ("hf", "gemma-fast")]


def test_generation_options_and_thinking_equal_hf(checkpoint):
    """Options of a task, and answers that begin after a token that ends the thinking."""
    hf, ours = both_models(checkpoint)
    free = {"until": [], "max_gen_toks": 12}
    [text] = hf.generate_until(requests("generate_until", ("hello", free)))
    char = text.strip()[2]
    [token] = ours.tok_encode(char, add_special_tokens=False)
    for end in (char, token, str(token)):
        models = both_models(checkpoint, think_end_token=end)
        asked = requests("generate_until", *[(prompt, free) for prompt in PROMPTS])
        same(models[1].generate_until(asked), models[0].generate_until(asked))
    for options in (
        {"temperature": 0.0}, {"do_sample": False, "temperature": 0.7, "top_p": 0.5},
        {"max_tokens": 5}, {"max_length": 30}, {"min_new_tokens": 4, "no_repeat_ngram_size": 2},
        {"suppress_tokens": [token], "repetition_penalty": 1.3}, {"until": char},
    ):  # fmt: skip
        given = {"until": [], **({} if "max_tokens" in options else {"max_gen_toks": 9}), **options}
        asked = requests("generate_until", *[(prompt, given) for prompt in PROMPTS[:2]])
        alone = [answer for request in asked for answer in hf.generate_until([request])]
        same(ours.generate_until(asked), alone)  # in a batch, max_length of `hf` counts padding


def test_prompts_with_different_options_are_continued_together(checkpoint, monkeypatch):
    hf, ours = both_models(checkpoint)
    [free] = hf.generate_until(requests("generate_until", ("hello", {"max_gen_toks": 9})))
    sizes, many = [], ours.model.generate_many

    def counted(asked, *, batch_size, **options):
        sizes.append((len(asked), batch_size))
        return many(asked, batch_size=batch_size, **options)

    monkeypatch.setattr(ours.model, "generate_many", counted)
    asked = requests(
        "generate_until", (PROMPTS[3], {"until": [], "max_gen_toks": 3}),
        ("hello", {"until": [free[4:6]], "max_gen_toks": 9}),
        ("hello", {"until": [], "max_gen_toks": 12, "repetition_penalty": 1.3}),
        (PROMPTS[1], {"until": [], "max_gen_toks": 7, "suppress_tokens": [5]}),
    )  # fmt: skip
    same(ours.generate_until(asked), hf.generate_until(asked))
    assert sizes == [(4, 2)]


def test_running_out_of_memory_halves_the_texts_at_the_same_time(checkpoint, monkeypatch):
    """Texts that ended before are kept, and the others are started again."""
    model = GemmaFastLM(str(checkpoint), dtype="float32", device="cpu", batch_size="auto")
    asked = [(prompt, {"until": [], "max_gen_toks": 4}) for prompt in PROMPTS]
    asked = requests("generate_until", *asked)
    expected, sizes, many = model.generate_until(asked), [], model.model.generate_many

    def scarce(left, *, batch_size, **options):
        sizes.append((len(left), batch_size))
        for i, found in enumerate(many(left, batch_size=batch_size, **options)):
            scarce = i == 1 and batch_size > 16
            yield found._replace(error=torch.OutOfMemoryError("no memory")) if scarce else found

    monkeypatch.setattr(model.model, "generate_many", scarce)
    assert model.generate_until(asked) == expected
    assert sizes == [(4, 64), (3, 32), (2, 16)] and model.batch_size == 16
    fixed = GemmaFastLM(model.model, tokenizer=model.tokenizer, batch_size=17)
    with pytest.raises(torch.OutOfMemoryError, match="no memory"):
        fixed.generate_until(asked)
    assert sorted(model.model.decoders) == [16, bucket_of(17)], "kept for the next call"


def test_stop_strings_of_the_checkpoint_and_of_the_task_end_a_text(checkpoint):
    model = GemmaFastLM(str(checkpoint), dtype="float32", device="cpu")
    asked = requests("generate_until", ("hello", {"until": ["never"], "max_gen_toks": 12}))
    [free] = model.generate_until(asked)
    model.model.generation_config |= {"stop_strings": free[:5], "num_return_sequences": 2}
    [stopped] = model.generate_until(asked)
    assert free.startswith(stopped) and free[:5] in stopped and len(stopped) < len(free)
    assert len(free) == 12 * 5  # a token of five letters


def test_a_stop_string_that_begins_in_the_prompt_does_not_end_an_answer(both):
    hf, ours = both
    [free] = hf.generate_until(requests("generate_until", ("hello", {"max_gen_toks": 9})))
    asked = requests(
        "generate_until", ("hello", {"until": ["<bos>hello" + free[:1]], "max_gen_toks": 9}),
        ("hello", {"until": [free[2:4]], "max_gen_toks": 9}),
    )  # fmt: skip
    answers = ours.generate_until(asked)
    same(answers, hf.generate_until(asked))
    assert answers[0] == free and answers[1] == free[:2]


def test_a_text_ends_at_the_end_tokens_of_the_checkpoint(checkpoint, tmp_path):
    """lm_eval, Python and the command line end a text at the same tokens, also in a batch."""
    shutil.copytree(checkpoint, tmp_path, dirs_exist_ok=True)
    [free] = both_models(checkpoint)[1:]
    prompts = [free.tok_encode(prompt) for prompt in ("hello", "a b")]
    texts = [
        free.model.generate(torch.tensor([ids]), max_new_tokens=12)[0, len(ids) :]
        for ids in prompts
    ]
    ends = [int(texts[0][4]), int(texts[1][6])]
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    hf, ours = both_models(tmp_path)
    assert ours.model.end_token_ids == tuple(ends)
    asked = [(prompt, {"until": [], "max_gen_toks": 12}) for prompt in ("hello", "a b")]
    answers = ours.generate_until(requests("generate_until", *asked))
    same(answers, hf.generate_until(requests("generate_until", *asked)))
    for prompt, row, answer in zip(prompts, texts, answers, strict=True):
        end = next(i for i, token in enumerate(row.tolist()) if token in ends) + 1
        assert answer == ours.tokenizer.decode(row[:end], skip_special_tokens=True)
        out = ours.model.generate(torch.tensor([prompt]), max_new_tokens=12)
        assert torch.equal(out[0, len(prompt) :], row[:end])


def test_error_without_lm_eval_names_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.models", None)
    monkeypatch.delitem(sys.modules, "gemma_fast.lm_harness")
    with pytest.raises(ModuleNotFoundError, match="pip install lm_eval"):
        import gemma_fast.lm_harness  # noqa: F401


@pytest.mark.parametrize("missing", ["bos_token", "eos_token"])
def test_a_tokenizer_without_a_special_token_scores_and_generates(tmp_path, missing):
    """Without <bos>, the eos token precedes a text without a context, as in `hf`."""
    path = write_chat_checkpoint(tmp_path)
    file = path / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {missing: None}))
    found = []
    for name in ("hf", "gemma-fast"):
        if (name, missing) == ("hf", "eos_token"):
            continue  # lm_eval's own model raises TypeError
        model = lm_eval.api.registry.get_model(name)(str(path), dtype="float32", device="cpu")
        score = Instance("loglikelihood", {}, ("", "hello"), 0)
        text = Instance("generate_until", {}, ("hello", {"until": ["x"], "max_gen_toks": 3}), 0)
        found.append((model.loglikelihood([score])[0][0], model.generate_until([text])[0]))
    assert found[0][0] == pytest.approx(found[-1][0], rel=1e-4)
    assert found[0][1] == found[-1][1]


@pytest.mark.parametrize(
    ("family", "batch_size"), [("gemma4", 1), ("gemma4", 3), ("gemma4-experts", 3)]
)
def test_scores_and_answers_of_gemma_4_are_those_of_hf(tmp_path, family, batch_size):
    """`gemma4-shared` computes only the tokens whose logits are needed in its last layers. The
    scores need the logits of several tokens, in a padded batch."""
    write_chat_checkpoint(tmp_path, family)
    args = {"pretrained": str(tmp_path), "dtype": "float32", "device": "cpu"}
    expected, actual = (
        lm_eval.api.registry.get_model(name)(**args, batch_size=batch_size, add_bos_token=True)
        for name in ("hf", "gemma-fast")
    )
    kwargs = {"until": ["t"], "max_gen_toks": 5, "do_sample": False}
    pairs = [("hello ", "in the world " * 5), ("a " * 30, "thinner a"), ("", "the world")]
    for kind, arguments in (
        ("loglikelihood", pairs),
        ("loglikelihood_rolling", [(TEXTS[0],), ("the " * 100,)]),
        ("generate_until", [("hello", kwargs), ("the " * 40, kwargs)]),
    ):
        same(*(getattr(m, kind)(requests(kind, *arguments)) for m in (actual, expected)))


def test_prompts_of_gemma_4_have_bos_exactly_once(tmp_path):
    """The tokenizer of an instruction-tuned Gemma 4 adds none."""
    write_chat_checkpoint(tmp_path, "gemma4")
    model = GemmaFastLM(str(tmp_path), device="cpu")
    hello = model.tokenizer.token_to_id("hello")
    assert model.tok_encode("hello") == model.tok_encode("<bos>hello") == [2, hello]
    assert model.tok_encode("hello", add_special_tokens=False) == [hello]
