"""From files of traces to token ids: which columns are there, what is the prompt, what is the completion.

Two layouts are recognised by their columns:

    traces      problem (str), generations (list of str), correct (list of bool): the first correct generation is the
                chosen trace, the first incorrect one the rejected trace
    preference  TRL's: prompt, chosen, rejected, as plain strings or as lists of {role, content} messages; without a
                prompt column, the prompt is what chosen and rejected have in common at their start

Stage 1 (sft) needs the chosen trace alone, stage 2 (redi) both. A row becomes prompt ids and completion ids, tokenised
apart. With a chat template (traces and messages), the prompt is the template up to and including the generation prompt
and the completion is the trace, character for character, plus the token with which the template ends a turn. Without
one, and for plain strings, it is prompt, completion, EOS.
"""

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import datasets
import numpy as np
from datasets import Dataset, Features, List, Value
from transformers import PreTrainedTokenizerBase

Stage = Literal["sft", "redi"]
Layout = Literal["traces", "preference"]
Prompt = str | list[dict[str, str]]

_FORMATS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}
_TOKENIZED = Features(
    {
        "row": Value("int64"),  # position in the data before anything was dropped, to name a row in messages
        "prompt_ids": List(Value("int32")),
        "chosen_ids": List(Value("int32")),
        "rejected_ids": List(Value("int32")),  # empty in stage 1
        "num_tokens": Value("int64"),  # as packed: every trace with its own copy of the prompt
        "num_labelled": Value("int64"),  # of them, those that carry a loss: the completions
        "dropped": Value("string"),  # why the row is left out; empty for the rows that are kept
    }
)


def load_rows(name: str, *, split: str = "train") -> Dataset:
    """The rows of a local .jsonl, .json or .parquet file, a folder of them, or a dataset of the Hub.

    Raises FileNotFoundError when a path does not exist, ValueError when it cannot be read or is empty.
    """
    path = Path(name).expanduser()
    file_format = _FORMATS.get(path.suffix)
    if not path.exists() and (file_format or name.startswith(("/", ".", "~"))):
        raise FileNotFoundError(f"dataset file {name} does not exist.")
    if path.is_file() and file_format is None:
        raise ValueError(f"cannot read {name}: a dataset file ends in {', '.join(_FORMATS)}.")
    if path.is_file() and path.stat().st_size == 0:
        raise ValueError(f"dataset {name} is empty.")
    try:
        if path.is_file():
            rows = datasets.load_dataset(file_format, data_files=str(path), split=split)
        else:
            rows = datasets.load_dataset(str(path) if path.is_dir() else name, split=split)
    except Exception as error:  # datasets raises its own, pyarrow's, the Hub's and the network's
        reason = error.__cause__ or error
        raise ValueError(f"cannot load dataset {name}, split {split!r}: {' '.join(str(reason).split())}") from error
    if len(rows) == 0:
        raise ValueError(f"dataset {name}, split {split!r}, is empty.")
    return rows


def recognise_layout(columns: Iterable[str]) -> Layout:
    """Which layout has these columns. Raises ValueError naming the columns seen and those expected."""
    columns = sorted(columns)
    if {"problem", "generations", "correct"} <= set(columns):
        return "traces"
    if {"chosen", "rejected"} <= set(columns):
        return "preference"
    raise ValueError(
        f"unknown data layout: the columns are {', '.join(columns)}; expected problem, generations and correct "
        "(traces) or prompt, chosen and rejected (preference)."
    )


def tokenize_rows(
    rows: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    stage: Stage,
    *,
    max_length: int = 32768,
    max_prompt_length: int = 800,
    max_completion_length: int = 19000,
    num_proc: int | None = None,
) -> tuple[Dataset, dict[str, int]]:
    """Token ids of the rows that `stage` can use, and how many rows were dropped for which reason.

    The dataset has the columns row, prompt_ids, chosen_ids, rejected_ids (empty in stage 1), num_tokens and
    num_labelled. A row is dropped when it lacks a trace the stage needs or its prompt is empty, and when it is over a
    limit, in tokens: max_length for prompt + completion in stage 1, max_prompt_length and max_completion_length (both
    traces) in stage 2.

    Raises ValueError for an unknown layout, malformed rows, a tokenizer without EOS or with a template that would
    change a trace, and when no row is left.
    """
    layout = recognise_layout(rows.column_names)
    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no EOS token, so no completion could end; set its eos_token.")
    limits = (
        {"length": max_length} if stage == "sft" else {"prompt": max_prompt_length, "completion": max_completion_length}
    )
    tokenized = rows.map(
        _tokenize_row,
        with_indices=True,
        remove_columns=rows.column_names,
        features=_TOKENIZED,
        num_proc=num_proc,
        desc="Tokenising",
        # `datasets` caches by these arguments, and by the name of the function, not its code.
        fn_kwargs={"tokenizer": tokenizer, "stage": stage, "layout": layout, "limits": limits, "code": _code_digest()},
    )
    reasons = np.array(list(tokenized["dropped"]))
    dropped = Counter(reasons[reasons != ""].tolist())
    kept = tokenized.select(np.flatnonzero(reasons == "")).remove_columns("dropped")
    if len(kept) == 0:
        what = "trace" if stage == "sft" else "pair of a correct and an incorrect trace"
        raise ValueError(f"no {what} is left of {len(rows)} rows: {describe_dropped(dropped)}.")
    return kept, dict(dropped)


def describe_dropped(dropped: dict[str, int]) -> str:
    """`{"no correct trace": 2, "prompt over 800 tokens": 1}` as "2 no correct trace, 1 prompt over 800 tokens"."""
    return ", ".join(f"{count} {reason}" for reason, count in sorted(dropped.items(), key=lambda item: -item[1]))


def _code_digest() -> str:
    return hashlib.sha256(Path(__file__).read_bytes()).hexdigest()


def _tokenize_row(
    row: dict[str, Any],
    index: int,
    *,
    tokenizer: PreTrainedTokenizerBase,
    stage: Stage,
    layout: Layout,
    limits: dict[str, int],
    code: str,
) -> dict[str, Any]:
    try:
        if layout == "traces":
            prompt, chosen, rejected = _read_traces(row, has_template=tokenizer.chat_template is not None)
        else:
            prompt, chosen, rejected = _read_preference(row)
        completions = [chosen] if stage == "sft" else [chosen, rejected]
        reason = _missing(prompt, completions)
        if reason:
            return _dropped(index, reason)
        prompt_ids, *completion_ids = encode(tokenizer, prompt, completions)
    except ValueError as error:
        raise ValueError(f"row {index}: {error}") from error
    longest = max(map(len, completion_ids))
    lengths = {"prompt": len(prompt_ids), "completion": longest, "length": len(prompt_ids) + longest}
    for what, limit in limits.items():
        if lengths[what] > limit:
            return _dropped(index, f"{'prompt + completion' if what == 'length' else what} over {limit} tokens")
    num_labelled = sum(map(len, completion_ids))
    return {
        "row": index,
        "prompt_ids": prompt_ids,
        "chosen_ids": completion_ids[0],
        "rejected_ids": completion_ids[1] if stage == "redi" else [],
        "num_tokens": len(completion_ids) * len(prompt_ids) + num_labelled,
        "num_labelled": num_labelled,
        "dropped": "",
    }


def _dropped(index: int, reason: str) -> dict[str, Any]:
    empty = {"prompt_ids": [], "chosen_ids": [], "rejected_ids": [], "num_tokens": 0, "num_labelled": 0}
    return {"row": index, **empty, "dropped": reason}


def _missing(prompt: Prompt, completions: Sequence[str | None]) -> str:
    if not prompt or (isinstance(prompt, list) and not prompt[-1]["content"]):
        return "empty prompt"
    for kind, completion in zip(("correct", "incorrect"), completions, strict=False):
        if not completion:
            return f"no {kind} trace"
    return ""


def _read_traces(row: dict[str, Any], has_template: bool) -> tuple[Prompt, str | None, str | None]:
    """The problem, its first correct and its first incorrect generation. A verdict of null is not correct."""
    problem, generations, correct = row["problem"] or "", row["generations"] or [], row["correct"] or []
    if len(generations) != len(correct):
        raise ValueError(f"{len(generations)} generations but {len(correct)} verdicts in correct.")
    chosen = next((text for text, verdict in zip(generations, correct, strict=True) if verdict and text), None)
    rejected = next((text for text, verdict in zip(generations, correct, strict=True) if not verdict and text), None)
    return ([{"role": "user", "content": problem}] if has_template and problem else problem), chosen, rejected


def _read_preference(row: dict[str, Any]) -> tuple[Prompt, str | None, str | None]:
    prompt, chosen, rejected = row.get("prompt"), row["chosen"], row["rejected"]
    if isinstance(chosen, str) and isinstance(rejected, str):
        if "prompt" in row:
            return prompt or "", chosen, rejected
        return _split_strings(chosen, rejected)
    if not chosen or not rejected:
        return prompt or "", None, None
    if isinstance(chosen, str) or isinstance(rejected, str):
        raise ValueError("one of chosen and rejected is a string, the other a list of messages.")
    *before, answer = _messages(chosen)
    *before_rejected, wrong_answer = _messages(rejected)
    if before != before_rejected:
        raise ValueError("chosen and rejected differ before their last message; only that one may differ.")
    if answer["role"] != "assistant" or wrong_answer["role"] != "assistant":
        raise ValueError("chosen and rejected must end with a message of the assistant.")
    if not before and isinstance(prompt, str):
        before = [{"role": "user", "content": prompt}]
    elif not before:
        before = _messages(prompt or [])
    elif isinstance(prompt, list) and _messages(prompt) != before[: len(prompt)]:
        before = [*_messages(prompt), *before]
    return before, answer["content"], wrong_answer["content"]


def _messages(messages: list[dict[str, Any]]) -> list[dict[str, str]]:
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise ValueError("a message must have a role and a content.")
        if message.get("tool_calls"):
            raise ValueError("messages with tool calls are not supported.")
    return [{"role": message["role"], "content": message.get("content") or ""} for message in messages]


def _split_strings(chosen: str, rejected: str) -> tuple[str, str, str]:
    """TRL's rule for an implicit prompt: what the two have in common, less a space at its end."""
    end = next(
        (i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), min(len(chosen), len(rejected))
    )
    if end and chosen[end - 1] == " ":
        end -= 1
    return chosen[:end], chosen[end:], rejected[end:]


def encode(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, completions: Sequence[str]) -> list[list[int]]:
    """Token ids of the prompt and of each completion, [prompt_ids, completion_ids, ...].

    A prompt of messages goes through the chat template, a string as it is. Raises ValueError when messages come without
    a template, or the template would change a completion or end a turn with anything but one token.
    """
    if isinstance(prompt, str):
        ids = tokenizer(prompt).input_ids  # with BOS where the tokenizer adds one
        if ids and ids[-1] == tokenizer.eos_token_id:
            ids = ids[:-1]
        ends = [tokenizer.eos_token_id] * len(completions)
        return [ids, *_with_ends(tokenizer, completions, ends)]
    if tokenizer.chat_template is None:
        raise ValueError("the data has messages but the tokenizer has no chat template; give one with --chat_template.")
    rendered = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
    ends = [_end_of_turn(tokenizer, prompt, rendered, text) for text in completions]
    return [_encode_text(tokenizer, rendered), *_with_ends(tokenizer, completions, ends)]


def _with_ends(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], ends: Sequence[int]) -> list[list[int]]:
    return [[*_encode_text(tokenizer, text), end] for text, end in zip(texts, ends, strict=True)]


def _encode_text(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False).input_ids


def _end_of_turn(tokenizer: PreTrainedTokenizerBase, prompt: list[dict[str, str]], rendered: str, trace: str) -> int:
    """The token with which the template ends an assistant turn that says `trace`; EOS when it ends it with none.

    White space around the trace may go (Llama's template trims it): the completion is made of the trace itself.
    """
    whole = tokenizer.apply_chat_template([*prompt, {"role": "assistant", "content": trace}], tokenize=False)
    turn = whole.removeprefix(rendered).lstrip()
    if not whole.startswith(rendered) or not turn.startswith(trace.strip()):
        raise ValueError(
            f"the chat template of {tokenizer.name_or_path or 'the tokenizer'} changes what the assistant says (some "
            "drop or add <think> parts), so the model would be used on other text than it is trained on; give another "
            "template with --chat_template."
        )
    end = turn.removeprefix(trace.strip()).lstrip()
    if not end:
        return tokenizer.eos_token_id
    ends = {token.content: i for i, token in tokenizer.added_tokens_decoder.items() if end.startswith(token.content)}
    if not ends:
        raise ValueError(f"the chat template ends a turn with {end!r}, which does not begin with a special token.")
    return ends[max(ends, key=len)]
