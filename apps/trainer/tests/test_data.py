"""Data: which rows make a unit, which tokens a unit has, how units are padded."""

from __future__ import annotations

import json
import logging
import random
from collections.abc import Mapping, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as arrow
import pyarrow.parquet as parquet
import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from veilspan.trainer.data import Records, collate, open_heldout, open_records
from veilspan.trainer.data.collate import IGNORE_INDEX
from veilspan.trainer.errors import DataError
from veilspan.trainer.recipe import Recipe, make_recipe
from veilspan.trainer.sections import Run
from veilspan.trainer.tokenizer import byte_tokenizer

TOKENIZER = byte_tokenizer()
BEGIN, END, PAD = 256, 257, 258

ROWS: list[dict[str, Any]] = [
    {"text": "alpha", "who": "zoe"},
    {"text": "", "who": "abe"},
    {"text": "β gamma", "who": "zoe"},
    {"text": None, "who": "max"},
    {"text": "delta\nepsilon", "who": "abe"},
]


def recipe(train: Path, **data: Any) -> Recipe:
    return make_recipe(
        {
            "model": {"config": {"model_type": "llama"}},
            "data": {
                "train": str(train),
                "unit": "record",
                "sequence_length": 16,
                "tokenizer": "bytes",
                **data,
            },
            "privacy": {
                "noise_multiplier": 1.0,
                "delta": 1e-5,
                "sampling_probability": 0.1,
                "steps": 1,
            },
            "run": {"folder": "runs/test"},
        }
    )


def open_with(train: Path, **data: Any) -> Records:
    return open_records(recipe(train, **data), TOKENIZER)


def text(records: Records, unit: int) -> str:
    """Return a unit as text, with | where a text ends."""
    tokens = [int(token) for token in records[unit]]
    return str(TOKENIZER.decode(tokens)).replace("<|begin|>", "").replace("<|end|>", "|")


def write_texts(folder: Path, files: Mapping[str, str]) -> Path:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, encoding="utf-8")
    return folder


def write_rows(folder: Path, kind: str, rows: Sequence[Mapping[str, Any]] = ROWS) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    if kind == "jsonl":
        path = folder / "rows.jsonl"
        lines = [json.dumps(row, ensure_ascii=False) for row in rows]
        path.write_text("\n\n".join(lines) + "\n", encoding="utf-8")
    elif kind == "parquet":
        path = folder / "rows.parquet"
        parquet.write_table(arrow.Table.from_pylist(list(rows)), path, row_group_size=2)
    else:
        path = folder / "rows"
        Dataset.from_list([dict(row) for row in rows]).save_to_disk(str(path))
    return path


KINDS = ["jsonl", "parquet", "dataset"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_format_yields_the_same_records(tmp_path: Path, kind: str):
    records = open_with(write_rows(tmp_path, kind))
    assert len(records) == len(ROWS)
    texts = [text(records, unit) for unit in range(len(records))]
    assert texts == ["alpha|", "", "β gamma|", "", "delta\nepsilon|"]
    assert records[0].dtype == np.int32
    assert list(records[0][[0, -1]]) == [BEGIN, END]


@pytest.mark.parametrize("kind", KINDS)
def test_any_order_of_access_gives_the_same_records(tmp_path: Path, kind: str):
    rows = [{"text": f"row {number}"} for number in range(23)]
    records = open_with(write_rows(tmp_path, kind, rows))
    order = random.Random(0).sample(range(23), 23)
    assert [text(records, unit) for unit in order] == [f"row {unit}|" for unit in order]


@pytest.mark.parametrize("kind", KINDS)
def test_pitfall_39_all_rows_of_a_user_are_one_record(tmp_path: Path, kind: str):
    path = write_rows(tmp_path, kind)
    records = open_with(path, unit="user", user_column="who", sequence_length=64)
    assert [text(records, unit) for unit in range(len(records))] == [
        "delta\nepsilon|",
        "",
        "alpha|β gamma|",
    ]


def test_a_byte_order_mark_is_no_text(tmp_path: Path):
    (tmp_path / "a.txt").write_bytes("\ufeffab\ufeff".encode())
    (tmp_path / "b.txt").write_bytes(b"")
    (tmp_path / "c.txt").write_bytes("\ufeff".encode())
    texts = open_records(recipe(tmp_path), TOKENIZER)
    tokens = [records.tolist() for records in (texts[0], texts[1], texts[2])]
    assert tokens == [[BEGIN, 97, 98, *"\ufeff".encode(), END], [], []]
    (tmp_path / "rows.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "ab"}\n')
    assert open_records(recipe(tmp_path / "rows.jsonl"), TOKENIZER)[0].tolist() == [
        BEGIN,
        97,
        98,
        END,
    ]


def test_pitfall_39_a_user_stays_one_record_however_rows_are_spread_over_files(tmp_path: Path):
    for number, rows in enumerate((ROWS[:2], ROWS[2:])):
        write_rows(tmp_path / f"part{number}", "jsonl", rows)
    settings = {"format": "jsonl", "unit": "user", "user_column": "who", "sequence_length": 64}
    records = open_with(tmp_path, **settings)
    assert len(records) == 3
    assert text(records, 2) == "alpha|β gamma|"


def test_numbers_may_name_users(tmp_path: Path):
    rows = [{"text": "a", "who": 7}, {"text": "b", "who": 12}, {"text": "c", "who": 7}]
    records = open_with(write_rows(tmp_path, "jsonl", rows), unit="user", user_column="who")
    assert [text(records, unit) for unit in range(len(records))] == ["b|", "a|c|"]


def test_pitfall_39_a_number_names_the_same_user_whatever_its_type(tmp_path: Path):
    for name, users in {"a": arrow.array([1, 2]), "b": arrow.array([2.0, 1.0])}.items():
        table = arrow.table({"text": [f"{name}1", f"{name}2"], "who": users})
        parquet.write_table(table, tmp_path / f"{name}.parquet")
    records = open_with(tmp_path, format="parquet", unit="user", user_column="who")
    assert [text(records, unit) for unit in range(len(records))] == ["a1|b2|", "a2|b1|"]


def test_pitfall_39_a_name_is_the_same_user_however_it_is_written(tmp_path: Path):
    users = ["Jos\u00e9", "Jose\u0301", " Jos\u00e9\n", "7", 7, 7.0]
    rows = [{"text": str(number), "who": user} for number, user in enumerate(users)]
    records = open_with(write_rows(tmp_path / "a", "jsonl", rows), unit="user", user_column="who")
    assert [text(records, unit) for unit in range(len(records))] == ["3|4|5|", "0|1|2|"]
    columns = [arrow.array([Decimal("7.00")]), arrow.array([b"7"]), arrow.array(["7"])]
    for number, column in enumerate(columns):
        table = arrow.table({"text": [str(number)], "who": column})
        parquet.write_table(table, tmp_path / f"{number}.parquet")
    records = open_with(tmp_path, format="parquet", unit="user", user_column="who")
    assert [text(records, unit) for unit in range(len(records))] == ["0|1|2|"]


@pytest.mark.parametrize("user", [{"id": 7}, [7]])
def test_pitfall_39_a_user_with_several_spellings_is_refused(tmp_path: Path, user: object):
    path = write_rows(tmp_path, "jsonl", [*ROWS, {"text": "x", "who": user}])
    with pytest.raises(DataError, match="'who' must hold texts or numbers"):
        open_with(path, unit="user", user_column="who")


@pytest.mark.parametrize("missing", [None, "", " ", float("nan")])
def test_a_row_without_a_user_is_refused(tmp_path: Path, missing: str | float | None):
    path = write_rows(tmp_path, "jsonl", [*ROWS, {"text": "x", "who": missing}])
    with pytest.raises(DataError, match="'who' names no user"):
        open_with(path, unit="user", user_column="who")


def test_pitfall_39_a_long_document_is_one_record_that_is_cut(tmp_path: Path):
    folder = write_texts(tmp_path, {"long.txt": "x" * 1000, "short.txt": "y"})
    records = open_with(folder, unit="document")
    assert len(records) == 2
    assert list(records[0]) == [BEGIN] + [ord("x")] * 15
    assert list(records[1]) == [BEGIN, ord("y"), END]


def test_no_unit_exceeds_the_sequence_length(tmp_path: Path):
    files = {f"{size:02}.txt": "z" * size for size in range(40)}
    records = open_with(write_texts(tmp_path, files))
    for size in range(40):
        assert len(records[size]) == (min(16, size + 2) if size else 0)


def test_files_are_read_in_the_order_of_their_names(tmp_path: Path):
    names = ["b/1.py", "a.py", "b/0.py", "B.py", "b.py", "skip/c.py", "note.txt"]
    write_texts(tmp_path, {name: name for name in names})
    records = open_with(tmp_path, pattern="**/*.py", exclude=["skip"])
    found = [text(records, unit).rstrip("|") for unit in range(len(records))]
    assert found == sorted(["B.py", "a.py", "b.py", "b/0.py", "b/1.py"])


def test_pitfall_39_a_file_with_several_names_is_one_record(tmp_path: Path):
    folder = write_texts(tmp_path / "texts", {"a.txt": "a", "deep/c.txt": "c"})
    (folder / "b.txt").symlink_to("a.txt")
    (folder / "d.txt").hardlink_to(folder / "a.txt")
    records = open_with(folder)
    assert [text(records, unit) for unit in range(len(records))] == ["a|", "c|"]


def test_a_tokenizer_that_cuts_at_the_left_changes_nothing_and_no_length_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    vocabulary = {"longest-word": 0, **{f"w{number}": number for number in range(1, 10)}, "?": 10}
    words = Tokenizer(WordLevel(vocabulary, unk_token="?"))
    words.pre_tokenizer = WhitespaceSplit()
    left = PreTrainedTokenizerFast(
        tokenizer_object=words,
        unk_token="?",
        truncation_side="left",
        model_max_length=3,
    )
    path = write_rows(tmp_path, "jsonl", [{"text": "w1 w2 w3 w4 w5 w6"}])
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    records = open_records(recipe(path, sequence_length=4), left)
    assert list(records[0]) == [1, 2, 3, 4]
    assert "sequence length" not in caplog.text


def test_what_the_run_writes_is_no_data(tmp_path: Path):
    folder = write_texts(tmp_path, {"a.txt": "a", "run/README.md": "no", "run.key": "no"})
    settings = recipe(folder, pattern="**/*", heldout_pattern="r*", heldout_is_public=True)
    inside = settings.model_copy(update={"run": Run(folder=folder / "run")})
    assert len(open_records(inside, TOKENIZER)) == 1
    with pytest.raises(DataError, match="has no rows"):
        open_heldout(inside, TOKENIZER)


@pytest.mark.parametrize("exclude", ["skip", "skip/**/*", "skip/deep/*.txt", "**/x.txt"])
def test_excluded_files_and_folders_are_left_out(tmp_path: Path, exclude: str):
    write_texts(tmp_path, {"keep.txt": "keep", "skip/deep/x.txt": "skip"})
    records = open_with(tmp_path, exclude=[exclude])
    assert [text(records, unit) for unit in range(len(records))] == ["keep|"]


def test_bytes_that_are_no_text_do_not_stop_a_run(tmp_path: Path):
    (tmp_path / "broken.txt").write_bytes(b"ab\xff\xfecd")
    (tmp_path / "fine.txt").write_bytes("é\r\n".encode())
    records = open_with(tmp_path)
    assert text(records, 0) == "ab\ufffd\ufffdcd|"
    assert text(records, 1) == "é\r\n|"


def test_a_parquet_column_of_categories_holds_text(tmp_path: Path):
    texts = arrow.array(["a", "b", "a", None]).dictionary_encode()
    parquet.write_table(arrow.table({"text": texts}), tmp_path / "rows.parquet")
    records = open_with(tmp_path / "rows.parquet")
    assert [text(records, unit) for unit in range(len(records))] == ["a|", "b|", "a|", ""]
    numbers = arrow.array([1, 2]).dictionary_encode()
    parquet.write_table(arrow.table({"text": numbers}), tmp_path / "rows.parquet")
    with pytest.raises(DataError, match="must hold text"):
        open_with(tmp_path / "rows.parquet")


def test_a_row_whose_text_is_no_unicode_does_not_stop_a_run(tmp_path: Path):
    (tmp_path / "rows.jsonl").write_text('{"text": "a\\ud83d\\ude00\\ud800b"}\n')
    cell = arrow.array([b"a\xff", None], type=arrow.binary())
    broken = arrow.table({"text": arrow.Array.from_buffers(arrow.string(), 2, cell.buffers())})
    parquet.write_table(broken, tmp_path / "rows.parquet")
    Dataset(broken).save_to_disk(str(tmp_path / "rows"))
    assert text(open_with(tmp_path / "rows.jsonl"), 0) == "a\U0001f600\ufffdb|"
    for name in ("rows.parquet", "rows"):
        records = open_with(tmp_path / name)
        assert [text(records, unit) for unit in range(2)] == ["a\ufffd|", ""]


def test_text_that_spells_a_special_token_stays_text(tmp_path: Path):
    records = open_with(write_texts(tmp_path, {"a.txt": "<|end|>"}))
    assert list(records[0]) == [BEGIN, *b"<|end|>", END]


def test_only_the_first_units_are_used_when_asked(tmp_path: Path):
    path = write_rows(tmp_path, "jsonl")
    assert len(open_with(path, max_records=2)) == 2
    assert len(open_with(path, max_records=99)) == 5
    users = open_with(path, max_records=1, unit="user", user_column="who")
    assert [text(users, unit) for unit in range(len(users))] == ["delta\nepsilon|"]


@pytest.mark.parametrize(("unit", "who"), [("document", None), ("user", "who")])
def test_sequences_of_a_unit_are_its_first_tokens_cut_and_no_token_is_in_two(
    tmp_path: Path, unit: str, who: str | None
):
    path = write_rows(tmp_path, "jsonl")
    settings = {"unit": unit, "sequence_length": 4}
    settings |= {} if who is None else {"user_column": who}
    whole = open_with(path, **{**settings, "sequence_length": 12})
    cut = open_with(path, **settings, sequences_per_unit=3)
    assert (cut.num_units, len(cut)) == (len(whole), 3 * len(whole))
    for number in range(len(whole)):
        parts = [cut[3 * number + place] for place in range(3)]
        assert list(np.concatenate(parts)) == list(whole[number])
        lengths = [len(part) for part in parts]
        assert max(lengths) <= 4
        assert lengths == sorted(lengths, reverse=True)  # only the end is missing
    assert any(len(cut[3 * number + 2]) == 0 for number in range(len(whole)))
    assert any(len(cut[3 * number + 2]) > 0 for number in range(len(whole)))


def test_a_batch_of_nothing_but_empty_sequences_has_no_label(tmp_path: Path):
    records = open_with(
        write_texts(tmp_path, {"a.txt": "ab", "b.txt": "cd"}),
        unit="document",
        sequences_per_unit=2,
    )
    batch = collate(records, [1, 3], pad_token_id=PAD)
    assert (batch.labels == IGNORE_INDEX).all()


def test_units_outside_of_the_data_do_not_exist(tmp_path: Path):
    records = open_with(write_rows(tmp_path, "jsonl"))
    for unit in (-1, 5):
        with pytest.raises(IndexError, match="there are 5"):
            records[unit]


def test_held_out_files_are_never_trained_on(tmp_path: Path):
    write_texts(tmp_path, {"a.txt": "a", "public/b.txt": "b", "public/c.txt": "c"})
    settings = recipe(tmp_path, heldout_pattern="public/*", heldout_is_public=True)
    trained, held = open_records(settings, TOKENIZER), open_heldout(settings, TOKENIZER)
    assert held is not None
    assert [text(trained, unit) for unit in range(len(trained))] == ["a|"]
    assert [text(held, unit) for unit in range(len(held))] == ["b|", "c|"]


def test_a_held_out_folder_inside_of_the_training_folder_is_never_trained_on(tmp_path: Path):
    write_texts(tmp_path, {"a.txt": "a", "public/b.txt": "b"})
    settings = recipe(tmp_path, heldout=str(tmp_path / "public"), heldout_is_public=True)
    trained, held = open_records(settings, TOKENIZER), open_heldout(settings, TOKENIZER)
    assert held is not None
    assert [text(trained, unit) for unit in range(len(trained))] == ["a|"]
    assert [text(held, unit) for unit in range(len(held))] == ["b|"]


@pytest.mark.parametrize("link", ["hardlink_to", "symlink_to"])
def test_a_held_out_file_is_never_trained_on_under_another_name(tmp_path: Path, link: str):
    train, public = tmp_path / "train", tmp_path / "public"
    write_texts(tmp_path, {"train/a.txt": "a", "train/b.txt": "b", "public/c.txt": "c"})
    getattr(public / "link.txt", link)(train / "b.txt")
    settings = recipe(train, heldout=str(public), heldout_is_public=True)
    trained, held = open_records(settings, TOKENIZER), open_heldout(settings, TOKENIZER)
    assert held is not None
    assert [text(trained, unit) for unit in range(len(trained))] == ["a|"]
    assert [text(held, unit) for unit in range(len(held))] == ["c|", "b|"]


def test_held_out_data_must_not_hold_the_training_data(tmp_path: Path):
    write_texts(tmp_path, {"private/a.txt": "a", "b.txt": "b"})
    settings = recipe(tmp_path / "private", heldout=str(tmp_path), heldout_is_public=True)
    with pytest.raises(DataError, match=r"lies inside data\.heldout"):
        open_records(settings, TOKENIZER)


def test_held_out_units_are_taken_at_even_distances(tmp_path: Path):
    train = write_texts(tmp_path / "train", {"a.txt": "a"})
    held = write_texts(tmp_path / "held", {f"{n}.txt": str(n) for n in range(10)})
    settings = recipe(train, heldout=str(held), heldout_is_public=True, heldout_records=5)
    records = open_heldout(settings, TOKENIZER)
    assert records is not None
    assert [text(records, unit) for unit in range(len(records))] == ["0|", "2|", "4|", "6|", "8|"]


def test_without_held_out_data_there_is_none(tmp_path: Path):
    write_texts(tmp_path, {"a.txt": "a"})
    assert open_heldout(recipe(tmp_path), TOKENIZER) is None


def test_units_are_padded_to_the_longest_of_them(tmp_path: Path):
    records = open_with(write_texts(tmp_path, {"a.txt": "aa", "b.txt": "b", "c.txt": ""}))
    batch = collate(records, np.array([1, 0, 2]), pad_token_id=PAD)
    assert batch.input_ids.tolist() == [
        [BEGIN, ord("b"), END, PAD],
        [BEGIN, ord("a"), ord("a"), END],
        [PAD, PAD, PAD, PAD],
    ]
    expected = batch.input_ids.masked_fill(batch.input_ids == PAD, IGNORE_INDEX)
    assert torch.equal(batch.labels, expected)


def test_lengths_are_rounded_up_where_a_layout_needs_it(tmp_path: Path):
    records = open_with(write_texts(tmp_path, {"a.txt": "aaa", "b.txt": ""}))
    assert collate(records, [0], multiple_of=4).input_ids.shape == (1, 8)
    assert collate(records, [1], multiple_of=4).input_ids.shape == (1, 4)
    assert collate(records, [1]).input_ids.shape == (1, 1)


def test_no_units_are_no_batch(tmp_path: Path):
    records = open_with(write_texts(tmp_path, {"a.txt": "a"}))
    with pytest.raises(ValueError, match="units is empty"):
        collate(records, [])


def test_pitfall_56_units_are_neither_sorted_nor_grouped_by_length(tmp_path: Path):
    records = open_with(write_texts(tmp_path, {f"{n}.txt": "x" * n for n in range(1, 9)}))
    order = [4, 0, 7, 2]
    lengths = (collate(records, order).labels != IGNORE_INDEX).sum(1)
    assert lengths.tolist() == [len(records[unit]) for unit in order]


def test_an_end_token_is_learned_only_where_a_text_ends(tmp_path: Path):
    records = open_with(write_texts(tmp_path, {"a.txt": "x" * 14, "b.txt": "x" * 15}))
    assert list(records[0]).count(END) == 1
    assert list(records[1]).count(END) == 0
