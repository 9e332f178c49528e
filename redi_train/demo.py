"""The embedded demo's task: arithmetic that can be made, taught and checked on the spot, with no data and no network.

A problem folds a row of digits from left to right with |a-b|; its answer is whether the result is even or odd:

    problem      3-8-2-7=?            trace     |3-8|=5
    answer       even                           |5-2|=3
                                                |3-7|=4
                                                A: even

A rule-based teacher writes the traces one difference a line and slips at a known rate, carrying the wrong digit on. The verifier
sees only the line that begins with "A:", so nearly half of the traces with a slip still pass: slips hide in positives and abound
in negatives. A model that imitates the positives learns to slip; one that also learns from the negatives can unlearn it.

(Differences rather than sums modulo 10, because the sum's table shows a network nothing until it sees both digits at once: it
waits on a plateau of random length, on one seed in three longer than the whole demo.)
"""

import functools
import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

# Every trace of a problem has the same number of tokens: "|", then a, "-", b, "|=", c and a line break for each difference.
WORDS = ["|", "-", "|=", "\n|", "\nA: ", "even", "odd", "=?\n", *"0123456789"]


@dataclass(frozen=True)
class DemoSettings:
    num_train: int = 4000
    num_heldout: int = 400
    num_terms: int = 6
    slip_rate: float = 0.15
    traces_per_problem: int = 4


def _answer(result: int) -> str:
    return "odd" if result % 2 else "even"


def make_problems(n: int, seed: int, num_terms: int = 6) -> list[dict[str, str]]:
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
    """A step-by-step trace: each difference is wrong with probability `slip_rate` (any of the nine wrong digits alike) and its
    result, right or wrong, is what the next line starts from. The last line reads the answer off the last digit."""
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


def demo_dataset(seed: int, settings: DemoSettings) -> tuple[list[dict], list[dict[str, str]]]:
    """Training rows in the traces layout `{problem, answer, generations: [str], correct: [bool]}` and held-out problems
    `{problem, answer}`, none of which is among the training problems. Everything follows from `seed`."""
    problems = make_problems(settings.num_train + settings.num_heldout, seed, settings.num_terms)
    rng = random.Random(f"teacher-{seed}")
    rows = []
    for row in problems[: settings.num_train]:
        generations = [
            teacher_trace(row["problem"], settings.slip_rate, rng) for _ in range(settings.traces_per_problem)
        ]
        rows.append(row | {"generations": generations, "correct": [is_correct(g, row["answer"]) for g in generations]})
    return rows, problems[settings.num_train :]


@torch.no_grad()
def sample_pass_at_1(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    problems: Sequence[dict[str, str]],
    *,
    temperature: float,
    samples_per_problem: int,
    seed: int,
    batch_size: int,
    max_new_tokens: int,
) -> np.ndarray:
    """Which samples are right, (N, samples_per_problem) bool: full sampling (no top-k, no top-p) by Transformers' batched
    generation from the plain problem text, no chat template, at most `batch_size` samples at a time.

    The samples follow from the arguments alone. The model comes back in the mode (training or evaluation) it was in, and the
    global random state of the CPU and of the model's device is left as it was.
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
    device = model.device
    accelerator = None if device.type == "cpu" else torch.get_device_module(device)
    devices = [] if accelerator is None else [accelerator.current_device() if device.index is None else device.index]
    was_training = model.training
    correct = []
    with torch.random.fork_rng(devices=devices, device_type="cuda" if accelerator is None else device.type):
        torch.default_generator.manual_seed(seed)
        if accelerator is not None:
            accelerator.manual_seed(seed)
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
                ).to(device)
                ids = model.generate(
                    input_ids=prompts.input_ids, attention_mask=prompts.attention_mask, generation_config=options
                )
                texts = tokenizer.batch_decode(ids[:, prompts.input_ids.shape[1] :], skip_special_tokens=True)
                correct += [is_correct(text, row["answer"]) for text, row in zip(texts, batch, strict=True)]
        finally:
            model.train(was_training)
    return np.array(correct).reshape(len(problems), samples_per_problem)
