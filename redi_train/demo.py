"""The embedded demo's task: arithmetic that can be made, taught and checked on the spot, with no data and no network.

A problem folds a row of digits from left to right with |a-b|; its answer is whether the result is even or odd:

    problem      3-8-2-7=?            trace     |3-8|=5
    answer       even                           |5-2|=3
                                                |3-7|=4
                                                A: even

A rule-based teacher writes the traces one difference a line and slips at a known rate, carrying the wrong digit on. The
verifier sees only the line that begins with "A:", so nearly half of the traces with a slip still pass: slips hide in
positives and abound in negatives. A model that imitates the positives learns to slip; one that also learns from the
negatives can unlearn it.

(Differences rather than sums modulo 10, because neither digit alone tells anything about their sum modulo 10. Learning
its table begins with a plateau, on some seeds longer than the whole demo.)
"""

import contextlib
import functools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from datasets import Dataset
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from redi_train.batching import Step, StepDataset
from redi_train.tiny import make_tiny_model, word_tokenizer

# Every trace has the same number of tokens: a, "-", b, "|=", c and a separator for each difference.
WORDS = ["|", "-", "|=", "\n|", "\nA: ", "even", "odd", "=?\n", *"0123456789"]


@dataclass(frozen=True)
class DemoSettings:
    """Chosen by experiment on seeds 0 to 4, for a demo of about a minute on 2 cores.

    Slip rate and temperature leave room: with them stage 1 ends near 0.75. Its three epochs are twice what the model
    needs to learn the table of differences, so that more of the same (alpha 0) gains little. Of the learning rates
    tried for stage 2, 1e-4 gains a little less, 2e-4 and 3e-4 gain alike; at 2e-4 alpha 0.8 is stable on every seed and
    alpha 1.0 collapses on two, as in the paper. What is not here (warm-up, weight decay, ...) is the paper's recipe.
    """

    num_train: int = 4000
    num_heldout: int = 500
    num_terms: int = 6
    slip_rate: float = 0.2
    traces_per_problem: int = 4

    hidden_size: int = 96
    num_hidden_layers: int = 2
    num_attention_heads: int = 4
    num_key_value_heads: int = 4
    intermediate_size: int = 512

    sft_epochs: int = 3
    sft_batch_size: int = 64  # sequences
    sft_learning_rate: float = 3e-3
    redi_epochs: int = 1
    redi_batch_size: int = 32  # pairs
    redi_learning_rate: float = 2e-4
    max_tokens: int = 4096  # of one packed forward: a whole step of either stage

    temperature: float = 1.0
    samples_per_problem: int = 2
    sampling_batch_size: int = 1000
    sampling_steps: int = 25  # sample the held-out problems every so many steps

    @property
    def max_new_tokens(self) -> int:
        """A trace, its EOS, and a line more."""
        return 6 * self.num_terms + 3


def make_demo_model(settings: DemoSettings, seed: int) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model (0.37 million weights by default) and its tokenizer of words, without a chat template."""
    tokenizer = word_tokenizer(WORDS)
    model = make_tiny_model(
        tokenizer,
        hidden_size=settings.hidden_size,
        num_hidden_layers=settings.num_hidden_layers,
        num_attention_heads=settings.num_attention_heads,
        num_key_value_heads=settings.num_key_value_heads,
        intermediate_size=settings.intermediate_size,
        seed=seed,
    )
    return model, tokenizer


def _answer(result: int) -> str:
    return "odd" if result % 2 else "even"


def make_problems(n: int, seed: int, num_terms: int = 6) -> list[dict]:
    """`n` different problems `{"problem": "3-8-2=?\\n", "answer": "odd"}` of `num_terms` digits, drawn from `seed`.

    Raises ValueError if there are fewer than `n` such problems.
    """
    if n > 10**num_terms:
        raise ValueError(f"There are only {10**num_terms} different problems of {num_terms} digits, not {n}.")
    problems = []
    for index in random.Random(seed).sample(range(10**num_terms), n):
        digits = [int(digit) for digit in f"{index:0{num_terms}d}"]
        result = functools.reduce(lambda a, b: abs(a - b), digits)
        problems.append({"problem": "-".join(map(str, digits)) + "=?\n", "answer": _answer(result)})
    return problems


def teacher_trace(problem: str, slip_rate: float, rng: random.Random) -> str:
    """A step-by-step trace: each difference is wrong with probability `slip_rate`, any of the nine wrong digits alike.

    The next line starts from the result, right or wrong, and the last line reads the answer off the last digit.
    """
    result, *terms = (int(digit) for digit in problem.removesuffix("=?\n").split("-"))
    lines = []
    for term in terms:
        difference = abs(result - term)
        if rng.random() < slip_rate:
            difference = (difference + rng.randint(1, 9)) % 10
        lines.append(f"|{result}-{term}|={difference}")
        result = difference
    return "\n".join([*lines, f"A: {_answer(result)}"])


def extract_answer(text: str) -> str | None:
    """What follows the last "A:" of a trace, without surrounding white space; None where there is no "A:"."""
    _, marker, answer = text.rpartition("A:")
    return answer.strip() if marker else None


def is_correct(text: str, answer: str) -> bool:
    """The verifier: is the trace's final answer the right one? Nothing else of the trace is looked at."""
    return extract_answer(text) == answer


def demo_dataset(seed: int, settings: DemoSettings) -> tuple[list[dict], list[dict]]:
    """Training rows and held-out rows in the traces layout `{problem, answer, generations: [str], correct: [bool]}`.

    No held-out problem is among the training problems. Everything follows from `seed`.
    """
    rows = make_problems(settings.num_train + settings.num_heldout, seed, settings.num_terms)
    rng = random.Random(f"teacher-{seed}")
    for row in rows:
        traces = [teacher_trace(row["problem"], settings.slip_rate, rng) for _ in range(settings.traces_per_problem)]
        row |= {"generations": traces, "correct": [is_correct(trace, row["answer"]) for trace in traces]}
    return rows[: settings.num_train], rows[settings.num_train :]


@torch.no_grad()
def sample_pass_at_1(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    problems: Sequence[dict],
    *,
    temperature: float,
    samples_per_problem: int,
    seed: int,
    batch_size: int,
    max_new_tokens: int,
) -> np.ndarray:
    """Which samples are right, (N, samples_per_problem) bool, for rows with `problem` and `answer`.

    Full sampling (no top-k, no top-p) by Transformers' batched generation from the plain text of the problem, no chat
    template, at most `batch_size` samples at a time. The samples follow from the arguments alone. The model comes back
    in the mode (training or evaluation) it was in; the global random state of the CPU and of the model's device is left
    as it was.
    """
    repeated = [row for row in problems for _ in range(samples_per_problem)]
    options = GenerationConfig(
        do_sample=True,
        temperature=temperature,
        top_k=0,  # unset would mean 50
        top_p=1.0,
        repetition_penalty=1.0,
        max_new_tokens=max_new_tokens,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        use_cache=True,
    )
    was_training = model.training
    correct = []
    with _seeded(seed, model.device):
        model.eval()
        try:
            for start in range(0, len(repeated), batch_size):
                batch = repeated[start : start + batch_size]
                prompts = tokenizer(
                    [row["problem"] for row in batch],
                    padding=True,
                    padding_side="left",
                    add_special_tokens=False,
                    return_tensors="pt",
                ).to(model.device)
                ids = model.generate(
                    input_ids=prompts.input_ids, attention_mask=prompts.attention_mask, generation_config=options
                )
                texts = tokenizer.batch_decode(ids[:, prompts.input_ids.shape[1] :], skip_special_tokens=True)
                correct += [is_correct(text, row["answer"]) for text, row in zip(texts, batch, strict=True)]
        finally:
            model.train(was_training)
    return np.array(correct).reshape(len(problems), samples_per_problem)


@contextlib.contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Inside, random numbers of the CPU and of `device` follow from `seed`; afterwards their states are what they were.

    Not by torch.manual_seed, which reseeds accelerators that are not in use here.
    """
    is_cpu = device.type == "cpu"
    with torch.random.fork_rng(devices=[]), torch.accelerator.device_index(None if is_cpu else device.index):
        torch.default_generator.manual_seed(seed)
        if is_cpu:
            yield
            return
        accelerator = torch.get_device_module(device)
        state = accelerator.get_rng_state()
        accelerator.manual_seed(seed)
        try:
            yield
        finally:
            accelerator.set_rng_state(state)


@torch.no_grad()
def pair_logps(model: torch.nn.Module, rows: Dataset, *, pairs_per_forward: int = 32) -> tuple[float, float]:
    """Chosen and rejected LogPS of pairs from `data.tokenize_rows`: the mean over the pairs of each trace's mean
    log-probability per token, in nats. The model is one that `model.prepare_model` has seen.
    """
    starts = range(0, len(rows), pairs_per_forward)
    forwards = [list(range(start, min(start + pairs_per_forward, len(rows)))) for start in starts]
    step = Step(forwards, num_rows=len(rows), num_labelled=0, num_tokens=0)
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    try:
        outputs = [model(batch=batch.to(device), num_pairs=1) for batch in StepDataset(rows)[step]["forwards"]]
    finally:
        model.train(was_training)
    chosen, rejected = (torch.cat([output[name] for output in outputs]) for name in ("chosen_logps", "rejected_logps"))
    return chosen.mean().item(), rejected.mean().item()


def pass_at_1(correct: np.ndarray) -> tuple[float, float]:
    """pass@1 and its standard error over problems, from `correct` (N, samples) bool, N >= 2.

    The spread of the problems' shares of right samples holds both the choice of problems and the luck of sampling.
    """
    return _mean_and_standard_error(correct.mean(axis=1))


def paired_difference(after: np.ndarray, before: np.ndarray) -> tuple[float, float]:
    """pass@1 of `after` (N, samples) minus that of `before` (N, samples), and its standard error.

    The problems are the same in the same order, so what makes a problem hard for both runs cancels: the standard error
    is that of the per-problem difference.

    Raises ValueError when the numbers of problems differ.
    """
    if len(after) != len(before):
        raise ValueError(f"The runs have {len(after)} and {len(before)} problems, so they cannot be paired.")
    return _mean_and_standard_error(after.mean(axis=1) - before.mean(axis=1))


def _mean_and_standard_error(values: np.ndarray) -> tuple[float, float]:
    return float(values.mean()), float(values.std(ddof=1) / len(values) ** 0.5)


class StageResult(NamedTuple):
    """One line of `results_table`; LogPS in nats per token."""

    name: str
    pass_at_1: float
    pass_at_1_se: float
    chosen_logps: float
    rejected_logps: float


def results_table(results: Sequence[StageResult]) -> str:
    """A Markdown table, also aligned as plain text: pass@1 ± its standard error, chosen and rejected LogPS."""
    lines = [["", "pass@1", "chosen LogPS", "rejected LogPS"]]
    for result in results:
        lines.append(
            [
                result.name,
                f"{result.pass_at_1:.3f} ± {result.pass_at_1_se:.3f}",
                f"{result.chosen_logps:.3f}",
                f"{result.rejected_logps:.3f}",
            ]
        )
    first, *others = (max(map(len, column)) for column in zip(*lines, strict=True))
    rows = [
        " | ".join([name.ljust(first), *(cell.rjust(width) for cell, width in zip(cells, others, strict=True))])
        for name, *cells in lines
    ]
    rule = "|".join(["-" * (first + 2), *("-" * (width + 1) + ":" for width in others)])
    return "\n".join([f"| {rows[0]} |", f"|{rule}|", *(f"| {row} |" for row in rows[1:])])
