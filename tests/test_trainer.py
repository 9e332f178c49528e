"""The training loop: one step however it is cut or spread over ranks, precision, what is logged, resume."""

import json
import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file

from redi_kernels import reference
from redi_train.data import tokenize_rows
from redi_train.model import load_model, prepare_model
from redi_train.options import RediArguments
from redi_train.tiny import make_tiny_model, train_tokenizer
from redi_train.trainer import RediTrainer, last_checkpoint

WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]


def pairs(n):
    """n preferences of uneven lengths."""
    return [
        {
            "prompt": " ".join(WORDS[: 1 + i % 4]),
            "chosen": " ".join(WORDS[i % 5 :] * (1 + i % 3)),
            "rejected": " ".join(WORDS[: 2 + i % 7]),
        }
        for i in range(n)
    ]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([" ".join(WORDS)], 300)


def make_model(tokenizer):
    return make_tiny_model(
        tokenizer,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=48,
    )


def make_trainer(tokenizer, output_dir, n=10, model=None, stage="redi", callbacks=(), **options):
    model = model or make_model(tokenizer)
    prepare_model(model)
    rows, _ = tokenize_rows(Dataset.from_list(pairs(n)), tokenizer, stage)
    args = RediArguments(
        output_dir=str(output_dir), stage=stage, disable_tqdm=True, **{"save_strategy": "no", "seed": 3} | options
    )
    return RediTrainer(model, args, rows, tokenizer, callbacks)


def metrics(folder):
    lines = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss" in line]


def formula(model, tokenizer, n, stage, alpha):
    """Loss and LogPS of all n pairs as one batch, each sequence through the model's own forward alone, in its dtype."""
    rows, _ = tokenize_rows(Dataset.from_list(pairs(n)), tokenizer, stage)
    logps = {"chosen_ids": [], "rejected_ids": []}
    lengths = []
    for row in rows:
        for name, values in logps.items():
            if row[name]:
                ids = torch.tensor([row["prompt_ids"] + row[name]])
                z = model(input_ids=ids).logits[0, len(row["prompt_ids"]) - 1 : -1].double()
                values.append(reference.token_logps(z, torch.tensor(row[name])).mean())
                lengths.append(len(row[name]))
    chosen = torch.stack(logps["chosen_ids"])
    if stage == "sft":
        return -(chosen * torch.tensor(lengths)).sum() / sum(lengths), chosen.mean(), None
    rejected = torch.stack(logps["rejected_ids"])
    return (-chosen + alpha * rejected).mean(), chosen.mean(), rejected.mean()


@pytest.mark.parametrize("stage", ["sft", "redi"])
def test_a_step_is_the_same_however_it_is_cut(tokenizer, tmp_path, monkeypatch, stage):
    """Gradients of one optimizer step in one forward, in many, and from the formula of the whole batch."""
    n, alpha, gradients, losses = 10, 0.3, [], []
    model = make_model(tokenizer).double()
    for max_tokens in (100_000, None):  # None is the longest row
        trainer = make_trainer(
            tokenizer, tmp_path, n, model, stage, alpha=alpha, global_batch_size=n, max_tokens=max_tokens
        )
        (step,) = trainer.get_train_dataloader()
        assert (len(step["forwards"]) == 1) == (max_tokens is not None)
        unsynchronised = []
        monkeypatch.setattr(trainer.accelerator, "no_sync", lambda _, seen=unsynchronised: nullcontext(seen.append(1)))
        model.zero_grad()
        losses.append(trainer.training_step(model, step))
        assert len(unsynchronised) == len(step["forwards"]) - 1
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
    model.zero_grad()
    loss, *_ = formula(model, tokenizer, n, stage, alpha)
    loss.backward()
    for name, parameter in model.named_parameters():
        scale = parameter.grad.abs().max().item()
        # float64 sums of some hundred terms in another order.
        torch.testing.assert_close(gradients[1][name], gradients[0][name], rtol=0, atol=1e-13 * max(1, scale), msg=name)
        torch.testing.assert_close(gradients[0][name], parameter.grad, rtol=0, atol=1e-13 * max(1, scale), msg=name)
    # The loss is summed up in float32: as many roundings as forwards.
    for value in losses:
        torch.testing.assert_close(value.double(), loss.detach(), rtol=n * 2**-23, atol=0)


@pytest.mark.parametrize("stage", ["sft", "redi"])
def test_what_is_logged_is_what_happened(tokenizer, tmp_path, stage):
    n = 10
    model = make_model(tokenizer)
    expected_loss, chosen, rejected = formula(model, tokenizer, n, stage, alpha=0.8)
    trainer = make_trainer(
        tokenizer,
        tmp_path,
        n,
        model,
        stage,
        global_batch_size=n,
        num_train_epochs=2,
        learning_rate=1e-3,
        warmup_steps=0,
    )
    trainer.train()
    first, second = metrics(tmp_path)
    assert (first["stage"], first["step"], second["step"]) == (stage, 1, 2)
    assert first["tokens_per_second"] > 0
    # float32: logits of a few nats, sums of ten sequences.
    assert first["loss"] == pytest.approx(expected_loss.item(), rel=1e-5)
    assert first["chosen_logps"] == pytest.approx(chosen.item(), rel=1e-5)
    assert first["learning_rate"] == 1e-3
    assert second["learning_rate"] == pytest.approx(5e-4)
    assert first["step_size"] == first["learning_rate"] * first["grad_norm"]
    if stage == "redi":
        assert first["rejected_logps"] == pytest.approx(rejected.item(), rel=1e-5)
        assert first["margin"] == first["chosen_logps"] - first["rejected_logps"]
    else:
        assert "rejected_logps" not in first
    assert second["chosen_logps"] > first["chosen_logps"]


def test_logs_of_several_steps_are_means_over_their_sequences(tokenizer, tmp_path):
    n = 10  # steps of 4, 4 and 2 pairs
    model = make_model(tokenizer)
    loss, chosen, rejected = formula(model, tokenizer, n, "redi", alpha=0.8)
    options = {"global_batch_size": 4, "logging_steps": 3, "learning_rate": 0.0, "weight_decay": 0.0}
    make_trainer(tokenizer, tmp_path, n, model, **options).train()
    (line,) = metrics(tmp_path)
    assert line["chosen_logps"] == pytest.approx(chosen.item(), rel=1e-5)
    assert line["rejected_logps"] == pytest.approx(rejected.item(), rel=1e-5)
    # Trainer's loss is the mean over steps, so not quite that of the pairs.
    assert line["loss"] == pytest.approx(loss.item(), rel=0.02)


def test_small_updates_reach_weights_of_a_bf16_checkpoint(tokenizer, tmp_path):
    for saved in (make_model(tokenizer).bfloat16(), tokenizer):
        saved.save_pretrained(tmp_path / "bf16")
    before = {name: p.clone() for name, p in load_model(str(tmp_path / "bf16")).named_parameters()}
    model = load_model(str(tmp_path / "bf16"))
    trainer = make_trainer(
        tokenizer, tmp_path, 10, model, global_batch_size=10, max_steps=20, learning_rate=1e-6, bf16=True
    )
    trainer.train()
    trainer.save_model(tmp_path / "saved")
    after = load_file(tmp_path / "saved" / "model.safetensors")
    changed = sum((after[name] != p).sum().item() for name, p in before.items() if name in after)
    assert changed > 0.99 * sum(p.numel() for name, p in before.items() if name in after)


def test_trained_16_bit_weights_are_refused(tokenizer, tmp_path):
    model = make_model(tokenizer)
    prepare_model(model)
    rows, _ = tokenize_rows(Dataset.from_list(pairs(3)), tokenizer, "redi")
    with pytest.raises(ValueError, match="is trained in bfloat16"):
        RediTrainer(model.bfloat16(), RediArguments(output_dir=str(tmp_path / "out")), rows, tokenizer)
    assert not (tmp_path / "out").exists()


def test_lora_over_frozen_bf16_weights_trains(tokenizer, tmp_path):
    for saved in (make_model(tokenizer).bfloat16(), tokenizer):
        saved.save_pretrained(tmp_path / "bf16")
    lora = {"r": 4, "target_modules": "all-linear"}
    model = load_model(str(tmp_path / "bf16"), dtype=torch.bfloat16, lora=lora)
    before = {name: p.clone() for name, p in model.named_parameters()}
    options = {
        "global_batch_size": 5,
        "max_steps": 8,
        "learning_rate": 1e-2,
        "bf16": True,
        "gradient_checkpointing": True,
    }
    make_trainer(tokenizer, tmp_path, 10, model, "sft", **options).train()
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {name for name in before if "lora_" in name}
    losses = [line["loss"] for line in metrics(tmp_path)]
    assert losses[-1] < losses[0] - 0.1


def test_resuming_within_an_epoch_equals_never_stopping(tokenizer, tmp_path):
    # 4 steps an epoch; the checkpoint is in the middle of the second.
    options = {"global_batch_size": 3, "num_train_epochs": 2, "learning_rate": 1e-2, "save_strategy": "steps"}
    make_trainer(tokenizer, tmp_path / "whole", 10, save_steps=6, **options).train()
    expected = metrics(tmp_path / "whole")
    assert len(expected) == 8
    checkpoint = tmp_path / "whole" / "checkpoint-6"

    resumed = make_trainer(tokenizer, tmp_path / "resumed", 10, save_steps=6, **options)
    # As if killed in step 8, after the log of step 7 and half a line more.
    lines = (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "resumed" / "metrics.jsonl").write_text("".join(lines[:7]) + '{"stage": "redi", "st')
    resumed.train(resume_from_checkpoint=str(checkpoint))
    got = metrics(tmp_path / "resumed")
    assert [line["step"] for line in got] == list(range(1, 9))
    for name in ("loss", "chosen_logps", "rejected_logps", "grad_norm", "learning_rate"):
        assert [line[name] for line in got] == [line[name] for line in expected], name
    final, undisturbed = (
        load_file(tmp_path / run / "checkpoint-8" / "model.safetensors") for run in ("resumed", "whole")
    )
    assert all(torch.equal(final[name], undisturbed[name]) for name in undisturbed)


def test_a_half_written_checkpoint_is_not_the_last(tmp_path):
    assert last_checkpoint(tmp_path) is None
    for step, state in ((5, '{"global_step": 5}'), (10, '{"global_step": 10}'), (15, '{"global_st'), (20, None)):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        if state:
            (folder / "trainer_state.json").write_text(state)
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-10"


# 7 rows in steps of 3, so the third step has one row for two ranks. SGD, because its update is linear in the gradient,
# where AdamW's first updates are its sign.
RANKS_WORKER = """
import sys
from pathlib import Path
sys.path[:0] = [{tests!r}, {root!r}]
import test_trainer
for stage in ("sft", "redi"):
    test_trainer.train_for_ranks(Path({folder!r}) / stage, stage)
"""


def train_for_ranks(folder, stage):
    tokenizer = train_tokenizer([" ".join(WORDS)], 300)
    options = {"global_batch_size": 3, "num_train_epochs": 1, "optim": "sgd", "learning_rate": 0.5, "warmup_steps": 0}
    trainer = make_trainer(tokenizer, folder, 7, stage=stage, **options)
    forwards = [len(step["forwards"]) for step in trainer.get_train_dataloader()]
    trainer.train()
    trainer.save_model()
    return forwards


def test_two_ranks_train_as_one(tmp_path):
    tests = Path(__file__).resolve().parent
    worker = tmp_path / "worker.py"
    worker.write_text(RANKS_WORKER.format(tests=str(tests), root=str(tests.parent), folder=str(tmp_path / "two")))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(worker)]
    subprocess.run(command, env=environment, check=True, timeout=300, capture_output=True)
    for stage in ("sft", "redi"):
        train_for_ranks(tmp_path / "one" / stage, stage)
        one, two = (load_file(tmp_path / ranks / stage / "model.safetensors") for ranks in ("one", "two"))
        start = make_model(train_tokenizer([" ".join(WORDS)], 300)).state_dict()
        assert max((one[name] - start[name]).abs().max() for name in one) > 0.01  # so that 1e-6 says something
        for name, weights in one.items():
            # Three updates of norm at most 0.5, each with float32 roundings of a gradient summed in another order.
            torch.testing.assert_close(two[name], weights, rtol=0, atol=1e-6, msg=name)
        for a, b in zip(*(metrics(tmp_path / ranks / stage) for ranks in ("one", "two")), strict=True):
            for name in ("loss", "chosen_logps", "grad_norm"):
                assert b[name] == pytest.approx(a[name], rel=1e-5, abs=1e-6), name


def test_batch_sizes_follow_from_the_global_one(tmp_path):
    assert RediArguments(output_dir=str(tmp_path), stage="sft").per_device_train_batch_size == 128
    args = RediArguments(output_dir=str(tmp_path), stage="redi", per_device_train_batch_size=32)
    assert (args.global_batch_size, args.gradient_accumulation_steps) == (32, 1)
    for option in ({"per_device_train_batch_size": 8}, {"gradient_accumulation_steps": 4}):
        with pytest.raises(ValueError, match=f"--{next(iter(option))} {next(iter(option.values()))} does not fit"):
            RediArguments(output_dir=str(tmp_path), **option)


def test_stages_have_the_papers_defaults(tmp_path):
    sft, redi = (RediArguments(output_dir=str(tmp_path), stage=stage) for stage in ("sft", "redi"))
    assert (sft.learning_rate, sft.num_train_epochs, sft.global_batch_size) == (5e-5, 5, 128)
    assert (redi.learning_rate, redi.num_train_epochs, redi.global_batch_size, redi.alpha) == (1e-6, 1, 32, 0.8)
    for args in (sft, redi):
        assert (args.adam_beta1, args.adam_beta2, args.adam_epsilon, args.weight_decay) == (0.9, 0.999, 1e-8, 1e-4)
        assert (args.max_grad_norm, args.warmup_steps, args.lr_scheduler_type, args.seed) == (1.0, 0.1, "linear", 42)
        assert (args.save_steps, args.logging_steps, args.report_to) == (200, 1, [])


def test_grad_tolerance_reaches_the_loss(tokenizer, tmp_path):
    """0.5 may change the gradient of the logits by half; "auto" is exact in float64, as is 0."""
    gradients = {}
    for tolerance in ("auto", "0", "0.5"):
        trainer = make_trainer(tokenizer, tmp_path, model=make_model(tokenizer).double(), grad_tolerance=tolerance)
        trainer.training_step(trainer.model, next(iter(trainer.get_train_dataloader())))
        gradients[tolerance] = trainer.model.get_output_embeddings().weight.grad
    assert torch.equal(gradients["auto"], gradients["0"])
    assert not torch.equal(gradients["0.5"], gradients["0"])
    for tolerance in ("-1", "1", "nan", "exact"):
        with pytest.raises(ValueError, match=r"--grad_tolerance must be auto or a number in \[0, 1\)"):
            RediArguments(output_dir=str(tmp_path), grad_tolerance=tolerance)


@pytest.mark.parametrize("alpha", [-0.1, 1.1, float("nan")])
def test_alpha_is_a_share(tmp_path, alpha):
    with pytest.raises(ValueError, match=r"--alpha must be in \[0, 1\]"):
        RediArguments(output_dir=str(tmp_path), alpha=alpha)


def test_options_that_contradict_the_loop_are_refused(tmp_path):
    for option in ({"dataloader_drop_last": True}, {"label_smoothing_factor": 0.1}, {"eval_strategy": "epoch"}):
        with pytest.raises(ValueError, match=f"--{next(iter(option))} cannot be set: "):
            RediArguments(output_dir=str(tmp_path), **option)
    with pytest.raises(ValueError, match="--report_to nosuch: there is no such"):
        RediArguments(output_dir=str(tmp_path), report_to="nosuch")
