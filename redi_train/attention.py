"""Variable-length attention in Transformers models: the registration, what a packed forward passes, what is refused.

A packed forward is `model(input_ids=batch.input_ids, **packed_attention_kwargs(batch))` on a model loaded with
`attn_implementation=ATTENTION_NAME`. Any other forward of such a model (generation, padded batches) is sdpa's.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AttentionInterface, AttentionMaskInterface, PreTrainedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from redi_kernels import PackedBatch, varlen_attention

ATTENTION_NAME = "redi_varlen"


def register_attention() -> None:
    """Make `attn_implementation=ATTENTION_NAME` known to Transformers; to be called before a model is loaded."""
    AttentionInterface.register(ATTENTION_NAME, _attention_forward)
    AttentionMaskInterface.register(ATTENTION_NAME, sdpa_mask)


def packed_attention_kwargs(batch: PackedBatch) -> dict[str, Any]:
    """What a model's forward takes beside input_ids to keep the sequences of `batch` apart.

    cu_seq_lens are put on the device of the tokens once, here, rather than in every layer.
    """
    cu_seqlens = batch.cu_seqlens.to(batch.input_ids.device, non_blocking=True)
    return {
        "position_ids": batch.position_ids,
        # With attention_mask=None, Transformers sees position_ids restart and has the T x T mask of the blocks built.
        # Nothing it tells a mask function says that cu_seq_lens will do that work. But a mask of four dimensions is
        # taken as finished and handed to the attention function as it is, so this one, of no elements, stands for
        # "no mask needed". It is part of the call, unlike a flag set around it, so it is the same in a checkpointed
        # layer's second forward, and a model that bypasses _attention_forward fails on it instead of letting
        # sequences see each other.
        "attention_mask": torch.empty(1, 1, 0, 0, dtype=torch.bool, device=batch.input_ids.device),
        "cu_seq_lens_q": cu_seqlens,
        "cu_seq_lens_k": cu_seqlens,
        "max_length_q": batch.max_seqlen,
        "max_length_k": batch.max_seqlen,
        "use_cache": False,
    }


def _attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    max_length_q: int | None = None,
    max_length_k: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """query (B, Hq, T, D), key and value (B, Hk, T, D) to (B, T, Hq, D); B = 1 when packed, as Transformers asks."""
    if cu_seq_lens_q is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs
        )
    if len(query) != 1 or key.shape[2] != query.shape[2]:
        raise ValueError("a packed forward takes one row of tokens and no key-value cache: pass batch size 1, no cache")
    if attention_mask is not None and attention_mask.numel() > 0:
        raise ValueError("a packed forward takes no attention mask: pass what packed_attention_kwargs returns")
    # check_attention_supported refuses these when the model is loaded, as far as a config tells.
    asked = {name: kwargs.get(name) for name in ("sliding_window", "softcap", "s_aux", "position_bias")}
    if dropout > 0:
        asked["dropout"] = dropout
    if not (kwargs["is_causal"] if kwargs.get("is_causal") is not None else getattr(module, "is_causal", True)):
        asked["is_causal=False"] = True
    for name, setting in asked.items():
        if setting is not None:
            raise ValueError(f"{type(module).__name__} asks for {name}, which attention over packed sequences lacks")
    output = varlen_attention(
        query[0].transpose(0, 1),
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        cu_seq_lens_q,
        max_length_q,
        scale=scaling,
    )
    return output[None], None


def check_attention_supported(config: PreTrainedConfig) -> None:
    """Raise ValueError, naming the setting, unless every layer is full causal attention that packing leaves unchanged.

    Refused: windows and chunks, linear attention and other recurrences, softcap, sinks, attention dropout, attention
    that is not causal, rotary embeddings that depend on the longest sequence of a batch, and architectures whose
    attention Transformers does not let us replace.
    """
    text = config.get_text_config()

    def refuse(setting: str, why: str) -> NoReturn:
        raise ValueError(f"a {config.model_type!r} model with {setting} cannot be trained on packed sequences: {why}")

    not_causal = {
        "is_encoder_decoder=True": config.is_encoder_decoder,
        "is_causal=False": not getattr(text, "is_causal", True),
        "use_bidirectional_attention": getattr(text, "use_bidirectional_attention", False),
        # Encoders that can also serve as decoders have add_cross_attention. GPT-NeoX is causal with is_decoder=False.
        "is_decoder=False": hasattr(text, "add_cross_attention") and not getattr(text, "is_decoder", True),
    }
    for setting, is_set in not_causal.items():
        if is_set:
            refuse(setting, "packed attention is causal; choose a decoder-only causal model")
    layer_types = getattr(text, "layer_types", None)
    if layer_types is not None:
        for layer_type in layer_types:
            if layer_type != "full_attention":
                refuse(f"{layer_type!r} in layer_types", "choose a model whose layers are all 'full_attention'")
    else:
        # Where there are no layer_types, Transformers applies a window that is not None to every layer.
        for name in ("sliding_window", "attention_chunk_size"):
            window = getattr(text, name, None)
            if window is not None and getattr(text, "use_sliding_window", True):
                refuse(
                    f"{name}={window}",
                    "set it to null in the model's config if no sequence is longer than it, else choose another model",
                )
    if getattr(text, "attn_logit_softcapping", None) is not None:
        refuse(
            f"attn_logit_softcapping={text.attn_logit_softcapping}",
            "packed attention has no softcap; choose another model",
        )
    for name in ("attention_dropout", "attn_pdrop", "attention_probs_dropout_prob"):
        if getattr(text, name, None):
            refuse(
                f"{name}={getattr(text, name)}", "packed attention has no dropout; set it to 0 in the model's config"
            )
    rope = getattr(text, "rope_parameters", None) or {}
    for parameters in [rope, *rope.values()]:  # one set, or one for each layer type
        if isinstance(parameters, dict) and parameters.get("rope_type") in ("dynamic", "longrope"):
            refuse(
                f"rope_type {parameters['rope_type']!r} in rope_parameters",
                "it scales positions by the longest sequence of a batch, so sequences would change one another; "
                "choose another model",
            )
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if model_class is None:
        refuse(
            f"config class {type(config).__name__}",
            "Transformers has no causal language model for it; choose another model",
        )
    if model_class._is_stateful or not model_class._supports_attention_backend:
        refuse(
            f"class {model_class.__name__}",
            "not every layer of it runs the attention that was asked for; choose another model",
        )
    if not model_class._supports_sdpa:
        refuse(f"class {model_class.__name__}", "it has attention sinks or a softcap; choose another model")
