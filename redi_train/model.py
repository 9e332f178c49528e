"""Loading a causal language model for training: precision, attention, LoRA, and the loss inside its forward.

The loss runs inside the forward of the module that DDP and FSDP wrap, on hidden states, so that they see every
parameter used where they expect it. `attach_loss` gives a model a forward with a second way of being called:

    model(batch=packed_batch, num_pairs=32, alpha=0.8)      stage 2, returns a RediLossOutput as a dict
    model(batch=packed_batch, num_tokens=51200)             stage 1, returns an SftLossOutput as a dict

Without `batch` it is the forward it was, so generation and saving are unchanged.
"""

import inspect
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.models.auto.tokenization_auto import get_tokenizer_config

from redi_kernels import PackedBatch, fused_redi_loss, fused_sft_loss, fused_token_logps
from redi_train.attention import ATTENTION_NAME, check_attention_supported, packed_attention_kwargs, register_attention

_SIXTEEN_BIT = (torch.bfloat16, torch.float16)


def load_tokenizer(name: str, *, chat_template: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder or Hub name; `chat_template` (a file or the template itself) replaces its own.

    Raises OSError or ValueError when it cannot be loaded.
    """
    path = _existing(name)
    # For some model types, Qwen2 among them, AutoTokenizer takes the type's own class whatever the files declare, and
    # with it another pre-tokeniser: text would be split, without a word, in ways the model was not trained on.
    generic = get_tokenizer_config(path).get("tokenizer_class") in ("TokenizersBackend", "PreTrainedTokenizerFast")
    tokenizer = (PreTrainedTokenizerFast if generic else AutoTokenizer).from_pretrained(path)
    if chat_template is not None:
        is_file = "{" not in chat_template
        tokenizer.chat_template = Path(chat_template).read_text(encoding="utf-8") if is_file else chat_template
    return tokenizer


def load_model(
    name: str,
    *,
    attn_implementation: str = ATTENTION_NAME,
    dtype: torch.dtype = torch.float32,
    lora: dict[str, Any] | None = None,
) -> nn.Module:
    """A model folder or Hub name, ready for RediTrainer; a PeftModel when `lora` holds LoraConfig's arguments.

    Weights that are trained are float32 whatever the checkpoint's dtype: at a learning rate of 1e-6, AdamW's update is
    below half a bfloat16 step for almost every weight. `dtype` is for weights that LoRA leaves frozen.

    Raises OSError when there is no such model, ValueError when it cannot be trained here.
    """
    if lora is None and dtype != torch.float32:
        raise ValueError(
            f"--dtype {str(dtype).removeprefix('torch.')} would train 16-bit weights, which an update of 1e-6 leaves "
            "as they are; leave --dtype out and use --bf16 for bfloat16 compute over float32 weights."
        )
    path = _existing(name)
    if (Path(path) / "adapter_config.json").exists():
        raise ValueError(
            f"{name} holds a LoRA adapter, not a model; merge it into its base model first (peft's merge_and_unload) "
            "and give the folder of the result."
        )
    register_attention()
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation=attn_implementation)
    if lora is not None:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **lora))
    prepare_model(model, attn_implementation=attn_implementation)
    return model


def _existing(name: str) -> str:
    """`name`, unless it looks like a path that does not exist, for which Transformers' message speaks of the Hub."""
    path = Path(name).expanduser()
    if path.is_dir():
        return str(path)
    if name.startswith(("/", ".", "~")) or name.count("/") > 1 or path.exists():
        raise FileNotFoundError(f"there is no model folder {name}.")
    return name


def prepare_model(model: nn.Module, *, attn_implementation: str = ATTENTION_NAME) -> None:
    """Make a loaded model (or a PeftModel around one) trainable on packed batches, in place.

    Chooses the attention, checks precision and head, and attaches the loss. Raises ValueError for a model whose
    attention, head or precision does not allow it.
    """
    base = causal_lm(model)
    register_attention()
    if attn_implementation == ATTENTION_NAME:
        check_attention_supported(base.config)
    base.set_attn_implementation(attn_implementation)
    check_precision(model)
    check_head(model)
    attach_loss(model)


def causal_lm(model: nn.Module) -> PreTrainedModel:
    """The Transformers model inside a PeftModel, else the model itself."""
    return model if isinstance(model, PreTrainedModel) else model.get_base_model()


def check_precision(model: nn.Module) -> None:
    """Raise ValueError when a weight in bfloat16 or float16 would be trained; frozen ones are fine."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.dtype in _SIXTEEN_BIT:
            raise ValueError(
                f"{name} is trained in {str(parameter.dtype).removeprefix('torch.')}, where an update of 1e-6 is lost "
                "to rounding; load the model with dtype=torch.float32 and train with bf16=True for 16-bit compute."
            )


def head_facts(model: PreTrainedModel) -> dict[str, Any]:
    """What turns hidden states into logits, as the arguments of redi_kernels' losses: weight, bias, logit_scale,
    logit_softcap. Raises ValueError for a head that is not a linear layer."""
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        raise ValueError(
            f"the output layer of {type(model).__name__} is {type(head).__name__}, not a linear layer, so the loss "
            "cannot be computed from its weight; leave it out of the LoRA target modules, or choose another model."
        )
    config = model.config.get_text_config()
    return {
        "weight": head.weight,
        "bias": head.bias,
        "logit_scale": _logit_scale(config),
        "logit_softcap": getattr(config, "final_logit_softcapping", None),
    }


def _logit_scale(config: PreTrainedConfig) -> float:
    """Cohere multiplies its logits by logit_scale, Granite divides them by logits_scaling."""
    return (getattr(config, "logit_scale", None) or 1.0) / (getattr(config, "logits_scaling", None) or 1.0)


@torch.no_grad()
def check_head(model: nn.Module) -> None:
    """Raise ValueError unless log-probabilities from hidden states and `head_facts` are those of the model's own
    logits.

    A head with a transformation that head_facts does not know would otherwise be trained wrongly without a sign of it.
    """
    base = causal_lm(model)
    facts = head_facts(base)
    vocab_size = len(facts["weight"])
    was_training = model.training
    model.eval()
    try:
        input_ids = torch.arange(8, device=facts["weight"].device)[None] * 7919 % vocab_size
        labels = (input_ids[0] * 31 + 1) % vocab_size
        hidden = base.base_model(input_ids=input_ids, use_cache=False).last_hidden_state
        logps = fused_token_logps(hidden[0], labels=labels, **facts)
        logits = base(input_ids=input_ids, use_cache=False).logits[0].float()
    finally:
        model.train(was_training)
    expected = logits.log_softmax(-1).gather(-1, labels[:, None])[:, 0]
    # Logits rounded to the model's dtype are off by up to eps/2 of their size; twice in a log-probability.
    tolerance = 1e-3 + 2 * torch.finfo(hidden.dtype).eps * logits.abs().max()
    if not ((logps - expected).abs() <= tolerance).all():
        raise ValueError(
            f"{type(base).__name__} turns hidden states into logits in a way that this program does not know (its "
            f"log-probabilities are off by {(logps - expected).abs().max():.2g} nats); choose another model."
        )


def attach_loss(model: nn.Module) -> None:
    """Let the model's forward also take `batch` and return its loss (see the top of this file), in place."""
    base = causal_lm(model)
    original = base.forward.__func__
    if hasattr(original, "without_loss"):
        return

    def forward(self: PreTrainedModel, *args: Any, batch: PackedBatch | None = None, **kwargs: Any) -> Any:
        if batch is None:
            return original(self, *args, **kwargs)
        return _packed_loss(self, batch, **{key: value for key, value in kwargs.items() if key in _LOSS_ARGUMENTS})

    # generate() and peft read the signature. Not by functools.wraps: accelerate undoes whatever is __wrapped__.
    forward.__signature__ = inspect.signature(original)
    forward.__doc__ = original.__doc__
    forward.without_loss = original
    base.forward = MethodType(forward, base)


_LOSS_ARGUMENTS = ("num_pairs", "num_tokens", "alpha", "grad_tolerance")  # peft adds arguments of its own to a call


def _packed_loss(
    model: PreTrainedModel,
    batch: PackedBatch,
    num_pairs: float | None = None,
    num_tokens: float | None = None,
    alpha: float = 0.8,
    grad_tolerance: float | str = "auto",
) -> dict[str, Tensor]:
    if model.config._attn_implementation == ATTENTION_NAME:
        arguments = packed_attention_kwargs(batch)
    else:
        # Transformers tells the sequences apart by positions that restart, with a mask of T x T or its flash kwargs.
        arguments = {"position_ids": batch.position_ids, "use_cache": False}
    hidden = model.base_model(input_ids=batch.input_ids, **arguments).last_hidden_state
    head = head_facts(model) | {"grad_tolerance": grad_tolerance}
    if num_tokens is not None:
        output = fused_sft_loss(hidden, labels=batch.labels, cu_seqlens=batch.cu_seqlens, num_tokens=num_tokens, **head)
    else:
        output = fused_redi_loss(
            hidden,
            labels=batch.labels,
            cu_seqlens=batch.cu_seqlens,
            is_chosen=batch.is_chosen,
            num_pairs=num_pairs,
            alpha=alpha,
            **head,
        )
    return output._asdict()
