"""`python -m redi_train --stage {sft,redi} ...`: one stage of training, or the demo. `--help` lists the options."""

import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import set_seed

from redi_train.batching import check_max_tokens
from redi_train.data import describe_dropped, load_rows, recognise_layout, tokenize_rows
from redi_train.demo_run import run_demo
from redi_train.model import load_model, load_tokenizer
from redi_train.options import Options, parse_options
from redi_train.trainer import METRICS_FILE, RediTrainer, last_checkpoint


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0, or 2 after one sentence on stderr when the options, the data or the model cannot be used.

    Until then nothing has been written. With --log_level debug such an error keeps its traceback.
    """
    options = None
    try:
        options = parse_options(sys.argv[1:] if argv is None else argv)
        is_demo = options.model.model_name_or_path is None and options.data.dataset_name is None
        if is_demo:
            run_demo(options)
            return 0
        trainer, checkpoint = prepare(options)
    except (ValueError, OSError, ImportError) as error:
        if options is not None and options.training.log_level == "debug":
            raise
        if int(os.environ.get("RANK", 0)) == 0:
            print(f"redi_train: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    if checkpoint is None and trainer.args.should_save:
        for old in Path(trainer.args.output_dir).glob("checkpoint-*"):
            shutil.rmtree(old)
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    trainer.save_model()
    if trainer.is_world_process_zero():
        print(f"Saved the model to {trainer.args.output_dir}, what was logged to {METRICS_FILE} in it.")
    return 0


def prepare(options: Options) -> tuple[RediTrainer, Path | None]:
    """The trainer that the options describe, and the checkpoint it is to resume from.

    Raises ValueError or OSError for anything wrong with them, before the first file is written.
    """
    model_options, data, training = options.model, options.data, options.training
    if data.dataset_name is None:
        raise ValueError("--dataset_name is missing: give a .jsonl, .json or .parquet file, or a dataset of the Hub.")
    stage_dir = Path(training.output_dir) / training.stage
    checkpoint = _checkpoint(options, stage_dir)
    name = model_options.model_name_or_path or _stage_1_model(options)

    with training.main_process_first(desc="tokenising"):
        rows = load_rows(data.dataset_name, split=data.dataset_train_split)
        recognise_layout(rows.column_names)  # before a model is looked for, perhaps on the network
        tokenizer = load_tokenizer(name, chat_template=model_options.chat_template)
        tokenized, dropped = tokenize_rows(
            rows,
            tokenizer,
            training.stage,
            max_length=data.max_length,
            max_prompt_length=data.max_prompt_length,
            max_completion_length=data.max_completion_length,
            num_proc=data.dataset_num_proc,
        )
    check_max_tokens(tokenized, training.max_tokens)
    if training.process_index == 0:
        left_out = f"; left out: {describe_dropped(dropped)}" if dropped else ""
        print(f"Training on {len(tokenized)} of {len(rows)} rows{left_out}.")

    set_seed(training.seed)  # LoRA draws its weights
    model = load_model(
        name,
        attn_implementation=model_options.attn_implementation,
        dtype=getattr(torch, model_options.dtype),
        lora=_lora(options) if model_options.use_peft else None,
    )
    training.output_dir = str(stage_dir)
    trainer = RediTrainer(model=model, args=training, train_dataset=tokenized, processing_class=tokenizer)
    return trainer, checkpoint


def _checkpoint(options: Options, stage_dir: Path) -> Path | None:
    training = options.training
    if training.resume_from_checkpoint is None:
        if stage_dir.is_dir() and any(stage_dir.iterdir()) and not training.overwrite_output_dir:
            raise ValueError(
                f"{stage_dir} holds an earlier run: continue it with --resume_from_checkpoint last, start over with "
                "--overwrite_output_dir, or give another --output_dir."
            )
        return None
    if training.resume_from_checkpoint in ("last", "True", "true"):
        checkpoint = last_checkpoint(stage_dir)
        if checkpoint is None:
            raise ValueError(f"there is no complete checkpoint in {stage_dir} to resume from.")
        return checkpoint
    checkpoint = Path(training.resume_from_checkpoint)
    if not (checkpoint / "trainer_state.json").is_file():
        raise FileNotFoundError(f"{checkpoint} is not a complete checkpoint.")
    return checkpoint


def _stage_1_model(options: Options) -> str:
    folder = Path(options.training.output_dir) / "sft"
    if options.training.stage == "sft" or not (folder / "config.json").is_file():
        hint = (
            "" if options.training.stage == "sft" else f", or train stage sft into {options.training.output_dir} first"
        )
        raise ValueError(f"--model_name_or_path is missing: give a model folder or a Hub name{hint}.")
    return str(folder)


def _lora(options: Options) -> dict[str, object]:
    model = options.model
    return {
        "r": model.lora_r,
        "lora_alpha": model.lora_alpha,
        "lora_dropout": model.lora_dropout,
        "target_modules": model.lora_target_modules or "all-linear",
    }


if __name__ == "__main__":
    sys.exit(main())
