"""The demo from the command line's side, with its settings made tiny: files, table, reuse of stage 1, refusals."""

import json

import pytest

from redi_train.demo import DemoSettings
from redi_train.demo_run import run_demo
from redi_train.options import parse_options

TINY = DemoSettings(
    num_train=60,
    num_heldout=20,
    num_terms=3,
    slip_rate=0.4,
    hidden_size=16,
    num_hidden_layers=1,
    num_attention_heads=1,
    num_key_value_heads=1,
    intermediate_size=16,
    sft_epochs=4,
    sft_batch_size=16,
    sampling_steps=5,
)


def demo(tmp_path, *flags):
    run_demo(parse_options(["--output_dir", str(tmp_path), *flags]), TINY)


def metrics(tmp_path, stage):
    return [json.loads(line) for line in (tmp_path / stage / "metrics.jsonl").read_text().splitlines()]


def test_both_stages_then_what_they_leave(tmp_path, capsys):
    demo(tmp_path, "--stage", "redi", "--alpha", "0.5")
    printed = capsys.readouterr().out
    rows = [line for line in printed.splitlines() if line.startswith("| ")]
    assert [row.split(" | ")[0].strip("| ") for row in rows] == ["", "start", "after SFT", "after REDI, alpha 0.5"]
    assert (tmp_path / "dynamics.png").stat().st_size > 10_000

    sft, redi = metrics(tmp_path, "sft"), metrics(tmp_path, "redi")
    steps = [record["step"] for record in sft if "loss" in record]
    assert steps == list(range(1, 17))  # 60 sequences in batches of 16, 4 epochs; sampling takes no step's place
    assert [record["step"] for record in sft if "pass_at_1" in record] == [0, 5, 10, 15, 16]
    losses = [record["loss"] for record in sft if "loss" in record]
    assert losses[-1] < losses[0] - 0.1  # seen: 3.04 to 2.83 in 16 steps
    last = [record for record in redi if "loss" in record][-1]
    assert last["margin"] == pytest.approx(last["chosen_logps"] - last["rejected_logps"])
    # The table ends with what was sampled last.
    results = json.loads((tmp_path / "redi" / "results.json").read_text())
    assert sum(map(sum, results["correct"])) / 40 == pytest.approx(redi[-1]["pass_at_1"])

    with pytest.raises(ValueError, match="holds an earlier run"):
        demo(tmp_path, "--stage", "redi")


def test_stage_1_is_reused_only_where_it_is_this_demo_s(tmp_path, capsys):
    demo(tmp_path, "--stage", "sft")
    before = (tmp_path / "sft" / "metrics.jsonl").read_bytes()
    with pytest.raises(ValueError, match="seed 7"):
        demo(tmp_path, "--stage", "redi", "--seed", "7")
    demo(tmp_path, "--stage", "redi")
    assert (tmp_path / "sft" / "metrics.jsonl").read_bytes() == before
    assert "Stage 1 was finished before" in capsys.readouterr().out
