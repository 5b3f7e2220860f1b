"""Fine-tune an encoder for extractive question answering with PEFT: a start and an end in the passage.

    make qa                                              # LoRA on the default model and data
    make qa METHOD=prefix                                # or METHOD=adapter
    python examples/question_answering.py --model roberta-base --data questions.jsonl

The default data are 755 questions whose answer stands in the passage: enough to see the loss fall and spans come out,
too few for an accuracy. The program prints the loss and some decoded answers, saves what was trained to the folder
--out, and draws the loss to loss.png.
"""

import argparse
import math
import statistics
import sys
import warnings
from pathlib import Path

import _methods
import torch
from _assets import AssetError, Question, default_model, default_questions, read_questions
from matplotlib.figure import Figure
from peft import PeftModel, TaskType, get_peft_model
from rich.console import Console
from rich.table import Table
from tqdm.auto import tqdm
from transformers import (
    AutoModelForQuestionAnswering,
    AutoTokenizer,
    DataCollatorWithPadding,
    get_linear_schedule_with_warmup,
    logging,
    set_seed,
)

import peft_fast

SHOWN = 5

# peft 0.21 still reads this name, which transformers 5.23 renamed; nothing in this program can.
warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)


def parse_options(arguments: list[str] | None = None) -> argparse.Namespace:
    summary, _, rest = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", help="hub id or local folder of an encoder (default: the MiniLM that `make assets` fetched)")
    add(
        "--data",
        type=Path,
        help="JSONL with passage, question and answer, a string of the passage (default: fetched by `make qa`)",
    )
    add("--held-out", type=int, default=100, help="questions kept for evaluation (default: %(default)s)")
    add("--max-length", type=int, default=192, help="tokens at which a passage is cut (default: %(default)s)")
    _methods.add_options(parser)
    add("--batch-size", type=int, default=16, help="questions a step (default: %(default)s)")
    add("--epochs", type=int, default=3, help="passes over the training questions (default: %(default)s)")
    add("--seed", type=int, default=0, help="seed of weights, order and dropout (default: %(default)s)")
    add("--out", type=Path, help="folder for the results (default: out/qa-METHOD)")
    options = parser.parse_args(arguments)
    options.out = options.out or Path(f"out/qa-{options.method}")
    for name in ("held_out", "max_length", "batch_size", "epochs"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, it is {getattr(options, name)}")
    _methods.check_options(parser, options)
    return options


class Task:
    """The questions as tokens, with the tokens at which their answers start and end."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.model_name = options.model or default_model()
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(self.model_name)
        except (OSError, ValueError) as error:
            raise AssetError(f"cannot load the model {self.model_name}: {error}") from None
        self.collate = DataCollatorWithPadding(self.tokenizer)
        questions = read_questions(options.data) if options.data else default_questions()
        encoded = [row for row in map(self._encode, questions) if row is not None]
        if len(encoded) < options.held_out + options.batch_size:
            raise AssetError(
                f"{len(encoded)} questions have an answer within the first {options.max_length} tokens, too few for "
                f"--held-out {options.held_out} and a batch of {options.batch_size}"
            )
        self.held_out, self.train = encoded[: options.held_out], encoded[options.held_out :]

    def _encode(self, question: Question) -> dict | None:
        """None where the answer is cut off."""
        tokens = self.tokenizer(
            question.question, question.passage, truncation="only_second", max_length=self.options.max_length
        )
        inside = [i for i, sequence in enumerate(tokens.sequence_ids()) if sequence == 1]
        first = tokens.char_to_token(question.start, sequence_index=1)
        last = tokens.char_to_token(question.start + len(question.answer) - 1, sequence_index=1)
        if first is None or last is None or not inside:
            return None
        return {**tokens, "start_positions": first, "end_positions": last, "passage": (inside[0], inside[-1])}

    def build_model(self) -> PeftModel:
        options = self.options
        set_seed(options.seed)
        verbosity = logging.get_verbosity()
        logging.set_verbosity_error()  # the head is new on purpose
        logging.disable_progress_bar()
        base_model = AutoModelForQuestionAnswering.from_pretrained(self.model_name, dtype=torch.float32)
        logging.set_verbosity(verbosity)
        model = get_peft_model(base_model, _methods.peft_config(options, TaskType.QUESTION_ANS, options.dropout))
        peft_fast.patch(model)
        return model

    def batches(self, rows: list[dict]) -> list[dict[str, torch.Tensor]]:
        size = self.options.batch_size
        rows = [{key: value for key, value in row.items() if key != "passage"} for row in rows]
        return [dict(self.collate(rows[i : i + size])) for i in range(0, len(rows), size)]


def train(task: Task, model: PeftModel) -> list[float]:
    """The loss of every step."""
    options = task.options
    steps = options.epochs * math.ceil(len(task.train) / options.batch_size)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=options.lr, weight_decay=0.0)
    schedule = get_linear_schedule_with_warmup(optimizer, 0, steps)
    losses: list[float] = []
    model.train()
    with tqdm(total=steps, desc=options.method, unit="step", dynamic_ncols=True) as bar:
        for epoch in range(options.epochs):
            order = torch.randperm(len(task.train), generator=torch.Generator().manual_seed(options.seed + epoch))
            for batch in task.batches([task.train[i] for i in order]):
                loss = model(**batch).loss
                loss.backward()
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
                losses.append(loss.item())
                bar.update()
                bar.set_postfix(loss=f"{losses[-1]:.3f}", refresh=False)
    return losses


@torch.no_grad()
def evaluate(task: Task, model: PeftModel) -> tuple[float, list[tuple[int, int]]]:
    """The loss on the held-out questions, and the span that the model gives for each, of positions in the passage."""
    model.eval()
    losses, spans = [], []
    rows = iter(task.held_out)
    for batch in task.batches(task.held_out):
        output = model(**batch)
        losses += [output.loss.item()] * len(batch["input_ids"])
        for start, end in zip(output.start_logits, output.end_logits, strict=True):
            spans.append(best_span(start, end, *next(rows)["passage"]))
    return statistics.fmean(losses), spans


def best_span(start: torch.Tensor, end: torch.Tensor, first: int, last: int, longest: int = 20) -> tuple[int, int]:
    """The pair of positions in first..last, end not before start, with the largest sum of logits."""
    start, end = start[first : last + 1], end[first : last + 1]
    scores = start[:, None] + end[None, :]
    allowed = torch.ones(scores.shape, dtype=torch.bool).triu().tril(longest - 1)
    row, column = divmod(int(scores.masked_fill(~allowed, -torch.inf).argmax()), len(start))
    return first + row, first + column


def show(task: Task, spans: list[tuple[int, int]]) -> None:
    table = Table("question", "answer", "decoded", title="Held-out questions")
    for row, (first, last) in list(zip(task.held_out, spans, strict=True))[:SHOWN]:
        ids = row["input_ids"]
        question = task.tokenizer.decode(ids[: ids.index(task.tokenizer.sep_token_id)], skip_special_tokens=True)
        answer = task.tokenizer.decode(ids[row["start_positions"] : row["end_positions"] + 1])
        table.add_row(question, answer, task.tokenizer.decode(ids[first : last + 1]))
    Console().print(table)


def draw_losses(path: Path, losses: list[float]) -> None:
    figure = Figure(figsize=(6, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.plot(range(1, len(losses) + 1), losses, color="C1")
    axes.set(xlabel="step", ylabel="training loss", title="Start and end of the answer, cross-entropy")
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150)


def main() -> None:
    options = parse_options()
    try:
        task = Task(options)
    except AssetError as error:
        raise SystemExit(f"error: {error}") from None
    options.out.mkdir(parents=True, exist_ok=True)
    print(f"{options.method}: {len(task.train)} questions to train on, {len(task.held_out)} held out")
    model = task.build_model()
    before, _ = evaluate(task, model)
    losses = train(task, model)
    after, spans = evaluate(task, model)
    model.save_pretrained(options.out)
    draw_losses(options.out / "loss.png", losses)
    show(task, spans)
    exact = sum(
        span == (row["start_positions"], row["end_positions"]) for row, span in zip(task.held_out, spans, strict=True)
    )
    print(f"held-out loss {before:.2f} before, {after:.2f} after; {exact} of {len(spans)} spans exact")
    print(f"Written to {options.out}: what was trained, and loss.png.")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("interrupted")
