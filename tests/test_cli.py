"""`python -m redi_train`: help, recipes, errors in a sentence, both stages on real traces."""

import json
import os
import re
import subprocess
import sys
from itertools import islice
from pathlib import Path

import datasets
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from redi_train.__main__ import main
from redi_train.options import OptionParser, parse_options
from redi_train.tiny import make_tiny_model, train_tokenizer

REAL_TRACES = Path(__file__).resolve().parents[2] / "shared" / "data"
ROWS = [
    {"problem": f"{n}+{n}?", "generations": [f"{n} and {n} is {2 * n}", f"{n + 1}"], "correct": [True, False]}
    for n in range(9)
]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def model_folder(tmp_path):
    tokenizer = train_tokenizer([" ".join(row["generations"]) for row in ROWS], 300)
    model = make_tiny_model(tokenizer, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48)
    for saved in (model, tokenizer):
        saved.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def data_file(tmp_path):
    return write_rows(tmp_path / "traces.jsonl", ROWS)


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def metrics(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss" in line]


def refused(capsys, *words):
    """The sentence with which the command line is refused."""
    capsys.readouterr()
    assert main([str(word) for word in words]) == 2
    captured = capsys.readouterr()
    (line,) = captured.err.strip().splitlines()[-1:]
    assert line.startswith("redi_train: ")
    assert "Traceback" not in captured.err
    return line.removeprefix("redi_train: ")


def test_help_fits_a_screen_or_two_and_help_all_has_everything(capsys):
    with pytest.raises(SystemExit) as exit_info:
        main(["--help"])
    assert exit_info.value.code == 0
    short = capsys.readouterr().out
    assert len(short.splitlines()) < 90
    assert all(len(line) <= 120 for line in short.splitlines())
    with pytest.raises(SystemExit):
        main(["--help_all"])
    everything = capsys.readouterr().out
    flags = {action.option_strings[0] for action in OptionParser()._actions} - {"--no_adam"}
    listed = set(re.findall(r"^  (--\w+)", everything, re.MULTILINE))
    assert set(re.findall(r"^  (--\w+)", short, re.MULTILINE)) < listed
    assert {flag for flag in flags if not flag.startswith("--no_")} == listed


def test_a_recipe_gives_defaults_and_flags_win(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "stage: sft\nlearning_rate: 1e-6\nglobal_batch_size: 4\nbf16: true\nlora_target_modules: [q_proj, v_proj]\n"
        "lr_scheduler_kwargs: {power: 2}\nmax_steps: -1\nrun_name: null\n"
    )
    options = parse_options(["--config", str(recipe), "--global_batch_size", "8", "--output_dir", str(tmp_path)])
    training = options.training
    assert (training.stage, training.learning_rate, training.global_batch_size) == ("sft", 1e-6, 8)
    assert isinstance(training.learning_rate, float)  # YAML itself reads 1e-6 as a string
    assert training.bf16 is True
    assert training.use_cpu is not torch.accelerator.is_available()
    assert training.lr_scheduler_kwargs == {"power": 2}
    assert (training.max_steps, training.run_name) == (-1, None)
    assert options.model.lora_target_modules == ["q_proj", "v_proj"]
    assert options.given == {
        "stage",
        "learning_rate",
        "global_batch_size",
        "bf16",
        "lora_target_modules",
        "lr_scheduler_kwargs",
        "max_steps",
        "output_dir",
    }


def test_the_token_budget_defaults_to_the_longest_row_allowed(tmp_path):
    def budget(*words):
        return parse_options([*words, "--output_dir", str(tmp_path)]).training.max_tokens

    assert budget("--stage", "redi") == 2 * (800 + 19000)
    assert budget("--stage", "redi", "--max_prompt_length", "10", "--max_completion_length", "20") == 60
    assert budget("--stage", "sft") == 32768
    assert budget("--stage", "sft", "--max_tokens", "77") == 77


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--learning_rat", "1"], "unknown option --learning_rat; did you mean --learning_rate?"),
        (["--alph=0.5"], "unknown option --alph; did you mean --alpha?"),
        (["--alpha", "1.5"], r"--alpha must be in \[0, 1\], got 1.5"),
        (["--alpha", "nan"], r"--alpha must be in \[0, 1\], got nan"),
        (["--learning_rate", "fast"], "argument --learning_rate: invalid float value: 'fast'"),
        (["--stage", "dpo"], "argument --stage: .*'dpo'"),
        (["traces.jsonl"], "unexpected argument 'traces.jsonl'"),
        (["--global_batch_size", "0"], "--global_batch_size must be at least 1"),
        (["--max_length", "0"], "--max_length must be at least 1"),
        (["--config", "absent.yaml"], "absent.yaml"),
        (["--model_name_or_path", "MODEL"], "--dataset_name is missing"),
        (["--dataset", "DATA"], "--model_name_or_path is missing.* or train stage sft into OUT first"),
        (["--dataset", "absent.jsonl", "--model_name_or_path", "MODEL"], "absent.jsonl does not exist"),
        (["--dataset", "DATA", "--model_name_or_path", "./absent"], "no model folder ./absent"),
        (["--dataset", "OTHER", "--model_name_or_path", "MODEL"], "the columns are answer, question; expected problem"),
        (["--dataset", "EMPTY", "--model_name_or_path", "MODEL"], "is empty"),
        (["--dataset", "UNPAIRED", "--model_name_or_path", "MODEL"], "no pair .* is left of 2 rows: 2 no inc"),
        (["--dataset", "DATA", "--model_name_or_path", "MODEL", "--max_tokens", "9"], r"row \d of the data"),
        (["--dataset", "DATA", "--model_name_or_path", "MODEL", "--dtype", "bfloat16"], "would train 16-bit weights"),
        (["--dataset", "DATA", "--model_name_or_path", "MODEL", "--resume_from_checkpoint", "last"], "no compl"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_in_a_sentence_and_nothing_is_written(
    capsys, tmp_path, model_folder, data_file, words, sentence
):
    names = {
        "MODEL": model_folder,
        "DATA": data_file,
        "OTHER": write_rows(tmp_path / "other.jsonl", [{"question": "1+1?", "answer": "2"}]),
        "EMPTY": write_rows(tmp_path / "empty.jsonl", []),
        "UNPAIRED": write_rows(tmp_path / "unpaired.jsonl", [row | {"correct": [True, True]} for row in ROWS[:2]]),
    }
    out = tmp_path / "out"
    message = refused(capsys, *(names.get(word, word) for word in words), "--output_dir", out)
    assert re.search(sentence.replace("OUT", re.escape(str(out))), message), message
    assert not out.exists()


@pytest.mark.parametrize(
    ("recipe", "sentence"),
    [
        ("learning_rte: 1e-6", "recipe.yaml: unknown key learning_rte; did you mean learning_rate?"),
        ("learning_rate: fast", "recipe.yaml: argument --learning_rate: invalid float value: 'fast'"),
        ("learning_rate: [1", "recipe.yaml is not valid YAML: "),
        ("just text", "recipe.yaml must hold one `name: value` a line"),
    ],
)
def test_a_broken_recipe_is_named(capsys, tmp_path, recipe, sentence):
    (tmp_path / "recipe.yaml").write_text(recipe)
    assert sentence in refused(capsys, "--config", tmp_path / "recipe.yaml")


def test_an_earlier_run_is_not_overwritten_unless_asked(capsys, tmp_path, model_folder, data_file):
    out = tmp_path / "out"
    command = ["--dataset", data_file, "--model_name_or_path", model_folder, "--output_dir", out]
    command = [str(word) for word in [*command, "--stage", "redi", "--global_batch_size", 3, "--save_steps", 1]]
    assert main([*command, "--max_steps", "3"]) == 0
    written = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert "holds an earlier run: continue it with --resume_from_checkpoint last" in refused(capsys, *command)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == written

    assert main([*command, "--max_steps", "3", "--resume_from_checkpoint", "last"]) == 0  # nothing is left to do
    assert [line["step"] for line in metrics(out / "redi")] == [1, 2, 3]
    assert main([*command, "--max_steps", "2", "--overwrite_output_dir"]) == 0
    assert [line["step"] for line in metrics(out / "redi")] == [1, 2]
    assert {path.name for path in (out / "redi").glob("checkpoint-*")} == {"checkpoint-1", "checkpoint-2"}


def run(*words, cache):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_DATASETS_CACHE": str(cache), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "redi_train", *map(str, words)]
    root = Path(__file__).resolve().parents[1]
    return subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=300, check=True)


@pytest.mark.skipif(not REAL_TRACES.exists(), reason="the real traces (../shared/data) are not here")
def test_both_stages_on_real_traces(tmp_path):
    """A slice of GSM8K: 96 human solutions, then 64 problems with right and wrong model solutions."""
    slices = {}
    for name, count in (("gsm8k-train", 96), ("gsm8k-traces", 64)):
        with (REAL_TRACES / f"{name}.jsonl").open(encoding="utf-8") as file:
            slices[name] = [json.loads(line) for line in islice(file, count)]
        write_rows(tmp_path / f"{name}.jsonl", slices[name])
    texts = [text for rows in slices.values() for row in rows for text in (row["problem"], *row["generations"])]
    tokenizer = train_tokenizer(texts, 600)
    model = make_tiny_model(
        tokenizer, hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128
    )
    for saved in (model, tokenizer):
        saved.save_pretrained(tmp_path / "model")

    common = ["--output_dir", tmp_path / "out", "--max_prompt_length", 150, "--max_completion_length", 150, "--seed", 1]
    options = [
        "--max_length",
        300,
        "--global_batch_size",
        16,
        "--num_train_epochs",
        3,
        "--learning_rate",
        3e-3,
        "--bf16",
    ]
    start = ["--model_name_or_path", tmp_path / "model", "--dataset_name", tmp_path / "gsm8k-train.jsonl"]
    printed = run("--stage", "sft", *start, *common, *options, cache=tmp_path / "cache").stdout
    assert re.search(r"Training on \d\d of 96 rows; left out: \d+ prompt \+ completion over 300 tokens\.", printed)
    sft = metrics(tmp_path / "out" / "sft")
    assert sft[-1]["loss"] < sft[0]["loss"] - 1

    # Stage 2 finds the model of stage 1 in the same output folder.
    options = ["--global_batch_size", 8, "--learning_rate", 1e-3, "--alpha", 0.9]
    run("--stage", "redi", "--dataset", tmp_path / "gsm8k-traces.jsonl", *common, *options, cache=tmp_path / "cache")
    redi = metrics(tmp_path / "out" / "redi")
    assert redi[0]["chosen_logps"] > sft[0]["chosen_logps"] + 1
    for line in redi:
        assert line["loss"] == pytest.approx(-line["chosen_logps"] + 0.9 * line["rejected_logps"], abs=1e-4)
    assert redi[-1]["loss"] < redi[0]["loss"]

    for stage in ("sft", "redi"):
        folder = tmp_path / "out" / stage
        assert {"config.json", "model.safetensors", "tokenizer.json", "metrics.jsonl"} <= {
            p.name for p in folder.iterdir()
        }
        saved = AutoTokenizer.from_pretrained(folder)
        assert saved.chat_template == tokenizer.chat_template
        reloaded = AutoModelForCausalLM.from_pretrained(folder)
        assert reloaded.dtype == torch.float32
        packed = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="redi_varlen")
        ids = saved("Natalia sold clips to 48 of her friends", return_tensors="pt").input_ids
        torch.testing.assert_close(packed(ids).logits, reloaded(ids).logits)
