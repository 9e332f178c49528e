"""Data: layouts, the chosen and rejected trace of a row, chat templates, what is dropped and what is refused."""

import json

import pytest
from datasets import Dataset

from redi_train.data import load_rows, recognise_layout, tokenize_rows
from redi_train.tiny import train_tokenizer

TRACES = [
    {"problem": "1+1?", "generations": ["", "", "three", "two", "2"], "correct": [True, False, False, True, True]},
    {"problem": "2+2?", "generations": ["four"], "correct": [True]},
    {"problem": "3+3?", "generations": ["", "seven"], "correct": [True, None]},
    {"problem": "", "generations": ["four", "five"], "correct": [True, False]},
]


@pytest.fixture(scope="module")
def chat():
    return train_tokenizer(["one two three four five six seven"], 300)


@pytest.fixture(scope="module")
def plain():
    return train_tokenizer(["one two three four five six seven"], 300, chat=False)


def decoded(tokenizer, row):
    return [tokenizer.decode(row[name]) for name in ("prompt_ids", "chosen_ids", "rejected_ids")]


def test_traces_take_the_first_correct_and_the_first_incorrect_generation(chat):
    kept, dropped = tokenize_rows(Dataset.from_list(TRACES), chat, "redi")
    assert [row["row"] for row in kept] == [0]
    assert decoded(chat, kept[0]) == [
        "<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n",
        "two<|im_end|>",
        "three<|im_end|>",
    ]
    # A null verdict is not correct, so row 2 has an incorrect trace, but its only correct one is empty.
    assert dropped == {"no incorrect trace": 1, "no correct trace": 1, "empty prompt": 1}


def test_sft_needs_no_incorrect_trace(chat):
    kept, dropped = tokenize_rows(Dataset.from_list(TRACES), chat, "sft")
    assert [row["row"] for row in kept] == [0, 1]
    assert decoded(chat, kept[1])[1:] == ["four<|im_end|>", ""]
    assert dropped == {"no correct trace": 1, "empty prompt": 1}


def test_counts_of_tokens_are_those_packed_and_those_labelled(chat):
    (pair,), _ = tokenize_rows(Dataset.from_list(TRACES[:1]), chat, "redi")
    lengths = [len(pair[name]) for name in ("prompt_ids", "chosen_ids", "rejected_ids")]
    assert pair["num_labelled"] == lengths[1] + lengths[2]
    assert pair["num_tokens"] == 2 * lengths[0] + lengths[1] + lengths[2]
    (single,), _ = tokenize_rows(Dataset.from_list(TRACES[:1]), chat, "sft")
    assert (single["num_labelled"], single["num_tokens"]) == (lengths[1], lengths[0] + lengths[1])


def test_without_a_template_it_is_prompt_completion_eos(plain):
    (row,), _ = tokenize_rows(Dataset.from_list(TRACES[:1]), plain, "redi")
    assert decoded(plain, row) == ["1+1?", "two<|endoftext|>", "three<|endoftext|>"]


USER, GOOD, BAD = (
    {"role": r, "content": c} for r, c in (("user", "1+1?"), ("assistant", "two"), ("assistant", "three"))
)


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
        {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"prompt": "1+1?", "chosen": [GOOD], "rejected": [BAD]},
        {"prompt": "1+1?", "chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"prompt": [USER], "chosen": [USER, GOOD], "rejected": [USER, BAD]},
    ],
    ids=["explicit", "implicit", "string prompt", "string prompt and whole conversations", "both"],
)
def test_conversational_preferences_are_the_same_as_traces(chat, row):
    rows = {name: value if isinstance(value, str) else list(value) for name, value in row.items()}
    (got,), _ = tokenize_rows(Dataset.from_list([rows]), chat, "redi")
    (expected,), _ = tokenize_rows(Dataset.from_list(TRACES[:1]), chat, "redi")
    assert got == expected


def test_plain_preferences_skip_the_template(chat):
    rows = [{"prompt": "1+1?", "chosen": "two", "rejected": "three"}]
    (row,), _ = tokenize_rows(Dataset.from_list(rows), chat, "redi")
    assert decoded(chat, row) == ["1+1?", "two<|im_end|>", "three<|im_end|>"]


def test_the_implicit_prompt_of_strings_is_what_they_share_less_a_space(plain):
    rows = [{"chosen": "Human: 1+1? two", "rejected": "Human: 1+1? seven"}]
    (row,), _ = tokenize_rows(Dataset.from_list(rows), plain, "redi")
    assert decoded(plain, row) == ["Human: 1+1?", " two<|endoftext|>", " seven<|endoftext|>"]


def test_a_trace_survives_character_for_character(chat):
    trace = "  <think>\n é 漢 \u200b</think>\n\n\t4 \n"
    rows = [{"problem": "2+2?", "generations": [trace], "correct": [True]}]
    (row,), _ = tokenize_rows(Dataset.from_list(rows), chat, "sft")
    assert chat.decode(row["chosen_ids"][:-1]) == trace
    assert row["chosen_ids"][-1] == chat.convert_tokens_to_ids("<|im_end|>")


def with_template(template):
    tokenizer = train_tokenizer(["one two three four five six seven"], 300)
    tokenizer.chat_template = template
    return tokenizer


SIMPLE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}: BODY{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant: {% endif %}"
)


@pytest.mark.parametrize(
    ("body", "end"),
    [
        (
            "{{ m['content'] | trim }} <|endoftext|>\n",
            "<|endoftext|>",
        ),  # trimming is no change: we use the trace itself
        ("{{ m['content'] }}\n", "<|im_end|>"),  # a turn that ends with no token ends with EOS
    ],
)
def test_the_end_of_turn_is_the_templates(body, end):
    tokenizer = with_template(SIMPLE.replace("BODY", body))
    rows = [{"problem": "2+2?", "generations": ["four \n"], "correct": [True]}]
    (row,), _ = tokenize_rows(Dataset.from_list(rows), tokenizer, "sft")
    assert tokenizer.decode(row["chosen_ids"]) == "four \n" + end


@pytest.mark.parametrize(
    "body",
    ["{{ m['content'].split('</think>')[-1] }}<|im_end|>", "<think></think>{{ m['content'] }}<|im_end|>"],
    ids=["drops thoughts", "adds thoughts"],
)
def test_a_template_that_changes_the_trace_is_refused(body):
    tokenizer = with_template(SIMPLE.replace("BODY", body))
    rows = [{"problem": "2+2?", "generations": ["<think>two and two</think>four"], "correct": [True]}]
    with pytest.raises(ValueError, match=r"row 0: the chat template .* changes what the assistant says"):
        tokenize_rows(Dataset.from_list(rows), tokenizer, "sft")


def test_messages_without_a_template_are_refused(plain):
    rows = [{"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}]
    with pytest.raises(ValueError, match="no chat template; give one with --chat_template"):
        tokenize_rows(Dataset.from_list(rows), plain, "redi")


def test_limits_count_the_end_of_turn_and_name_what_is_over(plain):
    rows = Dataset.from_list([{"prompt": "1+1?", "chosen": "2", "rejected": "4 4"}])  # digits are tokens of their own
    (row,), _ = tokenize_rows(rows, plain, "redi")
    prompt, longest = len(row["prompt_ids"]), len(row["rejected_ids"])
    assert (prompt, longest) == (4, 4)
    for limits, reason in (
        ({"max_prompt_length": 3}, "prompt over 3 tokens"),
        ({"max_completion_length": 3}, "completion over 3 tokens"),
    ):
        with pytest.raises(ValueError, match=f"no pair .* is left of 1 rows: 1 {reason}"):
            tokenize_rows(rows, plain, "redi", **limits)
    # Stage 1 looks at prompt + chosen only: 4 + 2.
    kept, _ = tokenize_rows(rows, plain, "sft", max_length=6, max_prompt_length=1, max_completion_length=1)
    assert len(kept) == 1
    with pytest.raises(ValueError, match=r"1 prompt \+ completion over 5 tokens"):
        tokenize_rows(rows, plain, "sft", max_length=5)


def test_verdicts_and_generations_must_match(chat):
    rows = [TRACES[0], {"problem": "2+2?", "generations": ["four"], "correct": [True, False]}]
    with pytest.raises(ValueError, match="row 1: 1 generations but 2 verdicts"):
        tokenize_rows(Dataset.from_list(rows), chat, "redi")


def test_an_unknown_layout_names_the_columns():
    with pytest.raises(ValueError, match="columns are answer, question; expected problem, generations and correct"):
        recognise_layout(["question", "answer"])


def test_files_are_read_and_what_cannot_be_is_said_in_a_sentence(tmp_path):
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, TRACES)))
    rows = load_rows(str(tmp_path / "a.jsonl"))
    assert [row["problem"] for row in rows] == ["1+1?", "2+2?", "3+3?", ""]
    rows.to_parquet(tmp_path / "a.parquet")
    assert load_rows(str(tmp_path / "a.parquet")).to_list() == rows.to_list()

    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "broken.jsonl").write_text('{"problem": "1+1?"\n')
    (tmp_path / "notes.txt").write_text("hello")
    for name, error, message in (
        ("absent.jsonl", FileNotFoundError, "does not exist"),
        ("empty.jsonl", ValueError, "is empty"),
        ("broken.jsonl", ValueError, "cannot load dataset"),
        ("notes.txt", ValueError, "ends in .jsonl, .json, .parquet"),
    ):
        with pytest.raises(error, match=message):
            load_rows(str(tmp_path / name))
