"""A small Qwen2-architecture model with random weights and a tokenizer of its own, made on the spot.

Used by the embedded demo and the tests, and from the command line to train on real text without a network:

    python -m redi_train.tiny --dataset_name traces.jsonl --output_dir runs/tiny

reads the text of a file in the traces layout, trains a tokenizer on it and saves both, with a ChatML template, so that
`python -m redi_train --model_name_or_path runs/tiny` starts from them.
"""

import argparse
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import HfArgumentParser, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from redi_train.data import load_rows, recognise_layout
from redi_train.options import option

CHATML_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def train_tokenizer(texts: Iterable[str], vocab_size: int, *, chat: bool = True) -> PreTrainedTokenizerFast:
    """Byte-level BPE trained on `texts`: any string encodes, and decoding gives it back byte for byte.

    Digits are tokens of their own, as in Qwen2. With `chat` the tokenizer has Qwen2's special tokens and a ChatML
    template: EOS is <|im_end|>, padding is <|endoftext|>. Without it there is no template, EOS is <|endoftext|> and
    padding is <|pad|>.

    vocab_size counts everything: special tokens, the 256 bytes and the merges. A text too short to yield that many
    merges gives a smaller vocabulary.

    Raises ValueError for a vocab_size with no room for the bytes and the special tokens.
    """
    special_tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"] if chat else ["<|endoftext|>", "<|pad|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    smallest = len(alphabet) + len(special_tokens)
    if vocab_size < smallest:
        raise ValueError(
            f"vocab_size {vocab_size} is too small: byte-level BPE needs {smallest}, for 256 bytes and "
            f"{len(special_tokens)} special tokens."
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=special_tokens, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    options = (
        {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "chat_template": CHATML_TEMPLATE}
        if chat
        else {"eos_token": "<|endoftext|>", "pad_token": "<|pad|>"}
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, padding_side="left", **options)


def word_tokenizer(words: Iterable[str]) -> PreTrainedTokenizerFast:
    """A tokenizer whose vocabulary is `words` and two special tokens: <|endoftext|>, its EOS, and <|pad|>.

    A word is any string, white space included; where several match, the longest is taken. Text made of anything else
    raises when it is encoded. There is no chat template.
    """
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
    initializer_range: float = 0.05,  # Qwen2's 0.02 at a width of 896, scaled by 1/sqrt(hidden_size)
    seed: int = 0,
) -> Qwen2ForCausalLM:
    """Qwen2ForCausalLM with random float32 weights drawn from `seed` and tied embeddings, for this tokenizer.

    The global random state is left as it was. Raises ValueError when the heads do not divide the width or each other.
    """
    sizes = {
        "hidden_size": hidden_size,
        "num_hidden_layers": num_hidden_layers,
        "num_attention_heads": num_attention_heads,
        "num_key_value_heads": num_key_value_heads,
        "intermediate_size": intermediate_size,
    }
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} must be at least 1, not {size}.")
    if hidden_size % (2 * num_attention_heads):
        raise ValueError(
            f"hidden_size {hidden_size} must be a multiple of 2 * num_attention_heads ({2 * num_attention_heads}): "
            "rotary positions need heads of even width."
        )
    if num_attention_heads % num_key_value_heads:
        raise ValueError(
            f"num_attention_heads {num_attention_heads} must be a multiple of num_key_value_heads "
            f"{num_key_value_heads}."
        )
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        **sizes,
        initializer_range=initializer_range,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype=torch.float32,
    )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return Qwen2ForCausalLM(config)


@dataclass
class TinyOptions:
    dataset_name: str = field(metadata={"help": "file in the traces layout whose text trains the tokenizer"})
    output_dir: str = field(metadata={"help": "new folder for the model and its tokenizer"})
    vocab_size: int = option(4096, "tokens in the vocabulary, at least 259")
    hidden_size: int = option(128, "width of the model")
    num_hidden_layers: int = option(4, "layers")
    num_attention_heads: int = option(4, "attention heads")
    num_key_value_heads: int = option(2, "key and value heads, each shared by several attention heads")
    intermediate_size: int = option(384, "width of the feed-forward layers")
    seed: int = option(0, "seed of the weights")


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0, or 2 after one sentence on stderr when an option or the data cannot be used."""
    parser = HfArgumentParser(
        TinyOptions,
        prog="python -m redi_train.tiny",
        usage="python -m redi_train.tiny --dataset_name FILE --output_dir FOLDER [--option value ...]",
        description="Train a tokenizer on the text of a file of traces, and save it together with a small Qwen2 model "
        "of random weights. The folder is one for --model_name_or_path.",
        argument_default=argparse.SUPPRESS,  # no "default: None" behind the required options
        allow_abbrev=False,
    )
    options = TinyOptions(**vars(parser.parse_args(argv)))
    try:
        print(_make(options))
    except (ValueError, OSError) as error:
        print(f"redi_train.tiny: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


def _make(options: TinyOptions) -> str:
    output_dir = Path(options.output_dir).expanduser()
    if output_dir.exists() and (not output_dir.is_dir() or any(output_dir.iterdir())):
        raise ValueError(f"{output_dir} exists and is not an empty folder; give a new --output_dir.")
    rows = load_rows(options.dataset_name)
    if recognise_layout(rows.column_names) != "traces":
        raise ValueError(f"{options.dataset_name} is not in the traces layout: problem, generations and correct.")
    texts = [text for row in rows for text in (row["problem"], *row["generations"])]
    tokenizer = train_tokenizer(texts, options.vocab_size)
    model = make_tiny_model(
        tokenizer,
        hidden_size=options.hidden_size,
        num_hidden_layers=options.num_hidden_layers,
        num_attention_heads=options.num_attention_heads,
        num_key_value_heads=options.num_key_value_heads,
        intermediate_size=options.intermediate_size,
        seed=options.seed,
    )
    model.save_pretrained(output_dir)
    tokenizer.save_pretrained(output_dir)
    characters_per_token = sum(map(len, texts)) / sum(map(len, tokenizer(texts).input_ids))
    return (
        f"Saved a model of {model.num_parameters():,} weights and a tokenizer of {len(tokenizer):,} tokens "
        f"({characters_per_token:.1f} characters each on this text) to {output_dir}."
    )


if __name__ == "__main__":
    sys.exit(main())
