"""Fine-tune a text classifier with PEFT: LoRA twice, as it is and with `peft_fast.patch(model)`; or another method.

    make demo                                            # the default model and data, fetched once
    make demo METHOD=adapter                             # bottleneck adapters, which PEFT alone does not have
    make demo METHOD=prefix                              # a prefix in every attention layer
    python examples/sentiment.py --rank 16 --epochs 1    # the same with other settings
    python examples/sentiment.py --model roberta-base --data reviews.csv --label-column stars

Everything is ordinary Transformers and PEFT code but for one line, in `Task.build_model`. The two LoRA models start
from the same seed, see the same batches in the same order, and take turns, a quarter of an epoch each, so that a
machine that slows down slows both. What was trained is saved, and evaluated again in a new process. The program prints
one table and writes summary.json, loss.png and the adapters to the folder --out.
"""

import argparse
import math
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import _methods
import torch
import transformers
from _assets import AssetError, Row, default_model, default_rows, read_rows, split
from _report import Result, draw_losses, print_table, write_summary
from peft import PeftModel, TaskType, get_peft_model
from torch.utils.data import Subset
from tqdm.auto import tqdm
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
    get_linear_schedule_with_warmup,
    set_seed,
)
from transformers.trainer_callback import ProgressCallback

import peft_fast
from peft_fast.testing import saved_bytes

COMPARED_STEPS = 50  # steps without dropout over which the two loss curves are compared
TURNS = 4  # in an epoch, fewer where it is short
WARM_UP_STEPS = 5  # first steps of a turn that are left out of the timing

# peft 0.21 still reads this name, which transformers 5.23 renamed; nothing in this program can.
warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)


def parse_options(arguments: list[str] | None = None) -> argparse.Namespace:
    summary, _, rest = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "--model",
        help="hub id or local folder of an encoder (default: the MiniLM that `make assets` fetched)",
    )
    add("--data", type=Path, help="TSV or CSV with a header line, or JSONL (default: movie-review snippets)")
    add("--text-column", default="text", help="column of --data with the text (default: %(default)s)")
    add("--label-column", default="label", help="column of --data with the label (default: %(default)s)")
    add("--held-out", type=int, default=1000, help="different texts kept for evaluation (default: %(default)s)")
    add("--rows", type=int, default=3200, help="most rows to train on (default: %(default)s)")
    add("--max-length", type=int, default=64, help="tokens at which a text is cut (default: %(default)s)")
    _methods.add_options(parser)
    add("--batch-size", type=int, default=16, help="texts a step (default: %(default)s)")
    add("--epochs", type=int, default=2, help="passes over the training rows (default: %(default)s)")
    add("--seed", type=int, default=0, help="seed of split, weights, order and dropout (default: %(default)s)")
    add("--out", type=Path, help="folder for the results (default: out/demo, or out/demo-METHOD)")
    add("--evaluate", type=Path, metavar="FOLDER", help="do not train: print the held-out accuracy of a saved adapter")
    options = parser.parse_args(arguments)
    if options.out is None:
        options.out = Path("out/demo" if options.method == "lora" else f"out/demo-{options.method}")
    for name in ("held_out", "rows", "max_length", "batch_size", "epochs"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, it is {getattr(options, name)}")
    _methods.check_options(parser, options)
    return options


class Task:
    """The rows as tokens, and all that a Trainer needs to learn them."""

    def __init__(self, options: argparse.Namespace) -> None:
        rows = read_rows(options.data, options.text_column, options.label_column) if options.data else default_rows()
        train, held_out = split(rows, options.held_out, options.seed)
        train = train[: options.rows]
        if len(train) <= WARM_UP_STEPS * options.batch_size:
            raise AssetError(
                f"{len(train)} rows are {math.ceil(len(train) / options.batch_size)} steps an epoch, too few to time: "
                f"the first {WARM_UP_STEPS} do not count; take a smaller --batch-size or more rows"
            )
        self.options = options
        self.turns = max(1, min(TURNS, len(train) // (2 * WARM_UP_STEPS * options.batch_size)))
        self.model_name = options.model or default_model()
        self.labels = sorted({label for _, label in train + held_out})
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(self.model_name)
        except (OSError, ValueError) as error:
            raise AssetError(f"cannot load the model {self.model_name}: {error}") from None
        self.train = self._encode(train)
        # By length, so that a batch of evaluation carries little padding.
        self.held_out = sorted(self._encode(held_out), key=lambda row: len(row["input_ids"]))

    def _encode(self, rows: list[Row]) -> list[dict]:
        tokens = self.tokenizer([text for text, _ in rows], truncation=True, max_length=self.options.max_length)
        return [
            {**{key: tokens[key][i] for key in tokens}, "labels": self.labels.index(label)}
            for i, (_, label) in enumerate(rows)
        ]

    def parts(self, epoch: int) -> list[Subset]:
        """The training rows of an epoch in another order, cut into turns."""
        generator = torch.Generator().manual_seed(self.options.seed + epoch)
        order = torch.randperm(len(self.train), generator=generator)
        return [Subset(self.train, part.tolist()) for part in order.tensor_split(self.turns)]

    def base_model(self, *, dropout: bool = True) -> PreTrainedModel:
        """The pretrained encoder with a new classifier."""
        set_seed(self.options.seed)
        config = AutoConfig.from_pretrained(self.model_name, num_labels=len(self.labels))
        config.id2label = dict(enumerate(self.labels))
        config.label2id = {label: i for i, label in enumerate(self.labels)}
        if not dropout:
            for name, value in config.to_dict().items():
                if ("drop" in name) and isinstance(value, float):
                    setattr(config, name, 0.0)
        with _quiet_loading():
            model, report = AutoModelForSequenceClassification.from_pretrained(
                self.model_name, config=config, dtype=torch.float32, output_loading_info=True
            )
        missing = [key for key in report["missing_keys"] if key.startswith(f"{model.base_model_prefix}.")]
        if missing:
            print(f"Note: {self.model_name} has no weights for {', '.join(missing)}; they start at random.")
        return model

    def build_model(self, *, patched: bool, dropout: bool = True) -> PeftModel:
        options = self.options
        base_model = self.base_model(dropout=dropout)
        config = _methods.peft_config(options, TaskType.SEQ_CLS, options.dropout if dropout else 0.0)
        model = get_peft_model(base_model, config)
        if patched:
            peft_fast.patch(model)  # the one added line
        return model

    def trainer(self, model: torch.nn.Module, watch: "Watch", **arguments) -> Trainer:
        """A Trainer whose `train()` goes once over its rows, or `max_steps`; called again, it goes on from there."""
        options = self.options
        steps_of_a_turn = math.ceil(len(self.train) / self.turns / options.batch_size)
        steps = arguments.get("max_steps") or options.epochs * self.turns * steps_of_a_turn
        optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr, weight_decay=0.0)
        trainer = Trainer(
            model=model,
            args=TrainingArguments(
                output_dir=str(options.out),
                per_device_train_batch_size=options.batch_size,
                per_device_eval_batch_size=4 * options.batch_size,
                num_train_epochs=1,
                train_sampling_strategy="group_by_length",
                seed=options.seed,
                logging_steps=1,
                save_strategy="no",
                report_to="none",
                dataloader_pin_memory=torch.cuda.is_available(),
                **arguments,
            ),
            train_dataset=self.train,
            eval_dataset=self.held_out,
            data_collator=DataCollatorWithPadding(self.tokenizer),
            compute_metrics=_accuracy,
            # Trainer's own optimizer and schedule would start again with every call of train().
            optimizers=(optimizer, get_linear_schedule_with_warmup(optimizer, 0, steps)),
        )
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(watch)
        return trainer

    def step_bytes(self, model: torch.nn.Module) -> int:
        """Bytes that one training step holds from forward to backward, weights and other state excluded."""
        device = next(model.parameters()).device
        batch = DataCollatorWithPadding(self.tokenizer)(self.train[: self.options.batch_size]).to(device)
        model.train()
        return saved_bytes(lambda: model(**batch).loss, (*model.parameters(), *model.buffers()))


class Watch(ProgressCallback):
    """A progress bar that also keeps the loss and the seconds of every step."""

    def __init__(self, title: str) -> None:
        super().__init__()
        self.title = title
        self.losses: list[float] = []
        self.seconds: list[float] = []
        self._started = 0.0

    def on_train_begin(self, args, state, control, **kwargs):
        self.training_bar = tqdm(total=state.max_steps, desc=self.title, unit="step", dynamic_ncols=True)
        self.current_step = 0

    def on_prediction_step(self, args, state, control, eval_dataloader=None, **kwargs):
        if self.prediction_bar is None:
            self.prediction_bar = tqdm(
                total=len(eval_dataloader), desc=f"{self.title}, held-out", leave=False, dynamic_ncols=True
            )
        self.prediction_bar.update()

    def on_step_begin(self, args, state, control, **kwargs):
        self._started = _now()

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step > WARM_UP_STEPS:
            self.seconds.append(_now() - self._started)
        super().on_step_end(args, state, control, **kwargs)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.training_bar is not None and "loss" in logs:
            self.losses.append(logs["loss"])
            self.training_bar.set_postfix(loss=f"{logs['loss']:.3f}", refresh=False)


def train(task: Task) -> dict[str, Result]:
    """Train the variants, taking turns; evaluate after each epoch; save, load and evaluate again."""
    options = task.options
    results = {name: Result() for name in _methods.VARIANTS[options.method]}
    models = {name: task.build_model(patched=name != "stock") for name in results}
    *_, patched = models.values()
    print(str(peft_fast.report(patched)).partition("\n")[0])
    watches = {name: Watch(name) for name in results}
    trainers = {name: task.trainer(models[name], watches[name]) for name in results}
    for name, result in results.items():
        result.saved_activation_bytes = task.step_bytes(models[name])
    for epoch in range(options.epochs):
        for turn, rows in enumerate(task.parts(epoch)):
            # Stock first, then patched first: a machine that grows slower is no advantage to either.
            for name in sorted(results, reverse=turn % 2 == 0):
                watches[name].title = f"{name:7} epoch {epoch + 1}/{options.epochs}, part {turn + 1}/{task.turns}"
                trainers[name].train_dataset = rows
                # Dropout draws from the generator that orders the batches, and the two draw different numbers.
                set_seed(options.seed + task.turns * epoch + turn)
                trainers[name].train()
        for name, result in results.items():
            watches[name].title = f"{name:7} epoch {epoch + 1}/{options.epochs}"
            accuracy = trainers[name].evaluate()["eval_accuracy"]
            result.accuracy_by_epoch.append(accuracy)
            print(f"{name:7} epoch {epoch + 1}/{options.epochs}: held-out accuracy {accuracy:.3f}")
    for name, result in results.items():
        result.accuracy = result.accuracy_by_epoch[-1]
        result.losses = watches[name].losses
        result.seconds_per_step = statistics.median(watches[name].seconds)
        folder = options.out / name
        models[name].save_pretrained(folder)
        again = evaluate_in_new_process(folder)
        if again != result.accuracy:
            raise SystemExit(
                f"The adapter saved in {folder} gives an accuracy of {again} in a new process, "
                f"the model it was saved from {result.accuracy}."
            )
        print(f"{name:7} saved in {folder}, loaded into a fresh model in a new process: accuracy {again:.3f}, the same")
    return results


def evaluate_in_new_process(folder: Path) -> float:
    """Run this program again with the same settings, and --evaluate."""
    command = [sys.executable, *sys.argv, "--evaluate", str(folder)]
    printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return float(printed.split()[-1])


def evaluate_saved(task: Task, folder: Path) -> float:
    model = PeftModel.from_pretrained(task.base_model(), folder)
    return task.trainer(model, Watch("saved")).evaluate()["eval_accuracy"]


def compare_losses(task: Task, results: dict[str, Result]) -> float | None:
    """The largest difference between the loss curves of two short runs without any dropout."""
    if len(results) < 2:
        return None
    for name, result in results.items():
        watch = Watch(f"{name:7} without dropout")
        trainer = task.trainer(
            task.build_model(patched=name != "stock", dropout=False), watch, max_steps=COMPARED_STEPS
        )
        trainer.train()
        result.losses_without_dropout = watch.losses
    curves = [result.losses_without_dropout for result in results.values()]
    return max(abs(stock - patched) for stock, patched in zip(*curves, strict=True))


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


@contextmanager
def _quiet_loading() -> Iterator[None]:
    """Leave out the report of missing weights: the classifier is new on purpose, the rest is checked."""
    logging = transformers.utils.logging
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.enable_progress_bar()
        logging.set_verbosity(verbosity)


def _accuracy(prediction: transformers.EvalPrediction) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def main() -> None:
    options = parse_options()
    try:
        task = Task(options)
    except AssetError as error:
        raise SystemExit(f"error: {error}") from None
    if options.evaluate:
        print(evaluate_saved(task, options.evaluate))
        return
    options.out.mkdir(parents=True, exist_ok=True)
    print(
        f"{options.method} on {options.model or 'all-MiniLM-L6-v2'}: {len(task.train)} texts to train on, "
        f"{len(task.held_out)} held out, labels {', '.join(task.labels)}"
    )
    variants = _methods.VARIANTS[options.method]
    steps = options.epochs * -(-len(task.train) // options.batch_size)
    then = f", then {COMPARED_STEPS} each without dropout" if len(variants) > 1 else ""
    print(f"{' and '.join(variants)}: {steps} steps{' each, in turns' if then else ''}{then}")
    results = train(task)
    loss_max_diff = compare_losses(task, results)
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()}
    write_summary(options.out / "summary.json", results, loss_max_diff, settings)
    draw_losses(options.out / "loss.png", results, loss_max_diff)
    print_table(results, loss_max_diff)
    print(f"Written to {options.out}: summary.json, loss.png, and what was trained.")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("interrupted")
