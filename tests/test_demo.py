"""The embedded demo's pieces: the task and its teacher, sampling, standard errors, the table and the figure."""

import json
import random
import re
import struct

import numpy as np
import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Qwen2Config, Qwen2ForCausalLM

from redi_train import plots
from redi_train.data import tokenize_rows
from redi_train.demo import (
    DemoSettings,
    StageResult,
    demo_dataset,
    extract_answer,
    is_correct,
    make_demo_model,
    make_problems,
    pair_logps,
    paired_difference,
    pass_at_1,
    results_table,
    sample_pass_at_1,
    teacher_trace,
)
from redi_train.model import prepare_model
from redi_train.tiny import word_tokenizer

SMALL = DemoSettings(num_train=300, num_heldout=60)


def slips(problem, trace):
    """Wrong differences in a trace, by a reader of its own; None when a line does not follow from the one before."""
    terms = [int(digit) for digit in re.fullmatch(r"(\d(?:-\d)*)=\?\n", problem)[1].split("-")]
    *lines, last = trace.split("\n")
    assert len(lines) == len(terms) - 1
    carried, wrong = terms[0], 0
    for term, line in zip(terms[1:], lines, strict=True):
        a, b, result = map(int, re.fullmatch(r"\|(\d)-(\d)\|=(\d)", line).groups())
        assert (a, b) == (carried, term)
        wrong += abs(a - b) != result
        carried = result
    assert last == f"A: {'even' if carried % 2 == 0 else 'odd'}"
    return wrong


def test_problems_are_distinct_seeded_and_have_the_right_answer():
    problems = make_problems(500, seed=3, num_terms=4)
    assert len({row["problem"] for row in problems}) == 500
    assert problems == make_problems(500, seed=3, num_terms=4)
    assert problems != make_problems(500, seed=4, num_terms=4)
    for row in problems:
        terms = [int(digit) for digit in row["problem"].removesuffix("=?\n").split("-")]
        assert len(terms) == 4
        # |a-b| is as even as a+b, so the answer is that of the sum.
        assert row["answer"] == ("even" if sum(terms) % 2 == 0 else "odd")
    assert len(make_problems(100, seed=0, num_terms=2)) == 100
    with pytest.raises(ValueError, match="only 100 different problems of 2 digits, not 101"):
        make_problems(101, seed=0, num_terms=2)


def test_teacher_without_slips_writes_the_documented_trace():
    assert teacher_trace("3-8-2-7=?\n", 0.0, random.Random(0)) == "|3-8|=5\n|5-2|=3\n|3-7|=4\nA: even"


def test_teacher_slips_at_the_rate_it_is_told():
    rng = random.Random(0)
    problems = make_problems(1000, seed=0)
    wrong = sum(slips(row["problem"], teacher_trace(row["problem"], 0.2, rng)) for row in problems)
    # 5000 differences: binomial, 4 sigma = 4 * sqrt(5000 * 0.2 * 0.8) = 113.
    assert abs(wrong - 1000) < 113
    assert all(slips(row["problem"], teacher_trace(row["problem"], 1.0, rng)) == 5 for row in problems)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("|3-8|=5\nA: odd", "odd"),
        ("A: even\nA:  odd \n", "odd"),  # the last one counts
        ("A: oddA: ", ""),
        ("A: even|", "even|"),
        ("|3-8|=5\nodd", None),
        ("", None),
    ],
)
def test_answer_is_what_follows_the_last_marker(text, answer):
    assert extract_answer(text) == answer
    assert is_correct(text, "odd") == (answer == "odd")


def test_slips_hide_in_positives_and_abound_in_negatives():
    train, heldout = demo_dataset(0, SMALL)
    assert (len(train), len(heldout)) == (300, 60)
    assert not {row["problem"] for row in train} & {row["problem"] for row in heldout}
    assert (train, heldout) == demo_dataset(0, SMALL)
    counts = [
        [slips(row["problem"], trace) for row in demo_dataset(seed, SMALL)[0] for trace in row["generations"]]
        for seed in (0, 1)
    ]
    assert counts[0] != counts[1]  # another seed is another teacher, not only other problems
    positives, negatives = [], []
    for row in train + heldout:
        assert len(row["generations"]) == len(row["correct"]) == 4
        for trace, correct in zip(row["generations"], row["correct"], strict=True):
            assert correct == trace.endswith(f"A: {row['answer']}")
            (positives if correct else negatives).append(slips(row["problem"], trace))
    assert min(negatives) >= 1
    # Five of the nine wrong digits change the answer, or four. At a rate of 0.2 over 5 differences the share of right
    # traces lies between (1 + (1 - 0.4 * 5/9)**5) / 2 = 0.64 and (1 + (1 - 0.4 * 4/9)**5) / 2 = 0.69. 0.8**5 = 0.33
    # have no slip, so of the right ones 0.49 to 0.53 have some. 1440 traces: 4 sigma = 0.05; 960 of them: 0.065.
    assert 0.58 < len(positives) / 1440 < 0.75
    assert 0.42 < np.mean(np.array(positives) > 0) < 0.60
    assert np.mean(negatives) > 1.5 * np.mean(positives)


def test_every_trace_of_the_demo_has_the_same_tokens_and_fits():
    settings = DemoSettings(num_train=20, num_heldout=0)
    model, tokenizer = make_demo_model(settings, seed=0)
    rows, _ = demo_dataset(0, settings)
    texts = [row["problem"] + trace for row in rows for trace in row["generations"]]
    ids = tokenizer(texts).input_ids
    assert [tokenizer.decode(row) for row in ids] == texts
    assert len(set(map(len, ids))) == 1
    # As data.py tokenises them, apart, they are the same tokens.
    prompt, trace = rows[0]["problem"], rows[0]["generations"][0]
    completion = tokenizer(trace).input_ids
    assert tokenizer(prompt).input_ids + completion == ids[0]
    assert len(completion) + 1 <= settings.max_new_tokens <= len(completion) + 10
    assert 0.3e6 < model.num_parameters() < 0.4e6
    # A step of either stage is one packed forward.
    length = len(ids[0]) + 1
    assert length * max(settings.sft_batch_size, 2 * settings.redi_batch_size) <= settings.max_tokens


# A model whose next token depends on the last alone, with known probabilities, so that samples can be checked.
ANSWERS = [f"w{i:03d}" for i in range(80)]
CHAIN_WORDS = ["?", "A:", "#", *ANSWERS]


def chain_model(logits):
    """(model, tokenizer): after "?" comes "A:", after "A:" an answer by `logits` (80,), after an answer EOS, and after
    anything else, padding and EOS included, "#"."""
    tokenizer = word_tokenizer(CHAIN_WORDS)
    size = len(tokenizer) + len(tokenizer) % 2
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=size,
        intermediate_size=4,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        tie_word_embeddings=False,
    )
    model = Qwen2ForCausalLM(config)
    ids = {word: tokenizer.convert_tokens_to_ids(word) for word in CHAIN_WORDS}
    answers = [ids[word] for word in ANSWERS]
    table = torch.full((len(tokenizer), len(tokenizer)), -1e4)  # [last, next]
    table[:, ids["#"]] = 0.0
    table[ids["?"]] = -1e4
    table[ids["?"], ids["A:"]] = 0.0
    table[ids["A:"]] = -1e4
    table[ids["A:"], answers] = torch.as_tensor(logits, dtype=torch.float32)
    table[answers] = -1e4
    table[answers, tokenizer.eos_token_id] = 0.0
    with torch.no_grad():
        for parameter in model.model.layers.parameters():
            parameter.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(len(tokenizer), size))
        # The final norm turns the one-hot embedding into sqrt(size) times it.
        model.lm_head.weight.copy_(torch.nn.functional.pad(table.T, (0, size - len(tokenizer))) / size**0.5)
    return model, tokenizer


def sample(model, tokenizer, problems, **changes):
    options = {"temperature": 1.0, "samples_per_problem": 1, "seed": 0, "batch_size": 1000, "max_new_tokens": 6}
    return sample_pass_at_1(model, tokenizer, problems, **(options | changes))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_samples_follow_the_models_distribution_at_the_temperature(temperature):
    logits = np.concatenate([[3.0], np.linspace(0.0, -0.2, 79)])
    model, tokenizer = chain_model(logits)
    p = np.exp(logits / temperature) / np.exp(logits / temperature).sum()
    # Prompts of several lengths: padded on the right, generation would go on from padding, which leads to "#".
    first = [{"problem": "#" * (i % 3) + "?", "answer": ANSWERS[0]} for i in range(20)]
    right = sample(model, tokenizer, first, temperature=temperature, samples_per_problem=100).mean()
    # 0.85, 0.22 and 0.05 at the three temperatures; binomial, 2000 samples.
    assert right == pytest.approx(p[0], abs=4.5 * np.sqrt(p[0] * (1 - p[0]) / 2000))
    # The 30 least likely answers, 100 samples for each: top-k 50, Transformers' default, would leave none.
    tail = [{"problem": "?", "answer": word} for word in ANSWERS[50:]]
    right = sample(model, tokenizer, tail, temperature=temperature, samples_per_problem=100, seed=1).sum()
    mean = 100 * p[50:].sum()
    assert right == pytest.approx(mean, abs=4.5 * np.sqrt(mean))


def test_verdicts_are_in_the_order_of_the_problems_whatever_the_batch():
    logits = np.full(80, -1e4)
    logits[7] = 0.0
    model, tokenizer = chain_model(logits)
    problems = [{"problem": "?", "answer": "w007" if i % 3 == 0 else "w008"} for i in range(7)]
    expected = np.array([[i % 3 == 0] * 4 for i in range(7)])
    for batch_size in (1, 5, 100):
        correct = sample(model, tokenizer, problems, samples_per_problem=4, batch_size=batch_size)
        assert correct.dtype == bool
        np.testing.assert_array_equal(correct, expected)


def test_samples_follow_from_the_seed_and_leave_no_trace():
    model, tokenizer = chain_model(np.zeros(80) + 3.0 * (np.arange(80) == 0))
    problems = [{"problem": "?", "answer": "w000"}] * 40
    results = []
    for mode in (True, False):
        model.train(mode)
        torch.manual_seed(int(mode))
        np.random.seed(int(mode))
        random.seed(int(mode))
        before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
        results.append(sample(model, tokenizer, problems, samples_per_problem=5))
        assert all(module.training == mode for module in model.modules())
        assert torch.equal(torch.get_rng_state(), before[0])
        assert np.array_equal(np.random.get_state()[1], before[1])
        assert random.getstate() == before[2]
    np.testing.assert_array_equal(*results)
    assert 0 < results[0].mean() < 1
    assert (sample(model, tokenizer, problems, samples_per_problem=5, seed=1) != results[0]).any()


def test_model_is_back_in_training_mode_after_an_error():
    model, tokenizer = chain_model(np.zeros(80))
    model.train()
    state = torch.get_rng_state()
    with pytest.raises(ValueError, match="temperature"):
        sample(model, tokenizer, [{"problem": "?", "answer": "w000"}], temperature=-1.0)
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)


def test_sampling_settings_do_not_come_from_the_models_generation_config():
    logits = np.linspace(0.0, -2.0, 80)
    model, tokenizer = chain_model(logits)
    model.generation_config.top_k = 1  # as a model from the Hub may have it
    model.generation_config.top_p = 0.01
    problems = [{"problem": "?", "answer": word} for word in ANSWERS[1:]]
    assert sample(model, tokenizer, problems, samples_per_problem=20).any()


def test_pair_logps_are_those_of_the_full_logits():
    settings = DemoSettings(num_train=40, num_heldout=0, num_terms=3)
    model, tokenizer = make_demo_model(settings, seed=1)
    rows, _ = demo_dataset(2, settings)
    tokenized, _ = tokenize_rows(Dataset.from_list(rows), tokenizer, "redi")
    expected = {"chosen_ids": [], "rejected_ids": []}
    with torch.no_grad():
        for row in tokenized:
            for name, means in expected.items():
                ids = torch.tensor([row["prompt_ids"] + row[name]])
                logps = model(ids).logits[0, len(row["prompt_ids"]) - 1 : -1].double().log_softmax(-1)
                means.append(logps.gather(-1, torch.tensor(row[name])[:, None]).mean().item())
    prepare_model(model)
    model.train()
    found = pair_logps(model, tokenized, pairs_per_forward=7)
    assert model.training
    # fp32 logits of size 1: a few ulps in each token's log-probability.
    assert found == pytest.approx(tuple(np.mean(means) for means in expected.values()), abs=1e-5)


def test_standard_errors_by_hand():
    before = np.array([[1, 1], [1, 0], [0, 0], [0, 1]], dtype=bool)
    after = np.array([[1, 1], [1, 1], [0, 1], [1, 0]], dtype=bool)
    # Shares 1, 1/2, 0, 1/2: mean 1/2, variance (1/4 + 1/4) / 3, over 4 problems.
    assert pass_at_1(before) == pytest.approx((0.5, (0.5 / 3 / 4) ** 0.5))
    # Differences 0, 1/2, 1/2, 0: mean 1/4, variance 4 * (1/16) / 3.
    assert paired_difference(after, before) == pytest.approx((0.25, (0.25 / 3 / 4) ** 0.5))
    assert paired_difference(before, before) == (0.0, 0.0)
    with pytest.raises(ValueError, match="4 and 3 problems"):
        paired_difference(after, before[:3])


def test_standard_errors_are_the_spread_over_repetitions():
    rng = np.random.default_rng(0)
    means, claimed, differences, claimed_paired = [], [], [], []
    for _ in range(400):
        difficulty = rng.beta(2, 1, size=(100, 1))  # the same in both runs
        before = rng.random((100, 2)) < difficulty
        after = rng.random((100, 2)) < difficulty**0.5
        for lists, (mean, error) in (
            ((means, claimed), pass_at_1(before)),
            ((differences, claimed_paired), paired_difference(after, before)),
        ):
            lists[0].append(mean)
            lists[1].append(error)
    # The spread of 400 repetitions is itself known to 1/sqrt(800), 3.5%: 4 sigma are 14%.
    assert np.std(means) == pytest.approx(np.mean(claimed), rel=0.14)
    assert np.std(differences) == pytest.approx(np.mean(claimed_paired), rel=0.14)


def test_table():
    results = [
        StageResult("start", 0.0025, 0.0017, -3.0741, -3.0762),
        StageResult("after SFT", 0.778, 0.014, -0.111, -12.5),
    ]
    assert results_table(results).splitlines() == [
        "|           |        pass@1 | chosen LogPS | rejected LogPS |",
        "|-----------|--------------:|-------------:|---------------:|",
        "| start     | 0.003 ± 0.002 |       -3.074 |         -3.076 |",
        "| after SFT | 0.778 ± 0.014 |       -0.111 |        -12.500 |",
    ]


def write_metrics(path, stage, steps, lr):
    lines = [{"stage": stage, "step": 0, "pass_at_1": 0.1, "pass_at_1_se": 0.02}]
    for step in range(1, steps + 1):
        line = {"stage": stage, "step": step, "loss": 1.0, "chosen_logps": -3.0 / step, "step_size": lr * (step - 1)}
        lines.append(line | ({"rejected_logps": -0.2 - 0.01 * step} if stage == "redi" else {}))
    lines.append({"stage": stage, "step": steps, "pass_at_1": 0.7, "pass_at_1_se": 0.03})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def lines_of(ax):
    """The plotted series of a panel, without the boundary's dashed line."""
    return [line for line in ax.get_lines() if line.get_linestyle() == "-" and len(line.get_xdata()) > 1]


def test_figure_puts_stage_2_behind_stage_1(tmp_path, monkeypatch):
    figures = []
    draw = plots._draw
    monkeypatch.setattr(plots, "_draw", lambda records: figures.append(draw(records)) or figures[-1])
    paths = [write_metrics(tmp_path / "a", "sft", 40, 1e-3), write_metrics(tmp_path / "b", "redi", 20, 1e-5)]
    plots.plot_dynamics(paths, tmp_path / "two.png")
    both = tmp_path / "both"
    both.write_text(paths[0].read_text() + paths[1].read_text())
    plots.plot_dynamics(str(both), tmp_path / "one.png")
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()

    accuracy, chosen, rejected, step_size = figures[0].axes
    assert [ax.get_ylabel().split("\n")[0] for ax in figures[0].axes] == [
        "pass@1",
        "chosen LogPS",
        "rejected LogPS",
        "step size",
    ]
    for ax in figures[0].axes:
        (boundary,) = (line for line in ax.get_lines() if line.get_linestyle() == "--")
        assert list(boundary.get_xdata()) == [40, 40]
    assert [(list(line.get_xdata()), list(line.get_ydata())) for line in lines_of(accuracy)] == [
        ([0, 40], [0.1, 0.7]),
        ([40, 60], [0.1, 0.7]),
    ]
    bars = accuracy.containers[1].lines[2][0].get_segments()
    np.testing.assert_allclose(bars, [[[40, 0.08], [40, 0.12]], [[60, 0.67], [60, 0.73]]])
    raw, mean = lines_of(rejected)  # of stage 2 alone
    np.testing.assert_array_equal(raw.get_xdata(), np.arange(41, 61))
    np.testing.assert_allclose(mean.get_xdata()[[0, -1]], [50, 60])
    np.testing.assert_allclose(mean.get_ydata()[0], np.mean(raw.get_ydata()[:10]))
    # Here stage 2 starts at -3 too, so the axis goes down to it.
    assert chosen.get_ylim()[0] < -3
    assert step_size.get_yscale() == "log"


def test_chosen_axis_leaves_out_the_climb_of_stage_1(tmp_path, monkeypatch):
    figures = []
    draw = plots._draw
    monkeypatch.setattr(plots, "_draw", lambda records: figures.append(draw(records)) or figures[-1])
    path = write_metrics(tmp_path / "a", "sft", 40, 1e-3)
    redi = {"stage": "redi", "step": 1, "chosen_logps": -0.2, "step_size": 1e-6}
    path.write_text(path.read_text() + json.dumps(redi) + "\n")
    plots.plot_dynamics(path, tmp_path / "x.png")
    low, high = figures[0].axes[1].get_ylim()
    assert -0.25 < low < -0.2
    assert -0.075 < high < 0


@pytest.mark.parametrize("stage", ["sft", "redi"])
def test_figure_of_one_stage_is_a_png_and_tells_what_is_missing(stage, tmp_path, monkeypatch):
    figures = []
    draw = plots._draw
    monkeypatch.setattr(plots, "_draw", lambda records: figures.append(draw(records)) or figures[-1])
    plots.plot_dynamics(write_metrics(tmp_path / "a", stage, 3, 1e-3), tmp_path / "x.png")
    header = (tmp_path / "x.png").read_bytes()[:24]
    assert header[:8] == b"\x89PNG\r\n\x1a\n"
    assert struct.unpack(">II", header[16:]) == (1200, 780)
    texts = [[text.get_text() for text in ax.texts] for ax in figures[0].axes]
    assert texts == [[], [], [] if stage == "redi" else ["not logged"], []]
    assert not any(line.get_linestyle() == "--" for ax in figures[0].axes for line in ax.get_lines())


def test_figure_of_nothing_is_refused(tmp_path):
    (tmp_path / "a").write_text(json.dumps({"stage": "sft", "step": 1, "loss": 2.0}) + "\n")
    with pytest.raises(ValueError, match="nothing to draw"):
        plots.plot_dynamics(tmp_path / "a", tmp_path / "x.png")
    assert not (tmp_path / "x.png").exists()


@given(st.lists(st.lists(st.booleans(), min_size=3, max_size=3), min_size=2, max_size=6))
@settings(max_examples=40, deadline=None)
def test_pass_at_1_does_not_depend_on_the_order_of_samples(correct):
    correct = np.array(correct)
    assert pass_at_1(correct) == pytest.approx(pass_at_1(correct[::-1, ::-1]))
    assert pass_at_1(correct)[0] == pytest.approx(correct.mean())
