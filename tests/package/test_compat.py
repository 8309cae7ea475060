"""Tests transformers' keywords: those that are not implemented are accepted if they change nothing,
and refused otherwise."""

import pytest
import torch
import transformers
from tiny_models import CONFIGS, Twins
from tiny_tokenizer import tiny_backend, write_tokenizer

from gemma_fast import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from gemma_fast.compat import ATTRIBUTES
from gemma_fast.text.tokenizer import Tokenizer

IDS = torch.tensor([[2, 5, 9]])
GREEDY = {"max_new_tokens": 4, "eos_token_id": []}


@pytest.fixture(scope="module")
def one(tmp_path_factory) -> Twins:
    return Twins.build(CONFIGS["gemma3-gqa"], tmp_path_factory.mktemp("keywords"))


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"num_beams": 4}, r"generate\(\): num_beams=4 is not supported: .*greedy"),
        ({"output_attentions": True}, r"gemma_fast.hf.accelerate\(model\)"),
        ({"past_key_values": torch.ones(2)}, "past_key_values=.* is not supported: call model"),
        ({"cache": torch.ones(2)}, "cache=.* is not supported: call model"),
        (
            {"assistant_model": torch.nn.Linear(2, 2)},
            "_model=<Linear> is not supported: it changes",
        ),
        ({"past_key_values": torch.ones(9, 9)}, "past_key_values=<Tensor> is not supported: call"),
        ({"max_tokens": 3}, "'max_tokens': did you mean max_new_tokens?"),
        ({"attention_masks": 3}, "'attention_masks': did you mean attention_mask?"),
        ({"attention_mask": {}, "generation_config": {}}, "generation_config twice"),
        ({"cache_implementation": "quantized"}, "cache_implementation='quantized' is not"),
        (
            {"token_type_ids": torch.zeros(1, 3)},
            "token_type_ids=<Tensor> is not supported: pass only",
        ),
        (
            {"mm_token_type_ids": torch.zeros(1, 3)},
            "mm_token_type_ids=<Tensor> is not supported: pass only input_ids",
        ),
        ({"pixel_values": torch.ones(1)}, "pixel_values=<Tensor> is not .*: images, video and"),
        ({"num_beans": 1}, r"generate\(\) got an unexpected keyword argument 'num_beans'"),
        ({"inputs": IDS}, "both input_ids and inputs"),
        ({"generation_config": {"num_beams": 2}}, "generation_config: num_beams=2 is not"),
        ({"generation_config": {"nonsense": 2}}, "generation_config got an unexpected.*nonsense"),
    ],
    ids=str,
)
def test_generate_refuses_unsupported_keywords(one, keywords, message):
    with pytest.raises(TypeError, match=message):
        one.model.generate(IDS, **GREEDY, **keywords)


def test_generate_accepts_keywords_that_change_nothing(one):
    expected = one.model.generate(IDS, **GREEDY)
    keywords = {
        "use_cache": False, "num_beams": 1, "num_return_sequences": 1, "length_penalty": 1.0,
        "return_dict_in_generate": False, "output_scores": False, "early_stopping": False,
        "cache_implementation": "static", "logits_processor": None, "stopping_criteria": None,
        "bos_token_id": 2, "disable_compile": True, "no_repeat_ngram_size": 0, "logits_to_keep": 1,
    }  # fmt: skip
    assert torch.equal(one.model.generate(inputs=IDS, **GREEDY, **keywords), expected)


@pytest.mark.parametrize(
    "kind",
    [transformers.GenerationConfig, GenerationConfig, dict],
    ids=["transformers", "gemma_fast", "dict"],
)
def test_generation_config_is_accepted(one, kind):
    """The given config overrides the model's own; keywords of the call override both configs."""
    config = kind(max_new_tokens=6, do_sample=True, top_k=1, num_beams=1)
    first = one.model.generate(IDS, generation_config=config, eos_token_id=[])
    assert torch.equal(first, one.model.generate(IDS, max_new_tokens=6, eos_token_id=[]))
    assert one.model.generate(IDS, generation_config=config, **GREEDY).shape == (1, 7)
    assert torch.equal(one.model.generate(IDS, config, eos_token_id=[]), first)
    with pytest.raises(ValueError, match="must be a GenerationConfig or a dict, not 7"):
        one.model.generate(IDS, generation_config=7)


def test_length_options_limit_the_output(one):
    def length(**keywords) -> int:
        return one.model.generate(IDS, eos_token_id=[], **keywords).shape[1]

    assert length(max_length=8) == 8
    assert length(max_length=8, max_new_tokens=2) == 5
    with pytest.raises(ValueError, match="max_length=3 includes the prompt, which already has 3"):
        length(max_length=3)
    with pytest.warns(UserWarning, match="pass max_new_tokens: the default is 20"):
        assert length() == 23
    long = torch.full((1, 250), 5)
    with pytest.warns(UserWarning, match="pass max_new_tokens"):
        assert one.model.generate(long, eos_token_id=[]).shape == (1, 256)


def test_generation_config_refuses_unsupported_attributes(one):
    config = GenerationConfig(top_k=3)
    config.max_new_tokens, config.cache_implementation = 5, "static"
    assert (config.max_new_tokens, config.top_k, config.temperature) == (5, 3, None)
    with pytest.raises(TypeError, match="num_beams=2 is not supported"):
        config.num_beams = 2
    with pytest.raises(TypeError, match="unexpected keyword argument 'max_tokens'"):
        config.max_tokens = 2
    with pytest.raises(AttributeError, match="no option 'max_tokens', only max_new_tokens"):
        print(config.max_tokens)


def test_forward_accepts_keywords_that_change_nothing_and_refuses_others(one):
    expected = one.model(IDS).logits
    keywords = {"return_dict": True, "output_attentions": False, "labels": None}
    keywords["token_type_ids"] = torch.ones_like(IDS)
    assert torch.equal(one.model(IDS, **keywords).logits, expected)
    for ignored in (
        "token_type_ids", "mm_token_type_ids", "cache_position", "num_logits_to_keep"
    ):  # fmt: skip
        value = 1 if ignored == "num_logits_to_keep" else torch.ones_like(IDS)
        assert torch.equal(one.model(IDS, **{ignored: value}).logits, expected)
        assert torch.equal(one.hf(IDS, **{ignored: value}).logits, one.hf(IDS).logits)
    for given, message in (
        ({"labels": IDS}, "labels=.* is not supported: compute the loss from"),
        ({"output_hidden_states": True}, "output_hidden_states=True is not supported"),
        ({"input_features": torch.ones(1)}, "input_features=<Tensor> is not .*: images, video and"),
        ({"return_dict": False}, "return_dict=False is not supported: index the result"),
        ({"per_layer_inputs": IDS}, "per_layer_inputs=.* is not supported: pass input_ids"),
        ({"token_type_idz": IDS}, r"forward\(\) got an unexpected keyword.*token_type_idz"),
    ):
        with pytest.raises(TypeError, match=message):
            one.model(IDS, **given)


def test_attributes_of_transformers_name_a_way_out(one):
    for name, way_out in ATTRIBUTES.items():
        assert not hasattr(one.model, name)
        with pytest.raises(AttributeError) as error:
            getattr(one.model, name)
        assert str(error.value) == f"GemmaForCausalLM has no {name}: {way_out}"
    with pytest.raises(AttributeError, match="has no attribute 'nonsense'"):
        print(one.model.nonsense)
    assert one.model.can_generate() is one.hf.can_generate() is True
    assert one.model.num_parameters() == one.hf.num_parameters()


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        (
            {"quantization_config": object()},
            r"quantization_config=.*: pass quantize='int8' or 'int4'",
        ),
        ({"load_in_4bit": True}, "load_in_4bit=True is not supported: pass quantize='int4'"),
        ({"attn_implementation": "egaer"}, "attn_implementation='egaer' is not supported"),
        ({"subfolder": "x"}, "subfolder='x' is not supported: .*snapshot_download"),
        ({"use_auth_token": "hf_x"}, "pass token"),
        ({"dtype": "float32", "torch_dtype": "float32"}, "both dtype and torch_dtype"),
        ({"nonsense": 1}, "unexpected keyword argument 'nonsense'"),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_from_pretrained_refuses_unsupported_keywords(one, keywords, message):
    with pytest.raises(TypeError, match=message):
        AutoModelForCausalLM.from_pretrained(one.path, **keywords)


def test_from_pretrained_accepts_keywords_that_change_nothing(one):
    model = AutoModelForCausalLM.from_pretrained(
        one.path, torch_dtype="bfloat16", device_map={"": "cpu"}, low_cpu_mem_usage=True,
        attn_implementation="flash_attention_2", trust_remote_code=False, use_safetensors=True,
    )  # fmt: skip
    assert model.dtype == torch.bfloat16
    with pytest.raises(ValueError, match="dtype 'float8' is not one of"):
        AutoModelForCausalLM.from_pretrained(one.path, torch_dtype="float8")
    with pytest.raises(ValueError, match="quantize='int5' is not one of 'int8', 'int4', 'none'"):
        AutoModelForCausalLM.from_pretrained("nowhere/nothing", quantize="int5")


def test_tokenizer_refuses_unsupported_options(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(
        write_tokenizer(tmp_path), padding_side="left", use_fast=True
    )
    assert tokenizer.padding_side == "left"
    with pytest.raises(TypeError, match="use_fast=False is not supported"):
        AutoTokenizer.from_pretrained(tmp_path, use_fast=False)
    with pytest.raises(ValueError, match="pad_token='nothing' is not in the vocabulary"):
        tokenizer.pad_token = "nothing"


@pytest.mark.filterwarnings("ignore:.*there is no chat template")
def test_batch_of_chats_is_padded():
    tokenizer = Tokenizer(tiny_backend(), "tiny")
    chats = [[{"role": "user", "content": text}] for text in ("a b", "hello the world")]
    options = {"add_generation_prompt": True, "return_tensors": "pt"}
    batch = tokenizer.apply_chat_template(chats, padding=True, **options)
    for row, mask, chat in zip(batch.input_ids, batch.attention_mask, chats, strict=True):
        alone = tokenizer.apply_chat_template(chat, **options).input_ids
        assert torch.equal(row[mask.bool()].unsqueeze(0), alone)
    texts = tokenizer.apply_chat_template(chats, tokenize=False)
    assert texts == [tokenizer.apply_chat_template(chat, tokenize=False) for chat in chats]
    with pytest.raises(ValueError, match="do not fit one tensor: pass padding=True"):
        tokenizer.apply_chat_template(chats, **options)
