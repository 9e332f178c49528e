"""The options of `python -m redi_train`: dataclasses, their parser, recipes in YAML, and a --help that fits a screen.

Names are those of TRL and of transformers.TrainingArguments, all of whose fields are options too.
"""

import argparse
import difflib
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, NamedTuple, NoReturn

import torch
import yaml
from transformers import HfArgumentParser, TrainingArguments
from transformers.integrations import get_available_reporting_integrations

from redi_train.data import Stage

# What the paper trained with (arXiv:2505.24850, Section 5 and Appendix C).
STAGE_DEFAULTS: dict[Stage, dict[str, Any]] = {
    "sft": {"global_batch_size": 128, "learning_rate": 5e-5, "num_train_epochs": 5.0},
    "redi": {"global_batch_size": 32, "learning_rate": 1e-6, "num_train_epochs": 1.0},
}


def option(default: Any, help: str, **kwargs: Any) -> Any:
    return field(default=default, metadata={"help": help, **kwargs})


@dataclass
class ModelOptions:
    model_name_or_path: str | None = option(
        None,
        "model to start from, a folder or a Hub name; stage redi starts from OUTPUT_DIR/sft when this is not given",
    )
    attn_implementation: str = option(
        "redi_varlen",
        "attention: redi_varlen (for packed sequences), or one of Transformers' own for models that it refuses",
    )
    chat_template: str | None = option(
        None, "chat template to use instead of the tokenizer's: a file, or the template itself"
    )
    dtype: Literal["float32", "bfloat16", "float16"] = option(
        "float32", "dtype of the weights that LoRA leaves frozen; trained weights are always float32"
    )
    use_peft: bool = option(False, "train a LoRA adapter instead of all weights")
    lora_r: int = option(16, "rank of the adapter")
    lora_alpha: int = option(32, "scale of the adapter, times its rank")
    lora_dropout: float = option(0.0, "dropout in front of the adapter")
    lora_target_modules: list[str] | None = field(
        default=None,
        metadata={"help": "layers that get an adapter (default: all linear layers but the output layer)"},
    )


@dataclass
class DataOptions:
    dataset_name: str | None = option(
        None,
        "training data: a .jsonl, .json or .parquet file, or a Hub name, with the columns problem, generations, "
        "correct or prompt, chosen, rejected",
        aliases=["--dataset"],
    )
    dataset_train_split: str = option("train", "split to train on")
    dataset_num_proc: int | None = option(None, "processes that tokenise")
    max_length: int = option(32768, "stage sft: drop rows whose prompt + completion have more tokens than this")
    max_prompt_length: int = option(800, "stage redi: drop rows whose prompt has more tokens than this")
    max_completion_length: int = option(19000, "stage redi: drop rows with a trace of more tokens than this")

    def __post_init__(self) -> None:
        for name in ("max_length", "max_prompt_length", "max_completion_length"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} must be at least 1, got {getattr(self, name)}.")


# Fields of TrainingArguments that would contradict how batches, loss or evaluation work here: what to do instead.
_REFUSED = {
    "auto_find_batch_size": "memory is bounded by --max_tokens; lower that",
    "dataloader_drop_last": "every row is trained once an epoch",
    "deepspeed": "DeepSpeed is not supported; use DDP (torchrun)",
    "eval_on_start": "evaluation while training is not supported yet",
    "eval_strategy": "evaluation while training is not supported yet",
    "include_num_input_tokens_seen": "tokens per second are in metrics.jsonl",
    "label_smoothing_factor": "the loss is the paper's; it has no label smoothing",
    "load_best_model_at_end": "evaluation while training is not supported yet",
    "remove_unused_columns": "batches do not go through it",
    "torch_compile": "compiling the training step is not supported yet",
    "torch_empty_cache_steps": "forwards of one size do not need it",
    "train_sampling_strategy": "steps are drawn at random; packing takes care of lengths",
}


@dataclass
class RediArguments(TrainingArguments):
    """TrainingArguments with the paper's defaults, the stage, its objective and its batches.

    Without an accelerator use_cpu is set. per_device_train_batch_size and gradient_accumulation_steps follow from
    global_batch_size and the number of ranks.

    Raises ValueError for options that are out of range or contradict each other.
    """

    stage: Literal["sft", "redi"] = option(
        "redi", "sft: imitate the correct traces; redi: learn from correct and incorrect ones"
    )
    alpha: float = option(0.8, "stage redi: weight of the incorrect traces, 0 to 1")
    global_batch_size: int | None = option(
        None,
        "sequences (sft) or pairs (redi) of one optimizer step, over all ranks (default: 128 for sft, 32 for redi)",
    )
    max_tokens: int | None = option(
        None,
        "tokens of one forward; lower it when memory runs out: the result is the same (default: the longest row that "
        "the length limits allow)",
    )
    grad_tolerance: str = option(
        "auto",
        "relative error allowed in the gradient of the logits; 0 is exact, auto is 0 in float32 and 2^-10 under "
        "--bf16; the loss is exact always",
    )
    overwrite_output_dir: bool = option(False, "start over in a folder that holds an earlier run of the stage")

    output_dir: str | None = option(
        "runs/redi_train", "model, checkpoints and metrics.jsonl go to OUTPUT_DIR/sft and OUTPUT_DIR/redi"
    )
    learning_rate: float | None = option(None, "peak learning rate (default: 5e-5 for sft, 1e-6 for redi)")
    num_train_epochs: float | None = option(None, "epochs (default: 5 for sft, 1 for redi)")
    warmup_steps: float = option(
        0.1, "steps over which the learning rate rises, a number or a share of all; then it falls to 0"
    )
    weight_decay: float = option(1e-4, "AdamW's weight decay")
    per_device_train_batch_size: int | None = option(None, "follows from --global_batch_size; not to be set")
    gradient_accumulation_steps: int | None = option(None, "follows from --global_batch_size; not to be set")
    logging_steps: float = option(1, "log every so many steps")
    save_steps: float = option(200, "save a checkpoint every so many steps")
    resume_from_checkpoint: str | None = option(
        None, "checkpoint folder to continue from, or last for the last one of the stage"
    )
    # Waits for the device in every step, and hides what should be seen.
    logging_nan_inf_filter: bool = option(False, "log the last finite loss in place of one that is not finite")
    # Every weight is used in every forward.
    ddp_find_unused_parameters: bool | None = option(False, "passed to DistributedDataParallel")
    remove_unused_columns: bool = option(False, "not to be set")

    def __post_init__(self) -> None:
        for name, default in STAGE_DEFAULTS[self.stage].items():
            if getattr(self, name) is None:
                setattr(self, name, default)
        if not 0 <= self.alpha <= 1:  # also false for NaN
            raise ValueError(f"--alpha must be in [0, 1], got {self.alpha}.")
        if self.grad_tolerance != "auto":
            try:
                in_range = 0 <= float(self.grad_tolerance) < 1
            except ValueError:
                in_range = False
            if not in_range:
                raise ValueError(f"--grad_tolerance must be auto or a number in [0, 1), got {self.grad_tolerance}.")
        for name in ("global_batch_size", "max_tokens"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"--{name} must be at least 1, got {getattr(self, name)}.")
        if not torch.accelerator.is_available():
            self.use_cpu = True
        batch_size, accumulation = self.per_device_train_batch_size, self.gradient_accumulation_steps
        self.per_device_train_batch_size = self.gradient_accumulation_steps = 1
        given_back_ends = [self.report_to] if isinstance(self.report_to, str) else self.report_to or []
        super().__post_init__()
        self._refuse_contradictions(given_back_ends)
        self._derive_batch_size(batch_size, accumulation)

    def _refuse_contradictions(self, back_ends: Sequence[str]) -> None:
        defaults = {f.name: f.default for f in fields(self)}
        for name, why in _REFUSED.items():
            if name in defaults and getattr(self, name) != defaults[name]:
                raise ValueError(f"--{name} cannot be set: {why}.")
        missing = set(back_ends) - {"all", "none", *get_available_reporting_integrations()}
        if missing:
            raise ValueError(
                f"--report_to {sorted(missing)[0]}: there is no such logging back end, or it is not installed."
            )
        if self.use_liger_kernel:
            # Liger's norms, rotary embeddings and MLPs, but not its losses, whose forward would replace ours.
            losses = {"cross_entropy": False, "fused_linear_cross_entropy": False}
            self.liger_kernel_config = (self.liger_kernel_config or {}) | losses
        if self.fsdp and self.use_cpu:
            raise ValueError("--fsdp needs GPUs: on a CPU accelerate leaves it off without saying so.")

    def _derive_batch_size(self, batch_size: int | None, accumulation: int | None) -> None:
        if int(os.environ.get("WORLD_SIZE", 1)) != self.world_size:
            raise ValueError(
                f"the launcher started {os.environ['WORLD_SIZE']} processes but each would train alone; add --use_cpu "
                "if they are to train on CPUs."
            )
        if self.n_gpu > 1:
            print(f"Training on 1 of {self.n_gpu} GPUs; start with torchrun --nproc_per_node {self.n_gpu} to use all.")
            self._n_gpu = 1
        self.per_device_train_batch_size = -(-self.global_batch_size // self.world_size)
        self.gradient_accumulation_steps = 1
        given = {"per_device_train_batch_size": batch_size, "gradient_accumulation_steps": accumulation}
        for name, value in given.items():
            if value is not None and value != getattr(self, name):
                raise ValueError(
                    f"--{name} {value} does not fit --global_batch_size {self.global_batch_size} on {self.world_size} "
                    f"{'rank' if self.world_size == 1 else 'ranks'}; leave it out and set --global_batch_size (and "
                    "--max_tokens, which bounds memory)."
                )


class Options(NamedTuple):
    model: ModelOptions
    data: DataOptions
    training: RediArguments
    given: frozenset[str]  # names of the options that were set, on the command line or in the recipe


_HELP_GROUPS = {
    "what to train": ["stage", "model_name_or_path", "dataset_name", "dataset_train_split", "output_dir", "config"],
    "objective and batches": ["alpha", "global_batch_size", "max_tokens", "grad_tolerance"],
    "data": ["max_length", "max_prompt_length", "max_completion_length", "chat_template", "dataset_num_proc"],
    "optimizer": [
        "learning_rate",
        "num_train_epochs",
        "max_steps",
        "warmup_steps",
        "weight_decay",
        "max_grad_norm",
        "seed",
    ],
    "precision and memory": ["bf16", "gradient_checkpointing", "attn_implementation", "dtype"],
    "LoRA": ["use_peft", "lora_r", "lora_alpha", "lora_dropout", "lora_target_modules"],
    "run": ["save_steps", "resume_from_checkpoint", "overwrite_output_dir", "report_to", "push_to_hub", "use_cpu"],
}
# In place of TrainingArguments' texts, for those of its options that the short help shows.
_HELP_TEXTS = {
    "bf16": "compute in bfloat16 (autocast); the weights stay float32",
    "gradient_checkpointing": "recompute activations in the backward pass: less memory, about a third more compute",
    "max_grad_norm": "clip gradients to this norm; 0 does not clip",
    "max_steps": "stop after so many steps, whatever --num_train_epochs says; -1 does not",
    "push_to_hub": "upload the model to the Hub whenever it is saved",
    "report_to": "also log to tensorboard, wandb, ... (metrics.jsonl is always written)",
    "seed": "seed of the order of the data and of dropout",
    "use_cpu": "train on the CPU although there is an accelerator",
}
_DESCRIPTION = """\
Train a language model on right and wrong reasoning traces: first --stage sft, then --stage redi.

  python -m redi_train --stage sft  --model_name_or_path Qwen/Qwen2.5-Math-1.5B --dataset_name traces.jsonl
  python -m redi_train --stage redi --dataset_name traces.jsonl

Without a model and a dataset it runs a demo of both stages that needs nothing but this machine.
"""


class OptionParser(HfArgumentParser):
    """HfArgumentParser without abbreviations, which raises ValueError instead of exiting and has a short help."""

    def __init__(self) -> None:
        super().__init__(
            [ModelOptions, DataOptions, RediArguments],
            prog="python -m redi_train",
            usage="python -m redi_train [--stage {sft,redi}] [--config FILE] [--option value ...]",
            allow_abbrev=False,
            add_help=False,
        )
        self.add_argument("--config", metavar="FILE", help="YAML file of options; those on the command line win")
        self.add_argument("--help", "-h", action="store_true", help="show the options most people need")
        self.add_argument("--help_all", action="store_true", help="show every option, Trainer's included")
        for action in self._actions:
            action.help = _HELP_TEXTS.get(action.dest, action.help)

    def error(self, message: str) -> NoReturn:
        # HfArgumentParser gives every option a second spelling, with hyphens.
        raise ValueError(re.sub(r"(--\w+)/--[\w/-]+", r"\1", message).rstrip(".") + ".")

    def help_text(self, everything: bool) -> str:
        actions = {action.dest: action for action in reversed(self._actions)}  # the first of --x and --no_x stays
        groups = {title: list(names) for title, names in _HELP_GROUPS.items()}
        groups["help"] = ["help", "help_all"]
        if everything:
            shown = {name for names in groups.values() for name in names}
            groups["every other option of transformers.TrainingArguments"] = sorted(set(actions) - shown)
        formatter = _HelpFormatter(self.prog, max_help_position=34, width=118)
        formatter.add_usage(self.usage, [], [])
        lines = [formatter.format_help(), _DESCRIPTION]
        for title, names in groups.items():
            formatter = _HelpFormatter(self.prog, max_help_position=34, width=118)
            formatter.start_section(title)
            formatter.add_arguments([actions[name] for name in names])
            formatter.end_section()
            lines.append(formatter.format_help())
        return "\n".join(lines)


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """One spelling of each option, and its default unless there is none or the help text states it."""

    def _format_action_invocation(self, action: argparse.Action) -> str:
        value = (
            ""
            if action.nargs == 0 or action.const is True
            else " " + self._format_args(action, self._value_name(action))
        )
        return action.option_strings[0] + value

    def _value_name(self, action: argparse.Action) -> str:
        if action.choices:
            return "{" + ",".join(map(str, action.choices)) + "}"
        return action.metavar or {int: "N", float: "X"}.get(action.type, "VALUE")

    def _get_help_string(self, action: argparse.Action) -> str:
        help_text = action.help or ""
        if action.default in (None, False, argparse.SUPPRESS, "") or "(default" in help_text:
            return help_text
        return f"{help_text} (default: %(default)s)"


def parse_options(argv: Sequence[str]) -> Options:
    """Options from a command line, with those of a --config file as defaults.

    --help prints and exits with 0. Raises ValueError for an unknown option or key (naming the nearest known one), a
    value of the wrong type and whatever the dataclasses refuse; OSError when the recipe cannot be read.
    """
    parser = OptionParser()
    namespace = _parse_known(parser, argv)
    if namespace.help or namespace.help_all:
        print(parser.help_text(everything=namespace.help_all))
        raise SystemExit(0)
    argv = [*_recipe_argv(parser, namespace.config), *argv]
    _parse_known(parser, argv)
    model, data, training, _ = parser.parse_args_into_dataclasses(argv, look_for_args_file=False)
    flags = (word.partition("=")[0] for word in argv if word.startswith("--"))
    given = frozenset(
        parser._option_string_actions[flag].dest for flag in flags if flag in parser._option_string_actions
    )
    if training.max_tokens is None:
        pair = 2 * (data.max_prompt_length + data.max_completion_length)
        training.max_tokens = data.max_length if training.stage == "sft" else pair
    return Options(model, data, training, given - {"config"})


def _parse_known(parser: OptionParser, argv: Sequence[str]) -> argparse.Namespace:
    namespace, unknown = parser.parse_known_args(list(argv))
    if unknown:
        word = unknown[0].partition("=")[0]
        if not word.startswith("-"):
            raise ValueError(f"unexpected argument {word!r}; options are written --name value.")
        raise ValueError(f"unknown option {word}{_nearest(word, parser)}")
    return namespace


def _nearest(word: str, parser: OptionParser) -> str:
    names = {action.option_strings[0].lstrip("-") for action in parser._actions}
    close = difflib.get_close_matches(word.lstrip("-").replace("-", "_"), names, n=1)
    return f"; did you mean {'--' if word.startswith('-') else ''}{close[0]}?" if close else "; --help_all lists all."


def _recipe_argv(parser: OptionParser, config: str | None) -> list[str]:
    """The recipe as a command line, so that its values are read by the same types (YAML reads 1e-6 as a string)."""
    if config is None:
        return []
    try:
        recipe = yaml.safe_load(Path(config).expanduser().read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{config} is not valid YAML: {' '.join(str(error).split())}.") from error
    if not isinstance(recipe, dict):
        raise ValueError(f"{config} must hold one `name: value` a line.")
    argv: list[str] = []
    for key, value in recipe.items():
        flag = f"--{key}"
        if flag not in parser._option_string_actions or key in ("config", "help", "help_all"):
            raise ValueError(f"{config}: unknown key {key}{_nearest(str(key), parser)}")
        if isinstance(value, list):
            words = [flag, *map(str, value)]
        elif value is None:
            continue
        else:
            words = [f"{flag}={json.dumps(value) if isinstance(value, dict) else value}"]
        try:
            _parse_known(parser, words)
        except ValueError as error:
            raise ValueError(f"{config}: {error}") from error
        argv += words
    return argv
