"""The demo's reading, cleaning and splitting of data, on small made files; the training itself is `make demo`."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


@pytest.fixture
def assets(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import _assets

    return _assets


ROWS = [('A fine film, "really".', "good"), ("Dull,\tlong", "bad"), ("Ça va", "good")]


def _write(path: Path) -> Path:
    if path.suffix == ".jsonl":
        path.write_text("\n".join(json.dumps({"text": t, "label": y}) for t, y in ROWS) + "\n\n", encoding="utf-8")
    else:
        delimiter = {".csv": ",", ".tsv": "\t"}[path.suffix]
        quoted = ['"{}"{}{}'.format(t.replace('"', '""'), delimiter, y) for t, y in ROWS]
        path.write_text("\n".join([f"text{delimiter}label", *quoted]) + "\n", encoding="utf-8-sig")
    return path


@pytest.mark.parametrize("kind", ["tsv", "csv", "jsonl"])
def test_read_rows(assets, tmp_path, kind):
    assert assets.read_rows(_write(tmp_path / f"data.{kind}"), "text", "label") == ROWS


@pytest.mark.parametrize("kind", ["tsv", "csv", "jsonl"])
def test_missing_column_is_named(assets, tmp_path, kind):
    with pytest.raises(assets.AssetError, match=r"row 1 has no column 'stars', only \['label', 'text'\]"):
        assets.read_rows(_write(tmp_path / f"data.{kind}"), "text", "stars")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.csv", None, "there is no data file"),
        ("data.txt", "text,label\n", r"ends in \.tsv, \.csv or \.jsonl"),
        ("data.jsonl", '{"text": "a", "label": 1}\n{', "line 2 is not JSON"),
        ("data.jsonl", "[1]", "line 1 is not a JSON object"),
        ("data.csv", "text,label\nshort", "row 1 has no column 'label'"),
        ("data.csv", "text,label\ngood,1\nbad, \n", "row 2 has an empty label"),
        ("data.csv", "text,label\n", "has no rows"),
        ("data.csv", b"text,label\ncaf\xe9,1\n", "not UTF-8"),
    ],
    ids=["missing", "unknown kind", "broken json", "json list", "short row", "empty label", "no rows", "latin-1"],
)
def test_unusable_file(assets, tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(assets.AssetError, match=message):
        assets.read_rows(tmp_path / name, "text", "label")


def test_numbers_become_labels(assets, tmp_path):
    (tmp_path / "data.jsonl").write_text('{"text": "a", "label": 0}\n{"text": "b", "label": 1}')
    assert assets.read_rows(tmp_path / "data.jsonl", "text", "label") == [("a", "0"), ("b", "1")]


def test_ratings_near_zero_are_dropped(assets):
    lines = ["1\t2.5\tGood.\r\n", "2\t-0.9\tSo so.\r\n", "3\t-1\tBad.\r\n", "4\t1.0\tNot bad.\r\n"]
    assert list(assets.parse_ratings(lines)) == [
        ("Good.", "positive"),
        ("Bad.", "negative"),
        ("Not bad.", "positive"),
    ]


def test_clean_keeps_the_first_of_each_text(assets):
    rows = [("Good  film", "good"), ("", "bad"), ("good film", "bad"), ("GOOD FILM\n", "bad"), ("Bad", "bad")]
    assert assets.clean(rows) == [("Good film", "good"), ("Bad", "bad")]


def test_no_held_out_text_is_trained_on(assets):
    # Every text comes three times, in another case each: split first and most would be on both sides.
    rows = [(form(f"Text number {i}"), "ab"[i % 2]) for i in range(40) for form in (str, str.upper, str.lower)]
    train, held_out = assets.split(rows, 10, seed=0)
    texts = [text.lower() for text, _ in train + held_out]
    assert (len(train), len(held_out), len(set(texts))) == (30, 10, 40)
    assert assets.split(rows, 10, seed=0) == (train, held_out)
    assert assets.split(rows, 10, seed=1) != (train, held_out)


def test_one_label_only(assets):
    with pytest.raises(assets.AssetError, match=r"at least two labels, the data have \['good'\]"):
        assets.split([("a", "good"), ("b", "good")], 1, seed=0)


def test_scores_are_not_classes(assets):
    with pytest.raises(assets.AssetError, match="3 labels for 3 different texts: these are scores"):
        assets.split([("a", "0.1"), ("b", "0.2"), ("c", "0.7")], 1, seed=0)


@pytest.mark.parametrize("held_out", [0, 2, 3])
def test_nothing_left_to_train_or_hold_out(assets, held_out):
    with pytest.raises(assets.AssetError, match=f"cannot hold out {held_out} of 2 different texts"):
        assets.split([("a", "good"), ("b", "bad"), ("B", "bad")], held_out, seed=0)


def _demo(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(EXAMPLES / "sentiment.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})


def test_help_explains_every_option():
    run = _demo("--help")
    assert (run.returncode, run.stderr) == (0, "")
    for option in (
        "model",
        "data",
        "method",
        "rank",
        "alpha",
        "style",
        "bottleneck-size",
        "prefix-length",
        "dropout",
        "lr",
        "batch-size",
        "epochs",
    ):
        assert f"--{option} " in run.stdout


def test_errors_are_one_line(tmp_path):
    run = _demo("--data", str(tmp_path / "none.csv"))
    assert (run.returncode, run.stdout) == (1, "")
    assert run.stderr == f"error: there is no data file {tmp_path / 'none.csv'}\n"


@pytest.mark.parametrize(
    ("passage", "answer", "found"),
    [
        ("It weighs 498 kJ \u00b7 mol \u2212 1 in all .", "498 kj\u00b7mol\u22121", "498 kJ \u00b7 mol \u2212 1"),
        ("Oxygen is O 2 .", "O2", "O 2"),
        ("Paris , then Paris", "paris", "Paris"),
        ("No such thing", "other", None),
        ("Anything", " ", None),
    ],
    ids=["symbols", "formula", "first", "none", "empty"],
)
def test_an_answer_is_found_in_its_passage(assets, passage, answer, found):
    span = assets.find_span(passage, answer)
    assert (span and passage[slice(*span)]) == found


def test_questions_without_a_span_are_left_out(assets, tmp_path):
    rows = [
        {"passage": "The film is fine .", "question": "How is it?", "answer": "Fine"},
        {"passage": "The film is fine .", "question": "Who made it?", "answer": "Nobody"},
    ]
    path = tmp_path / "questions.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    assert assets.read_questions(path) == [("The film is fine .", "How is it?", "fine", 12)]
    path.write_text(json.dumps(rows[1]))
    with pytest.raises(assets.AssetError, match="no answer is a part of its passage"):
        assets.read_questions(path)
    path.write_text(json.dumps({"passage": "a"}))
    with pytest.raises(assets.AssetError, match="row 1 has no text 'question', only \\['passage'\\]"):
        assets.read_questions(path)


def test_the_decoded_span_lies_in_the_passage_and_does_not_end_before_it_starts(assets):
    import question_answering
    import torch

    start, end = torch.zeros(8), torch.zeros(8)
    start[[0, 6]], end[[1, 3]] = torch.tensor([9.0, 5.0]), torch.tensor([9.0, 4.0])
    assert question_answering.best_span(start, end, 2, 7) == (6, 6)
    end[7] = 1
    assert question_answering.best_span(start, end, 2, 7) == (6, 7)
    end[3] = 8
    assert question_answering.best_span(start, end, 2, 7) == (2, 3)


@pytest.mark.parametrize("method", ["lora", "adapter", "prefix"])
def test_question_answering_with_each_method(assets, tmp_path, monkeypatch, capsys, method):
    """End to end on a tiny model, whose tokenizer tells no segments apart."""
    import question_answering
    import torch
    from transformers import BertConfig, BertModel, BertTokenizerFast

    words = [f"w{i}" for i in range(40)]
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "what", *words]))
    tokenizer = BertTokenizerFast(str(tmp_path / "vocab.txt"), model_input_names=["input_ids", "attention_mask"])
    tokenizer.save_pretrained(tmp_path / "model")
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    BertModel(BertConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(tmp_path / "model")
    draw = torch.Generator().manual_seed(0)
    with (tmp_path / "questions.jsonl").open("w") as file:
        for _ in range(24):
            passage = [words[i] for i in torch.randperm(40, generator=draw)[:12]]
            row = {"passage": " ".join(passage), "question": f"what {passage[0]}", "answer": " ".join(passage[3:5])}
            file.write(json.dumps(row) + "\n")
    arguments = ["--model", str(tmp_path / "model"), "--data", str(tmp_path / "questions.jsonl"), "--method", method]
    arguments += ["--held-out", "8", "--batch-size", "8", "--epochs", "1", "--out", str(tmp_path / "out")]
    monkeypatch.setattr("sys.argv", ["question_answering.py", *arguments])
    question_answering.main()
    printed = capsys.readouterr().out
    assert f"{method}: 16 questions to train on, 8 held out" in printed
    assert "of 8 spans exact" in printed
    assert {"adapter_config.json", "adapter_model.safetensors", "loss.png"} <= {
        p.name for p in (tmp_path / "out").iterdir()
    }


def test_question_answering_help():
    run = subprocess.run(
        [sys.executable, str(EXAMPLES / "question_answering.py"), "--help"], capture_output=True, text=True
    )
    assert (run.returncode, run.stderr) == (0, "")
    assert all(f"--{option} " in run.stdout for option in ("model", "data", "method", "prefix-length", "epochs"))
