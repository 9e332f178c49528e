"""The embedded demo: both stages on the arithmetic of demo.py, from nothing, in a minute or two on a laptop's CPU.

`python -m redi_train --stage redi` without a model and a dataset comes here. Only the data and the model are made on
the spot; the trainer, the loss and the packing are those of any other run.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, disable_progress_bars
from torch import nn
from transformers import PreTrainedTokenizerBase, TrainerCallback, TrainerControl, TrainerState
from transformers.utils import logging

from redi_train.data import Stage, tokenize_rows
from redi_train.demo import (
    DemoSettings,
    StageResult,
    demo_dataset,
    make_demo_model,
    pair_logps,
    pass_at_1,
    results_table,
    sample_pass_at_1,
)
from redi_train.model import load_model, load_tokenizer, prepare_model
from redi_train.options import Options, RediArguments
from redi_train.plots import plot_dynamics
from redi_train.trainer import METRICS_FILE, RediTrainer

DEMO_DIR = "runs/demo"
RESULTS_FILE = "results.json"  # of a stage: what it was trained with, its table rows, every sample's verdict
_STAGE_OPTIONS = ("learning_rate", "num_train_epochs", "max_steps", "global_batch_size")


def run_demo(options: Options, settings: DemoSettings | None = None) -> None:
    """Train the stage asked for, stage 1 before stage 2 where it is missing, and print the table.

    Raises ValueError, before anything is written, when the output folder holds something else.
    """
    settings = settings or DemoSettings()
    training = options.training
    root = Path(training.output_dir if "output_dir" in options.given else DEMO_DIR)
    stages: list[Stage] = ["sft", "redi"] if training.stage == "redi" else ["sft"]
    done = {} if training.overwrite_output_dir else _finished_stage_1(root, training.stage, training.seed)
    rows, heldout = demo_dataset(training.seed, settings)
    for stage in stages:
        if stage not in done:
            done[stage] = _train(stage, root, options, settings, rows, heldout)

    figure = root / "dynamics.png"
    plot_dynamics([root / stage / METRICS_FILE for stage in stages], figure)
    results = [StageResult(*row) for stage in stages for row in done[stage]["table"]]
    print(f"\n{results_table(results)}\n")
    print(
        f"pass@1 of {settings.samples_per_problem} samples for each of {len(heldout)} held-out problems at temperature "
        f"{settings.temperature:g}, ± standard error."
    )
    print("LogPS: mean log-probability per token of held-out traces, in nats.")
    print(f"Figure: {figure}. Every step: {', '.join(str(root / stage / METRICS_FILE) for stage in stages)}.")


def _finished_stage_1(root: Path, stage: Stage, seed: int) -> dict[Stage, dict[str, Any]]:
    """Stage 1's results where this demo has finished it with this seed and goes on to stage 2; {} where nothing is."""
    start_over = "start over with --overwrite_output_dir, or give another --output_dir."
    if (root / stage).is_dir():
        raise ValueError(f"{root / stage} holds an earlier run: {start_over}")
    if not (root / "sft").is_dir():
        return {}
    path = root / "sft" / RESULTS_FILE
    if not path.is_file() or (results := json.loads(path.read_text(encoding="utf-8")))["seed"] != seed:
        raise ValueError(f"{root / 'sft'} is not a finished stage 1 of the demo with seed {seed}: {start_over}")
    print(f"Stage 1 was finished before: {root / 'sft'}.")
    return {"sft": results}


def _train(
    stage: Stage, root: Path, options: Options, settings: DemoSettings, rows: list[dict], heldout: list[dict]
) -> dict[str, Any]:
    arguments = _arguments(stage, root, options, settings)
    logging.disable_progress_bar()  # of loading and saving
    disable_progress_bars()  # of tokenising
    if stage == "sft":
        model, tokenizer = make_demo_model(settings, arguments.seed)
        prepare_model(model)
        size = sum(parameter.numel() for parameter in model.parameters()) / 1e6
        print(f"Stage 1, SFT: a model of {size:.1f} M parameters imitates traces with the right answer.", flush=True)
    else:
        model, tokenizer = load_model(str(root / "sft")), load_tokenizer(str(root / "sft"))
        print(f"Stage 2, REDI: it learns from right and wrong traces, alpha {arguments.alpha:g}.", flush=True)

    tokenized, _ = tokenize_rows(Dataset.from_list(rows), tokenizer, stage)
    heldout_pairs, _ = tokenize_rows(Dataset.from_list(heldout), tokenizer, "redi")
    sampling = _Sampling(model, tokenizer, heldout, settings, arguments.seed)
    trainer = RediTrainer(model, arguments, tokenized, tokenizer, callbacks=[sampling])
    sampling.log = trainer.log
    table = []
    if stage == "sft":
        table.append(("start", *pass_at_1(sampling.sample()), *pair_logps(model, heldout_pairs)))
    trainer.train()
    trainer.save_model()
    name = "after SFT" if stage == "sft" else f"after REDI, alpha {arguments.alpha:g}"
    table.append((name, *pass_at_1(sampling.correct), *pair_logps(model, heldout_pairs)))
    results = {"seed": arguments.seed, "table": table, "correct": sampling.correct.astype(int).tolist()}
    (root / stage / RESULTS_FILE).write_text(json.dumps(results), encoding="utf-8")
    return results


def _arguments(stage: Stage, root: Path, options: Options, settings: DemoSettings) -> RediArguments:
    """The demo's settings, under what the user set: of one stage's options only those of the stage asked for."""
    given = {name: getattr(options.training, name) for name in options.given if hasattr(options.training, name)}
    if stage != options.training.stage:
        given = {name: value for name, value in given.items() if name not in _STAGE_OPTIONS}
    defaults: dict[str, Any] = {
        "num_train_epochs": getattr(settings, f"{stage}_epochs"),
        "global_batch_size": getattr(settings, f"{stage}_batch_size"),
        "learning_rate": getattr(settings, f"{stage}_learning_rate"),
        "max_tokens": settings.max_tokens,
        "save_strategy": "no",
    }
    return RediArguments(**(defaults | given | {"stage": stage, "output_dir": str(root / stage)}))


class _Sampling(TrainerCallback):
    """Samples the held-out problems at the start, every so many steps and at the end, and logs pass@1."""

    def __init__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        heldout: list[dict],
        settings: DemoSettings,
        seed: int,
    ):
        self.model, self.tokenizer, self.heldout, self.settings, self.seed = model, tokenizer, heldout, settings, seed

    def sample(self) -> np.ndarray:
        self.correct = sample_pass_at_1(
            self.model,
            self.tokenizer,
            self.heldout,
            temperature=self.settings.temperature,
            samples_per_problem=self.settings.samples_per_problem,
            seed=self.seed,
            batch_size=self.settings.sampling_batch_size,
            max_new_tokens=self.settings.max_new_tokens,
        )
        return self.correct

    def _log(self) -> None:
        value, standard_error = pass_at_1(self.sample())
        self.log({"pass_at_1": value, "pass_at_1_se": standard_error})

    def on_train_begin(self, args: RediArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._log()

    def on_log(
        self, args: RediArguments, state: TrainerState, control: TrainerControl, logs: dict[str, float], **kwargs: Any
    ) -> None:
        # After the step's own log, not on_step_end: a log made there would take its place.
        due = state.global_step % self.settings.sampling_steps == 0 and state.global_step < state.max_steps
        if due and "grad_norm" in logs:
            self._log()

    def on_train_end(self, args: RediArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._log()
