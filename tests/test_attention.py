import importlib
import sys
from types import SimpleNamespace
from unittest.mock import create_autospec

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoModelForCausalLM,
    BertConfig,
    BloomConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPTNeoXConfig,
    GptOssConfig,
    GraniteConfig,
    Llama4TextConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    Phi3Config,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3NextConfig,
    SeedOssConfig,
    T5Config,
)

from redi_kernels.packing import pack_sequences
from redi_train.attention import (
    ATTENTION_NAME,
    check_attention_supported,
    packed_attention_kwargs,
    register_attention,
)

varlen = importlib.import_module("redi_kernels.varlen_attention")  # the module; the package has its function
register_attention()

# Float64 rounds at 1.1e-16. What is compared below is the same sums in another order, a few hundred terms long, so it
# agrees to about 1e-14 of the largest element; one token seen across a boundary moves it by 1e-3 and more.
FLOAT64_TOLERANCE = 1e-12

LENGTHS = [6, 1, 9, 6, 4, 1, 6]


def assert_equal_up_to_rounding(actual, expected, tolerance=FLOAT64_TOLERANCE):
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance * max(1, expected.abs().max().item()))


def bounds_of(lengths):
    return torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)


def naive_attention(query, key, value, cu_seqlens, scale=None):
    """(T, Hq, D) from one T x T softmax under a mask that keeps pairs of one sequence, past and present."""
    num_rows, num_heads, head_dim = query.shape
    key, value = (x.repeat_interleave(num_heads // x.shape[1], dim=1) for x in (key, value))
    sequence = torch.bucketize(torch.arange(num_rows), cu_seqlens.long()[1:], right=True)
    position = torch.arange(num_rows)
    allowed = (sequence[:, None] == sequence) & (position[:, None] >= position)
    scores = torch.einsum("qhd,khd->hqk", query, key) * (head_dim**-0.5 if scale is None else scale)
    weights = scores.masked_fill(~allowed, -torch.inf).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, value)


def random_heads(lengths, num_heads, num_key_heads, head_dim, seed=0, dtype=torch.float64, device="cpu"):
    """query, key, value and an upstream gradient, all (T, heads, D) views of (heads, T, D), as a model may pass them"""
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(heads, sum(lengths), head_dim, generator=generator, dtype=torch.float64)
        .to(device, dtype)
        .transpose(0, 1)
        for heads in (num_heads, num_key_heads, num_key_heads, num_heads)
    ]


class TestVarlenAttention:
    @given(
        # Lengths from a small range, so that runs of equal ones, single tokens and empty sequences occur.
        lengths=st.lists(st.integers(0, 5), min_size=1, max_size=9).filter(any),
        num_key_heads=st.integers(1, 3),
        share=st.integers(1, 3),
        head_dim=st.integers(1, 9),
        scale=st.none() | st.floats(0.01, 3),
        seed=st.integers(0, 2**31),
    )
    def test_output_and_gradients_are_the_masked_softmax(self, lengths, num_key_heads, share, head_dim, scale, seed):
        *inputs, upstream = random_heads(lengths, num_key_heads * share, num_key_heads, head_dim, seed)
        inputs = [x.requires_grad_() for x in inputs]
        cu_seqlens = bounds_of(lengths)
        expected = naive_attention(*inputs, cu_seqlens, scale)
        actual = varlen.varlen_attention(*inputs, cu_seqlens, max(lengths), scale=scale)
        assert_equal_up_to_rounding(actual, expected)
        for gradient, expected_gradient in zip(
            torch.autograd.grad(actual, inputs, upstream), torch.autograd.grad(expected, inputs, upstream), strict=True
        ):
            assert_equal_up_to_rounding(gradient, expected_gradient)

    def test_runs_of_equal_lengths_are_one_call_on_views(self, monkeypatch):
        lengths = [4, 4, 4, 2, 1, 1, 4]
        query, key, value, _ = random_heads(lengths, 4, 2, 8)
        storages = [x.untyped_storage().data_ptr() for x in (query, key, value)]
        calls = []

        def recording(*heads, **options):
            assert [x.untyped_storage().data_ptr() for x in heads] == storages
            calls.append(tuple(heads[0].shape))
            return sdpa(*heads, **options)

        sdpa = F.scaled_dot_product_attention
        monkeypatch.setattr(F, "scaled_dot_product_attention", recording)
        varlen.varlen_attention(query, key, value, bounds_of(lengths), 4)
        assert calls == [(3, 4, 4, 8), (1, 4, 2, 8), (2, 4, 1, 8), (1, 4, 4, 8)]

    @pytest.mark.parametrize("bounds", [[0, 3, 8], [1, 3, 9], [0, 5, 3, 9], [0]])
    def test_bounds_that_do_not_cover_the_rows_are_refused(self, bounds):
        query, key, value, _ = random_heads([9], 2, 2, 4)
        with pytest.raises(ValueError, match="cu_seqlens must rise from 0 to the 9 rows"):
            varlen.varlen_attention(query, key, value, torch.tensor(bounds, dtype=torch.int32), 9)

    def test_heads_that_cannot_be_shared_are_refused(self):
        query, key, value, _ = random_heads([3], 3, 2, 4)
        with pytest.raises(ValueError, match="3 query heads cannot share 2 key heads"):
            varlen.varlen_attention(query, key, value, bounds_of([3]), 3)


def attention_of_torch_2_11(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1)
):
    assert query.shape[1] == key.shape[1] == value.shape[1]
    return fused_stand_in(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale, window_size == (-1, 0))


def attention_of_flash_attn(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
):
    return fused_stand_in(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal)


def fused_stand_in(query, key, value, cu_seqlens_q, cu_seqlens_k, max_q, max_k, scale, causal):
    assert causal
    assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
    assert torch.equal(cu_seqlens_q, cu_seqlens_k)
    assert cu_seqlens_q.device == query.device
    assert max_q == max_k == cu_seqlens_q.diff().max()
    assert query.dtype == key.dtype == value.dtype
    return naive_attention(query, key, value, cu_seqlens_q, scale)


class TestFusedKernels:
    """How the kernels of a GPU are called, with stand-ins of their signatures that compute on the CPU."""

    @pytest.fixture(autouse=True)
    def no_flash_attn(self, monkeypatch):
        monkeypatch.setattr(varlen, "_has_fused_kernel", lambda query, value: True)
        monkeypatch.setitem(sys.modules, "flash_attn", None)
        varlen._flash_attn_varlen_func.cache_clear()
        yield
        varlen._flash_attn_varlen_func.cache_clear()

    def use(self, monkeypatch, kernel):
        if kernel == "flash-attn":
            stand_in = create_autospec(attention_of_flash_attn, side_effect=attention_of_flash_attn)
            monkeypatch.setitem(sys.modules, "flash_attn", SimpleNamespace(flash_attn_varlen_func=stand_in))
            return stand_in
        module = importlib.import_module("torch.nn.attention.varlen")
        if kernel == "torch 2.11":
            stand_in = create_autospec(attention_of_torch_2_11, side_effect=attention_of_torch_2_11)
        else:

            def newest(*args, enable_gqa=False, **options):
                assert enable_gqa or args[0].shape[1] == args[1].shape[1]
                return fused_stand_in(*args, options.get("scale"), options.get("window_size") == (-1, 0))

            stand_in = create_autospec(module.varlen_attn, side_effect=newest)
        monkeypatch.setattr(module, "varlen_attn", stand_in)
        return stand_in

    @pytest.mark.parametrize("kernel", ["flash-attn", "torch 2.11", "torch installed"])
    @pytest.mark.parametrize(("num_heads", "num_key_heads"), [(4, 4), (6, 2)])
    @pytest.mark.parametrize("scale", [None, 0.3])
    def test_each_is_called_by_its_own_signature(self, monkeypatch, kernel, num_heads, num_key_heads, scale):
        query, key, value, _ = random_heads(LENGTHS, num_heads, num_key_heads, 8)
        stand_in = self.use(monkeypatch, kernel)
        cu_seqlens = bounds_of(LENGTHS)
        actual = varlen.varlen_attention(query, key, value, cu_seqlens, max(LENGTHS), scale=scale)
        assert stand_in.call_count == 1
        assert_equal_up_to_rounding(actual, naive_attention(query, key, value, cu_seqlens, scale))

    def test_a_model_reaches_them(self, monkeypatch):
        batch = pack_sequences(random_sequences())
        model = small_model(Qwen2Config, ATTENTION_NAME)
        with monkeypatch.context() as patch:
            patch.setattr(varlen, "_has_fused_kernel", lambda query, value: False)
            expected = model(input_ids=batch.input_ids, **packed_attention_kwargs(batch)).logits
        stand_in = self.use(monkeypatch, "flash-attn")
        actual = model(input_ids=batch.input_ids, **packed_attention_kwargs(batch)).logits
        assert stand_in.call_count == 2  # layers
        assert_equal_up_to_rounding(actual, expected)

    def test_autocast_reaches_them(self, monkeypatch):
        # A norm with fp32 weights leaves query and key in fp32 under autocast, beside a value in bf16.
        query, key, value, _ = random_heads(LENGTHS, 4, 2, 8, dtype=torch.float32)
        stand_in = self.use(monkeypatch, "flash-attn")
        with torch.autocast("cpu", torch.bfloat16):
            varlen.varlen_attention(query, key, value.bfloat16(), bounds_of(LENGTHS), max(LENGTHS))
        assert {x.dtype for x in stand_in.call_args.args[:3]} == {torch.bfloat16}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA or ROCm device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_attention_on_a_gpu_is_the_masked_softmax(dtype):
    lengths = [70, 1, 300, 300, 129]
    *inputs, upstream = random_heads(lengths, 8, 2, 64, dtype=dtype, device="cuda")
    inputs = [x.requires_grad_() for x in inputs]
    exact = [x.detach().double().cpu().requires_grad_() for x in inputs]
    cu_seqlens = bounds_of(lengths)
    actual = varlen.varlen_attention(*inputs, cu_seqlens, max(lengths))
    expected = naive_attention(*exact, cu_seqlens)
    results = [actual, *torch.autograd.grad(actual, inputs, upstream)]
    expected_results = [expected, *torch.autograd.grad(expected, exact, upstream.double().cpu())]
    for result, expected_result in zip(results, expected_results, strict=True):
        error = (result.double().cpu() - expected_result).norm() / expected_result.norm()
        # Weights, their gradient and the result are each rounded to dtype once; fp32 sums of 300 terms add a few eps.
        assert error < 8 * torch.finfo(dtype).eps


ARCHITECTURES = [Qwen2Config, Qwen3Config, LlamaConfig, GraniteConfig]  # Granite's scores have a scale of its own


def small_model(config_class, attention, dtype=torch.float64, **options):
    torch.manual_seed(0)
    config = config_class(
        vocab_size=40,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=64,
        initializer_range=0.2,  # large enough for attention to matter
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        **options,
    )
    check_attention_supported(config)
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention).to(dtype).eval()


def random_sequences(lengths=LENGTHS):
    generator = torch.Generator().manual_seed(1)
    ids = [torch.randint(3, 40, (length,), generator=generator).tolist() for length in lengths]
    return [(sequence, sequence, True) for sequence in ids]


def packed_logits_and_gradients(model, batch, upstream):
    logits = model(input_ids=batch.input_ids, **packed_attention_kwargs(batch)).logits[0]
    return logits, torch.autograd.grad(logits, list(model.parameters()), upstream)


@pytest.mark.parametrize("config_class", ARCHITECTURES)
class TestPackedForward:
    def test_logits_and_gradients_are_those_of_one_sequence_at_a_time(self, config_class):
        batch = pack_sequences(random_sequences())
        upstream = torch.randn(sum(LENGTHS), 40, dtype=torch.float64)
        logits, gradients = packed_logits_and_gradients(small_model(config_class, ATTENTION_NAME), batch, upstream)

        model = small_model(config_class, "sdpa")
        rows = batch.input_ids.split(batch.cu_seqlens.diff().tolist(), dim=1)
        expected = torch.cat([model(input_ids=row).logits[0] for row in rows])
        assert_equal_up_to_rounding(logits, expected)
        expected_gradients = torch.autograd.grad(expected, list(model.parameters()), upstream)
        for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
            assert_equal_up_to_rounding(gradient, expected_gradient)

    @pytest.mark.parametrize("use_reentrant", [False, True])
    def test_checkpointed_layers_see_the_same_sequences(self, config_class, use_reentrant, monkeypatch):
        batch = pack_sequences(random_sequences())
        upstream = torch.randn(sum(LENGTHS), 40, dtype=torch.float64)
        model = small_model(config_class, ATTENTION_NAME).train()
        expected, expected_gradients = packed_logits_and_gradients(model, batch, upstream)

        calls = count_attention_calls(monkeypatch)
        model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        logits = model(input_ids=batch.input_ids, **packed_attention_kwargs(batch)).logits[0]
        logits.backward(upstream)  # reentrant checkpoints work under backward() alone
        assert len(calls) == 4  # two layers, forward and again in the backward
        assert_equal_up_to_rounding(logits, expected)
        for parameter, expected_gradient in zip(model.parameters(), expected_gradients, strict=True):
            assert_equal_up_to_rounding(parameter.grad, expected_gradient)

    def test_no_mask_and_no_cache_is_built(self, config_class, monkeypatch):
        def build(**arguments):
            raise AssertionError("a packed forward had a mask built")

        masks = count_attention_calls(monkeypatch)
        monkeypatch.setitem(AttentionMaskInterface._global_mapping, ATTENTION_NAME, build)
        batch = pack_sequences(random_sequences([5, 4, 3]))
        model = small_model(config_class, ATTENTION_NAME)
        output = model(input_ids=batch.input_ids, **packed_attention_kwargs(batch))
        assert [mask.numel() for mask in masks] == [0, 0]
        assert output.past_key_values is None  # nor are keys and values kept

    def test_cost_is_the_sum_of_the_squares_of_the_lengths(self, config_class, monkeypatch):
        products = []

        def counting(query, key, value, **options):
            products.append(query.shape[:-1].numel() * key.shape[-2])
            return sdpa(query, key, value, **options)

        sdpa = F.scaled_dot_product_attention
        monkeypatch.setattr(F, "scaled_dot_product_attention", counting)
        batch = pack_sequences(random_sequences())
        small_model(config_class, ATTENTION_NAME)(input_ids=batch.input_ids, **packed_attention_kwargs(batch))
        layers_and_heads = 2 * 4
        assert sum(products) == layers_and_heads * sum(length**2 for length in LENGTHS)

    @pytest.mark.parametrize("attention", ["sdpa", "eager"])
    def test_attention_that_would_mix_sequences_fails(self, config_class, attention):
        batch = pack_sequences(random_sequences())
        model = small_model(config_class, attention)
        with pytest.raises(RuntimeError):
            model(input_ids=batch.input_ids, **packed_attention_kwargs(batch))


def count_attention_calls(monkeypatch):
    """A list that receives the mask of every call of the attention function from now on."""
    masks = []
    attention_forward = AttentionInterface._global_mapping[ATTENTION_NAME]

    def counting(module, query, key, value, attention_mask, **arguments):
        masks.append(attention_mask)
        return attention_forward(module, query, key, value, attention_mask, **arguments)

    monkeypatch.setitem(AttentionInterface._global_mapping, ATTENTION_NAME, counting)
    return masks


def padded(sides):
    """input_ids and attention_mask (B, 9) with each of LENGTHS padded on its side"""
    input_ids, attention_mask = [], []
    for (ids, _, _), side in zip(random_sequences(), sides, strict=True):
        zeros, ones = [0] * (max(LENGTHS) - len(ids)), [1] * len(ids)
        input_ids.append(zeros + ids if side == "left" else ids + zeros)
        attention_mask.append(zeros + ones if side == "left" else ones + zeros)
    return {"input_ids": torch.tensor(input_ids), "attention_mask": torch.tensor(attention_mask)}


@pytest.mark.parametrize("config_class", ARCHITECTURES)
class TestOtherForwardsAreSdpa:
    def test_left_padded_batched_generation(self, config_class):
        generated = [
            small_model(config_class, attention, torch.float32).generate(
                **padded(["left"] * len(LENGTHS)), do_sample=False, max_new_tokens=16, min_new_tokens=16
            )
            for attention in (ATTENTION_NAME, "sdpa")
        ]
        assert generated[0].shape == (len(LENGTHS), max(LENGTHS) + 16)
        assert torch.equal(*generated)

    @pytest.mark.parametrize("sides", [["left"] * 7, ["right"] * 7, ["left", "right"] * 3 + ["left"]])
    def test_padded_logits(self, config_class, sides):
        batch = padded(sides)
        logits = [
            small_model(config_class, attention, torch.float32)(**batch).logits
            for attention in (ATTENTION_NAME, "sdpa")
        ]
        assert torch.equal(*logits)

    def test_restarting_positions_alone_keep_sequences_apart(self, config_class):
        batch = pack_sequences(random_sequences())
        model = small_model(config_class, ATTENTION_NAME)
        logits = model(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False).logits
        packed = model(input_ids=batch.input_ids, **packed_attention_kwargs(batch)).logits
        assert_equal_up_to_rounding(logits, packed)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sliding_window": 4}, "asks for sliding_window"),
        ({"softcap": 50.0}, "asks for softcap"),
        ({"s_aux": torch.zeros(2)}, "asks for s_aux"),
        ({"position_bias": torch.zeros(1, 2, 5, 5)}, "asks for position_bias"),
        ({"dropout": 0.1}, "asks for dropout"),
        ({"is_causal": False}, "asks for is_causal=False"),
        ({"module": SimpleNamespace(is_causal=False)}, "asks for is_causal=False"),
        ({"attention_mask": torch.ones(1, 1, 5, 5, dtype=torch.bool)}, "no attention mask"),
        ({"key": torch.zeros(1, 2, 6, 4), "value": torch.zeros(1, 2, 6, 4)}, "no key-value cache"),
        ({name: torch.zeros(2, 2, 5, 4) for name in ("query", "key", "value")}, "one row of tokens"),
    ],
)
def test_what_a_packed_forward_cannot_do_is_refused(changes, message):
    arguments = {
        "module": torch.nn.Module(),
        **{name: torch.zeros(1, 2, 5, 4) for name in ("query", "key", "value")},
        "attention_mask": None,
        "cu_seq_lens_q": torch.tensor([0, 5]),
        "max_length_q": 5,
        "sliding_window": None,
    }
    attention_forward = AttentionInterface._global_mapping[ATTENTION_NAME]
    assert attention_forward(**arguments)[0].shape == (1, 5, 2, 4)
    with pytest.raises(ValueError, match=message):
        attention_forward(**(arguments | changes))


class UnknownConfig(PreTrainedConfig):
    model_type = "unknown"


FULL = ["full_attention"] * 2


@pytest.mark.parametrize(
    "config",
    [
        Qwen2Config(),
        Qwen2Config(use_sliding_window=False, sliding_window=4096),
        Qwen2Config(use_sliding_window=True, sliding_window=4096, num_hidden_layers=2, max_window_layers=2),
        Qwen3Config(),
        LlamaConfig(),
        LlamaConfig(rope_parameters={"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}),
        MistralConfig(sliding_window=None),
        Phi3Config(sliding_window=None),
        GPTNeoXConfig(),
        SeedOssConfig(attention_dropout=0.0),
    ],
    ids=lambda config: config.model_type,
)
def test_full_causal_attention_is_accepted(config):
    check_attention_supported(config)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (MistralConfig(sliding_window=4096), "sliding_window=4096"),
        (Phi3Config(sliding_window=2047), "sliding_window=2047"),
        (Qwen2Config(use_sliding_window=True, sliding_window=64, max_window_layers=1), "'sliding_attention' in layer"),
        (Gemma2Config(), "'sliding_attention' in layer_types"),
        (Gemma2Config(num_hidden_layers=2, layer_types=FULL), "attn_logit_softcapping=50"),
        (Gemma3TextConfig(), "'sliding_attention' in layer_types"),
        (Llama4TextConfig(), "'chunked_attention' in layer_types"),
        (GptOssConfig(), "'sliding_attention' in layer_types"),
        (GptOssConfig(num_hidden_layers=2, layer_types=FULL), "GptOssForCausalLM .* sinks"),
        (Qwen3NextConfig(), "'linear_attention' in layer_types"),
        (MambaConfig(), "'linear_attention' in layer_types"),
        (LlamaConfig(attention_dropout=0.1), "attention_dropout=0.1"),
        (SeedOssConfig(), "attention_dropout=0.1"),
        (BertConfig(attention_probs_dropout_prob=0.0), "is_decoder=False"),
        (T5Config(), "is_encoder_decoder=True"),
        (Gemma3TextConfig(num_hidden_layers=2, layer_types=FULL, use_bidirectional_attention=True), "bidirectional"),
        (BloomConfig(), "BloomForCausalLM .* not every layer"),
        (
            LlamaConfig(rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}),
            "rope_type 'dynamic'",
        ),
        (UnknownConfig(), "UnknownConfig .* no causal language model"),
    ],
    ids=lambda value: getattr(value, "model_type", None),
)
def test_other_attention_is_refused(config, message):
    with pytest.raises(ValueError, match=message):
        check_attention_supported(config)
