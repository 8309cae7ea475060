"""Tests that rows are continued as generate() continues them, and that bad rows are errors."""

from itertools import count

import pytest
from chat_checkpoint import write_chat_checkpoint

from gemma_fast.batch.generating import continue_prompts
from gemma_fast.batch.job import Job, Task
from gemma_fast.batch.local import answers_of
from gemma_fast.batch.prompts import MAX_AHEAD, Preparer
from gemma_fast.batch.rows import Numbered
from gemma_fast.engine.many import Generated
from gemma_fast.engine.request import seed_of
from gemma_fast.text.tokenizer import Tokenizer

PROMPTS = ["hello the world", "the", "in the winner hello hello", "a", ""]


def chat(text: str, system: str = "") -> list[dict]:
    first = [{"role": "system", "content": system}] if system else []
    return [*first, {"role": "user", "content": text}]


def generated(model, tokenizer, prompt, **options) -> dict:
    """Returns the columns of an answer from generate() with this prompt alone."""
    if isinstance(prompt, str):
        ids = tokenizer(prompt, return_tensors="pt").input_ids
    else:
        options = {
            "eos_token_id": sorted({*model.end_token_ids, *tokenizer.stop_token_ids})
        } | options
        ids = tokenizer.apply_chat_template(
            prompt, add_generation_prompt=True, return_tensors="pt"
        ).input_ids
    new = model.generate(ids, tokenizer=tokenizer, **options)[0, ids.shape[1] :]
    return {
        "text": tokenizer.decode(new, skip_special_tokens=True),
        "prompt_tokens": ids.shape[1], "new_tokens": len(new),
    }  # fmt: skip


def without_reason(answer: dict) -> dict:
    return {k: v for k, v in answer.items() if k not in ("row", "reason")}


@pytest.mark.parametrize("invariant", [False, True])
def test_answers_are_those_of_generate(answer, model, tokenizer, invariant):
    chats = [chat(text) for text in PROMPTS if text]
    rows = [{"prompt": x} for x in PROMPTS] + [{"messages": x} for x in chats]
    answers = answer(rows, batch_size=3, batch_invariant=invariant)
    for found, prompt in zip(answers, PROMPTS + chats, strict=True):
        assert without_reason(found) == generated(model, tokenizer, prompt, max_new_tokens=6)


def test_options_of_a_row_come_before_those_of_the_job(answer, model, tokenizer):
    rows = [
        {"prompt": "hello", "max_new_tokens": 3},
        {"prompt": "hello", "max_length": 9},
        {"prompt": "hello", "do_sample": True, "temperature": 0.7, "top_k": 5, "seed": 3},
        {"prompt": "hello", "do_sample": True},
        {"prompt": "hello", "do_sample": True},
        {"prompt": "hello"},
    ]
    found = answer(rows, seed=7, options={"repetition_penalty": 1.5})
    given = [{k: v for k, v in row.items() if k != "prompt"} for row in rows]
    for row in (3, 4):  # as the rows of a batch in generate()
        given[row]["seed"] = seed_of(7, row)
    for one, options in zip(found, given, strict=True):
        lengths = {} if "max_length" in options else {"max_new_tokens": 6}
        options = {"repetition_penalty": 1.5, **lengths, **options}
        assert without_reason(one) == generated(model, tokenizer, "hello", **options)
    assert found[3]["text"] != found[4]["text"]


def test_text_ends_before_a_stop_string(answer):
    (whole,) = answer([{"prompt": "hello"}], options={"max_new_tokens": 20})
    stop = whole["text"][3:5]
    end = whole["text"].index(stop)
    found = answer(
        [{"prompt": "hello", "stop_strings": [stop, "never"]}, {"prompt": "hello"}],
        options={"max_new_tokens": 20, "stop_strings": stop},
    )
    for one in found:
        assert (one["text"], one["reason"]) == (whole["text"][:end], "stop")
        assert one["new_tokens"] < whole["new_tokens"]


def test_answer_ends_at_an_end_token(answer, model, tokenizer):
    ids = tokenizer("hello", return_tensors="pt").input_ids
    new = model.generate(ids, max_new_tokens=6)[0, ids.shape[1] :].tolist()
    (found,) = answer([{"prompt": "hello", "eos_token_id": new[-1]}])
    end = new.index(new[-1]) + 1
    assert (found["reason"], found["new_tokens"]) == ("stop", end)
    assert found["text"] == tokenizer.decode(new[:end], skip_special_tokens=True)


def test_id_and_unknown_columns_are_in_the_answer(answer):
    rows = [{"prompt": "a", "id": 7, "label": [1], "text": "gold"}, {"id": "x", "source": "web"}]
    good, bad = answer(rows)
    assert (good["id"], good["columns"]) == (7, {"label": [1], "text": "gold"})
    assert (bad["id"], bad["columns"]) == ("x", {"source": "web"})
    assert "one of the columns prompt (text), messages (a chat)" in bad["error"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a", "temprature": 1}, "'temprature' is no option: did you mean temperature?"),
        ({"prompt": "a", "max_tokens": 1}, "'max_tokens' is no option: did you mean max_new_tok"),
        ({"prompt": "a", "num_beams": 4}, "num_beams=4 is not supported: use sampling"),
        ({"prompt": "a", "num_return_sequences": 2}, "a request has one text"),
        ({"prompt": "a", "temperature": -1, "do_sample": True}, "temperature=-1 is out of range"),
        ({"prompt": "a", "top_p": "x", "do_sample": True}, "top_p='x' is out of range"),
        ({"prompt": "a", "seed": 2**70}, "must be an integer from 0"),
        ({"prompt": "a", "max_new_tokens": 0}, "max_new_tokens=0 must be an integer of at least 1"),
        ({"prompt": "a", "max_new_tokens": 600}, "do not fit the model's context of 256"),
        ({"prompt": "a" * 300}, "do not fit the model's context of 256"),
        ({"prompt": "a" * 300_000}, "300000 characters does not fit the limit of 256 tokens"),
        ({"prompt": "a", "stop_strings": [""]}, "must be non-empty strings"),
        ({"prompt": 5}, "column prompt must be text, not 5"),
        ({"prompt": "a", "messages": chat("a")}, "one of the columns prompt (text), messages"),
        ({"label": 1}, "one of the columns prompt (text), messages"),
        ({"prompt": "\ud800"}, "must be a str of valid Unicode"),
        ({"messages": []}, "messages must be a list of at least one message"),
        ({"messages": "hello"}, "messages must be a list of at least one message"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, "roles must alternate"),
        ({"messages": chat(5)}, "the template failed: TemplateError: Invalid content type"),
    ],
)  # fmt: skip
def test_bad_row_is_an_error_and_the_others_go_on(answer, row, message):
    first, bad, last = answer([{"prompt": "hello"}, row, {"prompt": "hello"}])
    assert message in bad["error"]
    assert "text" not in bad and bad["row"] == 1
    assert first["text"] == last["text"] and first["new_tokens"] == 6


def test_integers_may_be_floats(answer):
    """pandas writes integers as floats in a column that has nulls."""
    row = {"prompt": "hello", "max_new_tokens": 3.0, "do_sample": True, "temperature": 1.0}
    whole, part = answer([row, {**row, "max_new_tokens": 2.5}])
    assert whole["new_tokens"] == 3
    assert part["error"] == "max_new_tokens=2.5 must be an integer of at least 1"


def test_option_of_the_job_out_of_range_ends_the_job(answer):
    with pytest.raises(ValueError, match=r"temperature=-1\.0 is out of range"):
        answer([{"prompt": "hello"}], options={"temperature": -1.0, "do_sample": True})


def test_rows_that_cannot_be_prepared_do_not_end_the_job(model, tokenizer):
    """RecursionError is a RuntimeError, as the errors of a GPU are."""
    tasks = [Task(number, error=RecursionError("deep")) for number in range(9)]
    job = Job(model="", batch_size=1, options={"max_new_tokens": 2})
    found = [*continue_prompts(model, tokenizer, job, tasks)]
    assert [x["error"] for x in found] == ["RecursionError: deep"] * 9


def test_system_message_is_in_front_of_chats_that_have_none(answer, model, tokenizer):
    rows = [{"messages": chat("hello")}, {"messages": chat("hello", "hell")}, {"prompt": "hello"}]
    expected = [chat("hello", "the winner"), chat("hello", "hell"), "hello"]
    for found, prompt in zip(answer(rows, system="the winner"), expected, strict=True):
        assert without_reason(found) == generated(model, tokenizer, prompt, max_new_tokens=6)


def test_system_message_is_computed_once(model, tokenizer, monkeypatch):
    job = Job(model="", system="the winner " * 9, options={"max_new_tokens": 2})
    prefix = Preparer(model, tokenizer, job).prefix
    assert len(prefix) > 20
    lengths = []
    forward = model.hidden_states

    def counting(ids, *args, **kwargs):
        lengths.append(ids.shape[1])
        return forward(ids, *args, **kwargs)

    monkeypatch.setattr(model, "hidden_states", counting)
    rows = [Numbered(i, {"messages": chat(text)}) for i, text in enumerate("abcd")]
    assert all("text" in x for x in answers_of(model, tokenizer, job, rows))
    assert sum(lengths) < 2 * len(prefix)


def test_template_without_system_messages_ends_the_job(model, tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", "{{ raise_exception('no system messages') }}")
    with pytest.raises(ValueError, match="no system messages"):
        Preparer(model, tokenizer, Job(model="", system="a"))


def test_rows_are_read_as_texts_end(model, tokenizer):
    """There is no end to the rows, so a job that reads them all would not answer."""
    read = []

    def rows():
        for number in count():
            read.append(number)
            yield Numbered(number, {"prompt": "hello"} if number % 3 else ValueError("bad"))

    job = Job(model="", options={"max_new_tokens": 3}, batch_size=4, max_length=32)
    answers = answers_of(model, tokenizer, job, rows())
    for answered in range(12):
        assert len(read) <= answered + job.batch_size + MAX_AHEAD
        next(answers)
    answers.close()


def test_thoughts_of_a_chat_are_not_in_the_text(model, tmp_path, monkeypatch):
    tokenizer = Tokenizer.from_pretrained(write_chat_checkpoint(tmp_path, "gemma4"))
    ids = tokenizer.encode("<|channel>thought\nthe<channel|>hello", add_special_tokens=False)

    def generate_many(requests, **_):
        return [Generated(number, ids, "stop", []) for number, _ in enumerate(requests)]

    monkeypatch.setattr(model, "generate_many", generate_many)
    tasks = [Task(0, ids=[2], chat=True), Task(1, ids=[2])]
    in_chat, in_text = continue_prompts(model, tokenizer, Job(model=""), tasks)
    assert (in_chat["text"], in_chat["thoughts"].strip()) == ("hello", "the")
    assert in_text["text"].endswith("hello") and "thoughts" not in in_text


@pytest.mark.parametrize("broken", [3, None], ids=["one row", "all rows"])
def test_rows_whose_computation_fails(answer, model, monkeypatch, broken):
    """One such row is an error. If all fail, the job ends, and they get no answer."""
    forward = model.hidden_states

    def failing(ids, *args, **kwargs):
        if ids.shape[1] > 1 and (broken is None or ids.shape[1] == broken):
            raise RuntimeError("CUDA error: device-side assert triggered")
        return forward(ids, *args, **kwargs)

    monkeypatch.setattr(model, "hidden_states", failing)
    rows = [{"prompt": text} for text in ["hello", "the the", *["hello"] * 8]]
    if broken is None:
        with pytest.raises(ValueError, match="5 rows failed one after another: CUDA error"):
            answer(rows, batch_size=2)
        return
    found = answer(rows, batch_size=2)
    assert found[1]["error"] == "RuntimeError: CUDA error: device-side assert triggered"
    assert sum("text" in x for x in found) == 9
