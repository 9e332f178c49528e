"""transformers.Trainer with three things of its own: a batch is one optimizer step in packed forwards, the loss is the
stage's, and every log has what the paper watches (chosen and rejected LogPS, step size), also in metrics.jsonl.

Optimizer, schedule, clipping, gradient checkpointing, logging back ends, checkpoints, resume, push_to_hub and DDP are
Trainer's.
"""

import contextlib
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import (
    PreTrainedTokenizerBase,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from redi_train.batching import StepBatch, StepDataset, StepSampler, check_max_tokens
from redi_train.model import attach_loss, causal_lm, check_precision
from redi_train.options import RediArguments

METRICS_FILE = "metrics.jsonl"


class RediTrainer(Trainer):
    """Trains one stage on rows from `data.tokenize_rows`.

    The model is one that `model.prepare_model` or `model.load_model` has seen. Logged, beside what Trainer logs:

        loss              of the stage, mean over the steps since the last log
        chosen_logps      mean over the chosen sequences since the last log of their log-probability per token, nats
        rejected_logps    the same of the rejected ones, and margin = chosen_logps - rejected_logps (stage 2)
        grad_norm         before clipping, and step_size = learning_rate * grad_norm, the scale of the paper's figures
        tokens_per_second over all ranks, from asking for a step's data to its log

    Raises ValueError when trained weights have 16 bits or a row is longer than args.max_tokens.
    """

    args: RediArguments

    def __init__(
        self,
        model: nn.Module,
        args: RediArguments,
        train_dataset: Dataset,
        processing_class: PreTrainedTokenizerBase | None = None,
        callbacks: Sequence[TrainerCallback] = (),
    ):
        check_precision(model)
        self._num_tokens, self._num_labelled = (
            np.asarray(train_dataset.with_format("numpy")[column]) for column in ("num_tokens", "num_labelled")
        )
        self._max_tokens = args.max_tokens or int(self._num_tokens.max())
        check_max_tokens(train_dataset, self._max_tokens)
        attach_loss(model)
        self._num_weights = causal_lm(model).num_parameters(exclude_embeddings=True)
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            processing_class=processing_class,
            # First, so that callbacks that log find what they logged in the file.
            callbacks=[MetricsFile(), *callbacks],
        )
        if not args.disable_tqdm:
            self.remove_callback(ProgressCallback)
            self.add_callback(StepProgress())
        self._reset_window()

    def _reset_window(self) -> None:
        """Forget what was counted since the last log. LogPS are summed on the device, so that no step waits for it."""
        self._window_logps = torch.zeros(2, device=self.args.device)
        self._window_rows = 0
        self._window_tokens = 0
        self._window_start: float | None = None

    def get_train_dataloader(self) -> DataLoader:
        """Steps of this rank. Not prepared by accelerate, whose sharding repeats rows to make the last step even."""
        args = self.args
        sampler = StepSampler(
            self._num_tokens,
            self._num_labelled,
            global_batch_size=args.global_batch_size,
            max_tokens=self._max_tokens,
            seed=args.seed if args.data_seed is None else args.data_seed,
            rank=args.process_index,
            world_size=args.world_size,
        )
        return _StepLoader(
            StepDataset(self.train_dataset),
            batch_sampler=sampler,
            collate_fn=_only_item,
            num_workers=args.dataloader_num_workers,
            persistent_workers=args.dataloader_persistent_workers,
            prefetch_factor=args.dataloader_prefetch_factor,
            multiprocessing_context=args.dataloader_multiprocessing_context,
            in_order=args.dataloader_in_order,
        )

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list[StepBatch], None]:
        if self._window_start is None:
            self._window_start = time.perf_counter()
        # The divisors of the loss come with the step: nothing to count.
        return [next(epoch_iterator) for _ in range(num_batches)], None

    def training_step(self, model: nn.Module, inputs: StepBatch, num_items_in_batch: None = None) -> Tensor:
        """Forward and backward of every packed forward of the step; gradients synchronise on the last.

        DDP averages gradients over ranks and Trainer does so with losses, hence a rank's divisor is its share of the
        step's. Returns this rank's loss under that divisor.
        """
        model.train()
        if callable(getattr(self.optimizer, "train", None)):  # schedule-free optimizers
            self.optimizer.train()
        world_size = self.args.world_size
        if self.args.stage == "redi":
            objective = {"num_pairs": inputs["num_rows"] / world_size, "alpha": self.args.alpha}
        else:
            objective = {"num_tokens": inputs["num_labelled"] / world_size}
        if self.args.grad_tolerance != "auto":
            objective["grad_tolerance"] = float(self.args.grad_tolerance)
        total = torch.zeros((), device=self.args.device)
        *earlier, last = inputs["forwards"]
        for batch in (*earlier, last):
            with contextlib.nullcontext() if batch is last else self.accelerator.no_sync(model):
                output = model(batch=batch.to(self.args.device, non_blocking=True), **objective)
                self.accelerator.backward(output["loss"])
            total += output["loss"].detach()
            if self.args.stage == "redi":
                sums = [output["chosen_logps"].sum(), output["rejected_logps"].sum()]
            else:
                sums = [output["logps"].sum(), total.new_zeros(())]
            self._window_logps += torch.stack(sums)
        self._window_rows += inputs["num_rows"]
        self._window_tokens += inputs["num_tokens"]
        return total

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "grad_norm" in logs:  # the log of training steps, on every rank
            logs |= self._window_metrics()
            logs["step_size"] = logs["learning_rate"] * logs["grad_norm"]
            self._reset_window()
        super().log(logs, start_time)

    def _window_metrics(self) -> dict[str, float]:
        sums = self.accelerator.reduce(self._window_logps, reduction="sum")
        chosen, rejected = (total / self._window_rows for total in sums.tolist())
        # The clock is read after tolist, which waits for the device.
        metrics = {
            "chosen_logps": chosen,
            "tokens_per_second": self._window_tokens / (time.perf_counter() - self._window_start),
        }
        if self.args.stage == "redi":
            metrics |= {"rejected_logps": rejected, "margin": chosen - rejected}
        return metrics

    def floating_point_ops(self, inputs: StepBatch) -> float:
        """Trainer's estimate, 6 operations a token and a weight, of this rank's forwards; attention is not counted."""
        return 6.0 * self._num_weights * sum(batch.input_ids.numel() for batch in inputs["forwards"])


class _StepLoader(DataLoader):
    """Passes the epoch on to the sampler. (When Trainer resumes within an epoch, it finds the sampler itself.)"""

    def set_epoch(self, epoch: int) -> None:
        self.batch_sampler.set_epoch(epoch)


def _only_item(items: list[StepBatch]) -> StepBatch:
    (item,) = items
    return item


class MetricsFile(TrainerCallback):
    """Appends every log to metrics.jsonl in the output folder, one JSON object a line, with `stage` and `step`.

    A run that starts anew starts a new file; one that resumes cuts the file back to its checkpoint's step.
    """

    def on_train_begin(self, args: RediArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if not state.is_world_process_zero:
            return
        path = Path(args.output_dir) / METRICS_FILE
        lines = (
            path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() and state.global_step else []
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= state.global_step]
        path.write_text("".join(kept), encoding="utf-8")

    def on_log(
        self, args: RediArguments, state: TrainerState, control: TrainerControl, logs: dict[str, float], **kwargs: Any
    ) -> None:
        if state.is_world_process_zero:
            with (Path(args.output_dir) / METRICS_FILE).open("a", encoding="utf-8") as file:
                file.write(json.dumps({"stage": args.stage, "step": state.global_step, **logs}) + "\n")


class StepProgress(ProgressCallback):
    """The progress bar with the latest figures at its end, instead of a line for every step."""

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float],
        **kwargs: Any,
    ) -> None:
        if state.is_world_process_zero and self.training_bar is not None:
            shown = {name: logs[name] for name in ("loss", "chosen_logps", "rejected_logps") if name in logs}
            if shown:
                self.training_bar.set_postfix({name: f"{value:.4g}" for name, value in shown.items()})


def last_checkpoint(output_dir: str | Path) -> Path | None:
    """The checkpoint folder of the highest step that is complete, or None.

    trainer_state.json is the last file Trainer writes into a checkpoint, so a folder without a readable one was cut
    short.
    """
    found: dict[int, Path] = {}
    for folder in Path(output_dir).glob("checkpoint-*"):
        step = folder.name.removeprefix("checkpoint-")
        with contextlib.suppress(OSError, ValueError, KeyError):
            if json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))["global_step"] == int(step):
                found[int(step)] = folder
    return found[max(found)] if found else None
