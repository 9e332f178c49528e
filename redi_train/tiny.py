"""A small Qwen2-architecture model with random weights and a tokenizer of its own, made on the spot.

Used by the embedded demo and the tests, and from the command line to train on real text without a network:

    python -m redi_train.tiny --dataset_name traces.jsonl --output_dir runs/tiny

reads the text of a JSON-lines file in the traces layout, trains a tokenizer on it and saves both with a ChatML template, so that
`python -m redi_train --model_name_or_path runs/tiny` starts from it.
"""

import json
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import HfArgumentParser, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

CHATML_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def train_tokenizer(texts: Iterable[str], vocab_size: int, *, chat: bool = True) -> PreTrainedTokenizerFast:
    """Byte-level BPE trained on `texts`: any string encodes, and decoding gives it back byte for byte.

    Digits are tokens of their own, as in Qwen2. With `chat` the tokenizer has Qwen2's special tokens and a ChatML template:
    EOS is <|im_end|>, padding is <|endoftext|>. Without it there is no template, EOS is <|endoftext|> and padding <|pad|>.

    vocab_size counts everything: special tokens, the 256 bytes and the merges. A text too short to yield that many merges
    gives a smaller vocabulary.

    Raises ValueError for a vocab_size with no room for the bytes and the special tokens.
    """
    special_tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"] if chat else ["<|endoftext|>", "<|pad|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    smallest = len(alphabet) + len(special_tokens)
    if vocab_size < smallest:
        raise ValueError(f"vocab_size is {vocab_size}; byte-level BPE needs at least {smallest}: the 256 bytes and {len(special_tokens)} special tokens.")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=special_tokens, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    if chat:
        return PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            eos_token="<|im_end|>",
            pad_token="<|endoftext|>",
            extra_special_tokens=["<|im_start|>"],
            chat_template=CHATML_TEMPLATE,
            padding_side="left",
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|endoftext|>", pad_token="<|pad|>", padding_side="left"
    )


def word_tokenizer(words: Iterable[str]) -> PreTrainedTokenizerFast:
    """A tokenizer whose vocabulary is exactly `words` (any strings, whitespace included; the longest that matches wins), <|endoftext|> as EOS and
    <|pad|>. No chat template. Text made of anything else raises when it is encoded."""
    words = sorted(words, key=len, reverse=True)
    vocabulary = ["<|endoftext|>", "<|pad|>", *words]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(vocabulary)}))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("|".join(map(re.escape, words))), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|endoftext|>", pad_token="<|pad|>", padding_side="left"
    )


def make_tiny_model(
    tokenizer: PreTrainedTokenizerFast,
    *,
    hidden_size: int = 128,
    num_hidden_layers: int = 4,
    num_attention_heads: int = 4,
    num_key_value_heads: int = 2,
    intermediate_size: int = 384,
    initializer_range: float = 0.05,  # Qwen2's 0.02 belongs to 896 and wider; the right scale grows as 1/sqrt(hidden_size)
    seed: int = 0,
) -> Qwen2ForCausalLM:
    """Qwen2ForCausalLM with random fp32 weights drawn from `seed`, tied embeddings and the tokenizer's vocabulary, EOS and
    padding. The global random state is left as it was.

    Raises ValueError when the heads do not divide the hidden size or each other.
    """
    if hidden_size % (2 * num_attention_heads):
        raise ValueError(
            f"hidden_size {hidden_size} must be a multiple of 2 * num_attention_heads ({2 * num_attention_heads}): "
            "rotary positions need heads of even width."
        )
    if num_attention_heads % num_key_value_heads:
        raise ValueError(
            f"num_attention_heads {num_attention_heads} must be a multiple of num_key_value_heads {num_key_value_heads}."
        )
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=num_hidden_layers,
        num_attention_heads=num_attention_heads,
        num_key_value_heads=num_key_value_heads,
        initializer_range=initializer_range,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype=torch.float32,
    )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return Qwen2ForCausalLM(config)
