"""The loss inside a model's forward, against the equations on the logits of each sequence alone; what is refused."""

import copy
import inspect
from itertools import pairwise

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

from redi_kernels import pack_sequences, reference
from redi_train import model as model_module
from redi_train.model import attach_loss, check_head, check_precision, load_model, load_tokenizer, prepare_model
from redi_train.tiny import make_tiny_model, train_tokenizer, word_tokenizer

VOCAB = 97
SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}


def make(model_class, config_class, **options):
    """A random model with logits of several nats, so that a wrong scale or cap shows, in evaluation mode."""
    torch.manual_seed(0)
    model = model_class(config_class(**SHAPE, **options)).double()
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(40)
    return model.eval()


def make_llama(**options):
    return make(LlamaForCausalLM, LlamaConfig, tie_word_embeddings=False, **options)


@pytest.fixture(scope="module")
def batch():
    generator = torch.Generator().manual_seed(1)
    sequences = []
    for prompt, completion, is_chosen in ((3, 5, True), (3, 2, False), (2, 7, True), (2, 7, False), (1, 1, True)):
        ids = torch.randint(1, VOCAB, (prompt + completion,), generator=generator).tolist()
        sequences.append((ids, [-100] * prompt + ids[prompt:], is_chosen))
    return pack_sequences(sequences)


def one_by_one(model, batch):
    """Float64 logits of every packed token, each sequence through the model's own forward alone."""
    bounds = batch.cu_seqlens.tolist()
    return torch.cat([model(input_ids=batch.input_ids[:, a:b]).logits[0] for a, b in pairwise(bounds)])


def gradients(model):
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


FLOAT64 = 1e-10  # relative; the same sums of at most 1e3 terms of float64, in another order
FLOAT32 = 1e-5  # where Transformers computes in float32 whatever the model's dtype: eager's softmax, Cohere's norms


def check_against_formulas(model, batch, rtol=FLOAT64):
    """Loss, LogPS and gradients of both stages against the equations."""
    of_batch = (batch.labels, batch.cu_seqlens, batch.is_chosen)
    for objective, expected in (
        ({"num_pairs": 5, "alpha": 0.3}, lambda z: reference.redi_loss(z, *of_batch, alpha=0.3, num_pairs=5)),
        ({"num_tokens": 11}, lambda z: (reference.sft_loss(z, *of_batch[:2], num_tokens=11),)),
    ):
        model.zero_grad()
        output = model(batch=batch, **objective)
        output["loss"].backward()
        got = gradients(model)
        model.zero_grad()
        loss, *logps = expected(one_by_one(model, batch))
        loss.backward()
        torch.testing.assert_close(output["loss"], loss.detach(), rtol=rtol, atol=0)
        for name, values in zip(("chosen_logps", "rejected_logps"), logps, strict=False):
            torch.testing.assert_close(output[name], values.detach(), rtol=rtol, atol=0)
        wanted = gradients(model)
        assert got.keys() == wanted.keys()
        for name, grad in wanted.items():
            torch.testing.assert_close(got[name], grad, rtol=rtol, atol=rtol * grad.abs().max().item(), msg=name)


@pytest.mark.parametrize(("attention", "rtol"), [("redi_varlen", FLOAT64), ("sdpa", FLOAT64), ("eager", FLOAT32)])
def test_loss_and_gradients_are_the_papers(batch, attention, rtol):
    model = make_llama()
    prepare_model(model, attn_implementation=attention)
    check_against_formulas(model, batch, rtol)


@pytest.mark.parametrize(
    ("make_model", "attention", "rtol"),
    [
        (lambda: make(CohereForCausalLM, CohereConfig, logit_scale=0.3), "redi_varlen", FLOAT32),
        (lambda: make(GraniteForCausalLM, GraniteConfig, logits_scaling=3.0), "redi_varlen", FLOAT64),
        (lambda: make(Gemma2ForCausalLM, Gemma2Config, head_dim=8, final_logit_softcapping=5.0), "eager", FLOAT32),
        (lambda: make(LlamaForCausalLM, LlamaConfig, tie_word_embeddings=True), "redi_varlen", FLOAT64),
    ],
    ids=["cohere", "granite", "gemma2", "tied"],
)
def test_scaled_capped_and_tied_heads(batch, make_model, attention, rtol):
    model = make_model()
    prepare_model(model, attn_implementation=attention)
    check_against_formulas(model, batch, rtol)


def test_gradient_checkpointing_changes_nothing(batch):
    model = make_llama()
    prepare_model(model)
    model.train()
    grads = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        model(batch=batch, num_pairs=3)["loss"].backward()
        grads.append(gradients(model))
    assert model.is_gradient_checkpointing
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, rtol=1e-12, atol=0, msg=name)


def test_without_a_batch_the_model_is_what_it_was(tmp_path):
    tokenizer = train_tokenizer(["some text"], 300)
    model = make_tiny_model(tokenizer, hidden_size=32, num_hidden_layers=2, intermediate_size=48)
    untouched = copy.deepcopy(model)
    prepare_model(model)
    assert inspect.signature(model.forward) == inspect.signature(untouched.forward)
    ids = tokenizer(["some text", "text"], padding=True, return_tensors="pt")
    torch.testing.assert_close(model(**ids).logits, untouched(**ids).logits)
    options = {"max_new_tokens": 5, "do_sample": False}
    assert model.generate(**ids, **options).tolist() == untouched.generate(**ids, **options).tolist()
    model.save_pretrained(tmp_path)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(saved) is type(untouched)
    assert saved.config._attn_implementation == "sdpa"
    torch.testing.assert_close(saved(**ids).logits, untouched(**ids).logits)


def test_attaching_twice_is_attaching_once(batch):
    model = make_llama()
    prepare_model(model)
    forward = model.forward
    attach_loss(model)
    assert model.forward == forward


def test_a_copy_uses_its_own_weights(batch):
    model = make_llama()
    prepare_model(model)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert twin(batch=batch, num_pairs=3)["loss"] != model(batch=batch, num_pairs=3)["loss"]


def test_an_unknown_head_is_refused(monkeypatch):
    model = make_llama()
    plain_forward = type(model).forward

    def scaled(self, *args, **kwargs):
        output = plain_forward(self, *args, **kwargs)
        output.logits = 1.05 * output.logits
        return output

    monkeypatch.setattr(type(model), "forward", scaled)
    with pytest.raises(ValueError, match="turns hidden states into logits in a way that this program does not know"):
        prepare_model(model)


def test_the_head_check_sees_each_fact_missing(monkeypatch):
    capped = make(Gemma2ForCausalLM, Gemma2Config, head_dim=8, final_logit_softcapping=5.0)
    scaled = make(CohereForCausalLM, CohereConfig, logit_scale=0.3)
    biased = make_llama()
    biased.lm_head.bias = torch.nn.Parameter(torch.randn(VOCAB, dtype=torch.float64))
    for model, missing in ((capped, {"logit_softcap": None}), (scaled, {"logit_scale": 1.0}), (biased, {"bias": None})):
        check_head(model)
        facts = model_module.head_facts(model) | missing
        with monkeypatch.context() as patch:
            patch.setattr(model_module, "head_facts", lambda _, facts=facts: facts)
            with pytest.raises(ValueError, match="in a way that this program does not know"):
                check_head(model)


def test_unsupported_attention_is_refused_by_default_only():
    gemma = make(Gemma2ForCausalLM, Gemma2Config, head_dim=8)
    with pytest.raises(ValueError, match="cannot be trained on packed sequences"):
        prepare_model(gemma)


def test_lora_trains_the_adapter_through_the_loss(batch):
    model = get_peft_model(make_llama(), LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", r=4))
    prepare_model(model)
    with torch.no_grad():  # B starts at zero, where A's gradient is zero
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(2))
    check_against_formulas(model.double(), batch)
    assert all("lora" in name for name in gradients(model))


def test_lora_on_the_output_layer_is_refused():
    model = get_peft_model(make_llama(), LoraConfig(task_type="CAUSAL_LM", target_modules=["lm_head"]))
    with pytest.raises(ValueError, match="leave it out of the LoRA target modules"):
        prepare_model(model)


@pytest.fixture
def bf16_folder(tmp_path):
    tokenizer = train_tokenizer(["some text"], 300)
    model = make_tiny_model(tokenizer, hidden_size=32, num_hidden_layers=2, intermediate_size=48)
    for saved in (model.bfloat16(), tokenizer):
        saved.save_pretrained(tmp_path / "bf16")
    return str(tmp_path / "bf16")


def test_trained_weights_are_float32_and_frozen_ones_need_not_be(bf16_folder):
    assert {p.dtype for p in load_model(bf16_folder).parameters()} == {torch.float32}
    lora = {"r": 4, "target_modules": "all-linear"}
    model = load_model(bf16_folder, dtype=torch.bfloat16, lora=lora)
    assert {(p.requires_grad, p.dtype) for p in model.parameters()} == {(True, torch.float32), (False, torch.bfloat16)}
    with pytest.raises(ValueError, match="would train 16-bit weights"):
        load_model(bf16_folder, dtype=torch.bfloat16)
    half = AutoModelForCausalLM.from_pretrained(bf16_folder)  # Transformers keeps the checkpoint's dtype
    with pytest.raises(ValueError, match=r"embed_tokens.weight is trained in bfloat16"):
        check_precision(half)


def test_what_is_no_model_is_said_so(tmp_path, bf16_folder):
    with pytest.raises(FileNotFoundError, match="no model folder"):
        load_model(str(tmp_path / "absent"))
    lora = {"r": 4, "target_modules": "all-linear"}
    load_model(bf16_folder, lora=lora).save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match="LoRA adapter, not a model; merge it"):
        load_model(str(tmp_path / "adapter"))


def test_a_chat_template_can_be_given_as_text_or_file(tmp_path, bf16_folder):
    template = "{{ messages[0]['content'] }}"
    (tmp_path / "template.jinja").write_text(template)
    for given in (template, str(tmp_path / "template.jinja")):
        assert load_tokenizer(bf16_folder, chat_template=given).chat_template == template


def test_a_tokenizer_of_its_own_is_loaded_as_it_was_saved(tmp_path):
    """AutoTokenizer alone would load a Qwen2Tokenizer here, whose pre-tokeniser splits the words differently."""
    tokenizer = word_tokenizer(["=?\n", "|=", "|", *"0123"])
    make_tiny_model(
        tokenizer, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1
    ).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    text = "1|=2=?\n|3"
    assert load_tokenizer(str(tmp_path))(text).input_ids == tokenizer(text).input_ids
    assert tokenizer.decode(tokenizer(text).input_ids) == text
