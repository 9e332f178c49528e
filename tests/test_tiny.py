"""The small model and its tokenizers: no text is lost, and the folder made is one that `redi_train` starts from."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from redi_train import tiny
from redi_train.tiny import make_tiny_model, train_tokenizer, word_tokenizer

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
TEXTS = ["12 clips and 34 clips are 46 clips.\nA: 46", "the answer is 7, the answer is 77"] * 5


@pytest.fixture(scope="module")
def bpe():
    return train_tokenizer(TEXTS, 320)


@given(st.text(max_size=40))
@settings(max_examples=60, deadline=None)
def test_bpe_loses_no_character(bpe, text):
    ids = bpe(text, add_special_tokens=False).input_ids
    assert bpe.decode(ids, skip_special_tokens=False) == text


def test_bpe_merges_words_but_not_digits(bpe):
    assert bpe.tokenize("34 clips") == ["3", "4", "Ġclips"]
    assert bpe.tokenize("4677") == ["4", "6", "7", "7"]
    assert 259 < len(bpe) <= 320


def test_chat_form_is_chatml(bpe):
    messages = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "\n <think>4</think> "}]
    prompt = bpe.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
    assert prompt == "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n"
    # The trace comes out character for character, its white space and <think> included.
    whole = bpe.apply_chat_template(messages, tokenize=False)
    assert whole == prompt + "\n <think>4</think> <|im_end|>\n"
    assert (bpe.eos_token, bpe.pad_token) == ("<|im_end|>", "<|endoftext|>")
    # One token each, so that a completion's end is one label.
    assert [len(bpe(name, add_special_tokens=False).input_ids) for name in ("<|im_start|>", "<|im_end|>")] == [1, 1]


def test_plain_form_has_no_template_and_a_padding_token_that_is_not_eos():
    tokenizer = train_tokenizer(TEXTS, 300, chat=False)
    assert tokenizer.chat_template is None
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|endoftext|>", "<|pad|>")
    assert tokenizer.eos_token_id != tokenizer.pad_token_id


def test_vocabulary_without_room_for_the_bytes_is_refused():
    assert len(train_tokenizer(TEXTS, 259)) == 259
    with pytest.raises(ValueError, match="vocab_size 258 is too small: byte-level BPE needs 259"):
        train_tokenizer(TEXTS, 258)


WORDS = ["a", "ab", "abc", "c", "|", "=", "|=", "\n|", "\n", " ", "."]


@given(st.lists(st.sampled_from(WORDS), max_size=12))
@settings(max_examples=100, deadline=None)
def test_words_are_found_again_longest_first(words):
    tokenizer = word_tokenizer(WORDS)
    text = "".join(words)
    # The reference: at each place the longest word that fits.
    expected, rest = [], text
    while rest:
        word = max((word for word in WORDS if rest.startswith(word)), key=len)
        expected.append(word)
        rest = rest[len(word) :]
    ids = tokenizer(text).input_ids
    assert tokenizer.convert_ids_to_tokens(ids) == expected
    assert tokenizer.decode(ids) == text


def test_text_of_other_words_raises():
    with pytest.raises(Exception, match="Missing"):
        word_tokenizer(WORDS)("abx")


def test_model_has_the_sizes_asked_for_and_small_float32_weights(bpe):
    model = make_tiny_model(
        bpe,
        hidden_size=48,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=3,
        intermediate_size=80,
        initializer_range=0.1,
    )
    assert model.config.model_type == "qwen2"
    assert len(model.model.layers) == 3
    layer = model.model.layers[0]
    assert layer.self_attn.q_proj.weight.shape == (48, 48)
    assert layer.self_attn.k_proj.weight.shape == (24, 48)
    assert layer.mlp.up_proj.weight.shape == (80, 48)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.lm_head.weight.shape == (len(bpe), 48)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    # 48 * 80 normal draws: their standard deviation is off by 1/sqrt(2 * 3840), 1.1%, at one sigma.
    assert layer.mlp.up_proj.weight.std().item() == pytest.approx(0.1, rel=0.05)
    assert (model.config.eos_token_id, model.generation_config.eos_token_id) == (bpe.eos_token_id, bpe.eos_token_id)


def test_weights_follow_from_the_seed_alone(bpe):
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = make_tiny_model(bpe, hidden_size=32, seed=5)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    again, other = make_tiny_model(bpe, hidden_size=32, seed=5), make_tiny_model(bpe, hidden_size=32, seed=6)
    name = "model.layers.1.mlp.up_proj.weight"
    assert torch.equal(first.state_dict()[name], again.state_dict()[name])
    assert not torch.equal(first.state_dict()[name], other.state_dict()[name])


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"hidden_size": 36, "num_attention_heads": 4}, r"hidden_size 36 must be a multiple of .*\(8\)"),
        ({"num_attention_heads": 4, "num_key_value_heads": 3}, "num_attention_heads 4 must be a multiple of .* 3"),
        ({"num_hidden_layers": 0}, "num_hidden_layers must be at least 1, not 0"),
        ({"num_attention_heads": 0}, "num_attention_heads must be at least 1, not 0"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(bpe, sizes, message):
    with pytest.raises(ValueError, match=message):
        make_tiny_model(bpe, **sizes)


@pytest.fixture
def traces(tmp_path):
    rows = [
        {"problem": f"{i}+1?", "generations": [f"it is {i + 1}", "who knows"], "correct": [True, False]}
        for i in range(9)
    ]
    path = tmp_path / "traces.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_command_saves_a_folder_that_loads(traces, tmp_path, capsys):
    out = tmp_path / "model"
    arguments = ["--vocab_size", "269", "--hidden_size", "32", "--num_hidden_layers", "2", "--intermediate_size", "40"]
    arguments += ["--num_attention_heads", "2", "--num_key_value_heads", "1", "--seed", "3"]
    assert tiny.main(["--dataset_name", str(traces), "--output_dir", str(out), *arguments]) == 0
    assert "tokenizer of 269 tokens" in capsys.readouterr().out

    tokenizer, model = AutoTokenizer.from_pretrained(out), AutoModelForCausalLM.from_pretrained(out)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 40, "num_attention_heads": 2}
    assert {name: getattr(model.config, name) for name in sizes} == sizes
    expected = make_tiny_model(tokenizer, **sizes, num_key_value_heads=1, seed=3)
    assert torch.equal(model.model.layers[1].mlp.up_proj.weight, expected.model.layers[1].mlp.up_proj.weight)
    assert model.lm_head.weight is model.model.embed_tokens.weight

    assert tokenizer.tokenize("who") == ["who"]  # only in the second, wrong, trace: all of the text is read
    assert tokenizer.decode(tokenizer("a  b\n 12.").input_ids) == "a  b\n 12."
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "?"}], tokenize=False, add_generation_prompt=True
    )
    assert prompt == "<|im_start|>user\n?<|im_end|>\n<|im_start|>assistant\n"
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (model.config.eos_token_id, model.config.pad_token_id)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dataset_name", "nowhere.jsonl"], "dataset file nowhere.jsonl does not exist."),
        (["--dataset_name", "TRACES", "--vocab_size", "5"], "vocab_size 5 is too small"),
        (["--dataset_name", "TRACES", "--num_key_value_heads", "3"], "must be a multiple of num_key_value_heads 3"),
        (["--dataset_name", "OTHER"], "not in the traces layout"),
        (["--dataset_name", "TRACES", "--output_dir", "FULL"], "is not an empty folder; give a new --output_dir"),
    ],
)
def test_command_refuses_in_one_sentence_and_writes_nothing(arguments, message, traces, tmp_path, capsys):
    other = tmp_path / "other.jsonl"
    other.write_text(json.dumps({"prompt": "a", "chosen": "b", "rejected": "c"}) + "\n")
    full = tmp_path / "full"
    full.mkdir()
    (full / "kept.txt").write_text("kept")
    paths = {"TRACES": traces, "OTHER": other, "FULL": full}
    arguments = [str(paths.get(argument, argument)) for argument in arguments]
    before = sorted(tmp_path.rglob("*"))
    assert tiny.main(["--output_dir", str(tmp_path / "new"), *arguments]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("redi_train.tiny: ")
    assert message in error
    assert sorted(tmp_path.rglob("*")) == before


def test_command_names_an_unknown_option(capsys):
    with pytest.raises(SystemExit) as exit_info:
        tiny.main(["--dataset_name", "x.jsonl", "--output_dir", "y", "--hidden", "64"])
    assert exit_info.value.code == 2
    assert "unrecognized arguments: --hidden 64" in capsys.readouterr().err


@pytest.mark.skipif(not DATA.is_dir(), reason="the shared data are not beside this checkout")
def test_real_text_is_compressed_and_kept():
    lines = (DATA / "gsm8k-train.jsonl").read_text(encoding="utf-8").splitlines()
    texts = [json.loads(line)["generations"][0] for line in lines[:1000]]
    tokenizer = train_tokenizer(texts, 1000)
    ids = tokenizer(texts).input_ids
    assert tokenizer.batch_decode(ids) == texts
    # Bytes alone would be 1 a token. 2.2 was measured; digits and arithmetic, half of this text, stay single.
    assert sum(map(len, texts)) / sum(map(len, ids)) > 1.8
