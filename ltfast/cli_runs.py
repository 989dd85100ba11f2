"""`ltfast eval | report | export | predict`: what a run folder is good for once it has trained."""

from __future__ import annotations

import argparse
import csv
import itertools
import math
import os
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from ltfast.config import flag
from ltfast.errors import UserError
from ltfast.places import LISTS, short
from ltfast.tables import write_csv

if TYPE_CHECKING:
    from torch import Tensor

    from ltfast.data.base import Source


def add_run_commands(commands: Any) -> None:
    """Add eval, report, export and predict to the commands of the parser."""
    evaluate = commands.add_parser("eval", help="evaluate a run on its test split")
    evaluate.add_argument("folder", metavar="RUN", help="run folder")
    evaluate.add_argument("--checkpoint", choices=("last", "best"), default="last", help="which weights [last]")
    evaluate.add_argument("--split", choices=("test", "val"), default="test", help="which split [test]")
    evaluate.add_argument(
        "--data-dir", default=None, help="where the data lies now, if it moved, or other pictures to judge by"
    )
    for name in LISTS:
        evaluate.add_argument(flag(name), default=None, metavar="FILE", help="where this list lies now, or another one")
    evaluate.add_argument("--on-bad-image", choices=("skip", "fail"), default="fail", help="unreadable images [fail]")
    evaluate.add_argument("--device", default=None, help="auto, cpu, cuda or cuda:N [as in the run]")
    evaluate.add_argument(
        "--tta", choices=("none", "flip"), default=None, help="flip = average with the mirror image [as in the run]"
    )
    add_prior(evaluate)
    evaluate.add_argument("--json", action="store_true", help="print one JSON object")
    evaluate.add_argument(
        "--csv", default=None, metavar="FILE", help="also write a table: class, training images, test images, accuracy"
    )
    evaluate.add_argument(
        "--predictions", default=None, metavar="FILE",
        help="also write a row per picture: path (index where it has none), class, predicted class, its probability",
    )  # fmt: skip
    evaluate.set_defaults(run=command_eval)

    report = commands.add_parser("report", help="one HTML page with the figures of one or several runs")
    report.add_argument("folders", metavar="RUN", nargs="+", help="run folders")
    report.add_argument("--out", default=None, metavar="DIR", help="where to write it [RUN/report]")
    report.add_argument(
        "--max-minutes", type=float, default=None, metavar="X", help="minutes for curvature and landscapes [no limit]"
    )
    report.add_argument("--data-dir", default=None, help="where the data lies now, if it moved")
    report.set_defaults(run=command_report)

    export = commands.add_parser("export", help="write a run's model for use elsewhere")
    export.add_argument("folder", metavar="RUN", help="run folder, or file of `ltfast export --format safetensors`")
    export.add_argument("--format", default="safetensors", help="safetensors, torch-export or onnx [safetensors]")
    export.add_argument("--checkpoint", choices=("last", "best"), default="last", help="which weights [last]")
    export.add_argument("--out", default=None, metavar="FILE", help="file to write [RUN/export/..., or beside a file]")
    export.set_defaults(run=command_export)

    predict = commands.add_parser("predict", help="classes and probabilities of pictures")
    predict.add_argument("model", metavar="RUN", help="run folder, or file of `ltfast export --format safetensors`")
    predict.add_argument("images", metavar="IMAGE", nargs="+", help="picture files, or folders of them")
    predict.add_argument("--checkpoint", choices=("last", "best"), default="last", help="which weights of a run [last]")
    predict.add_argument("--top", type=int, default=5, metavar="N", help="classes to print [5]")
    predict.add_argument("--device", default="cpu", help="auto, cpu, cuda or cuda:N [cpu]")
    add_prior(predict)
    form = predict.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print one JSON object a picture")
    form.add_argument(
        "--csv",
        action="store_true",
        help="print a table, a row per picture: image, class_1, probability_1, class_2, ...",
    )
    predict.set_defaults(run=command_predict)


def add_prior(command: argparse.ArgumentParser) -> None:
    """--prior of eval and predict."""
    command.add_argument(
        "--prior",
        choices=("uniform", "train"),
        default=None,
        help="class frequencies to answer for: all equal, or those of the training images [what the loss assumed]",
    )


def command_eval(args: argparse.Namespace) -> int:
    from ltfast.evaluate import evaluate_run
    from ltfast.metrics import format_table
    from ltfast.progress import counted
    from ltfast.runs import RunFolder
    from ltfast.text import to_json

    lists = {name: getattr(args, name) for name in LISTS if getattr(args, name)}
    answers: list[tuple[int, int, int, float]] = []

    def note(logits: Tensor, labels: Tensor, index: Tensor) -> None:
        probability, predicted = logits.double().softmax(1).max(1)
        answers.extend(zip(*(t.tolist() for t in (index, labels, predicted, probability)), strict=True))

    result, source = evaluate_run(
        args.folder,
        args.checkpoint,
        args.split,
        data_dir=args.data_dir,
        on_bad_image=args.on_bad_image,
        lists=lists,
        device=args.device,
        tta=args.tta,
        prior=args.prior,
        each=note if args.predictions else None,
    )
    run = RunFolder.open(args.folder)
    if args.json:
        about = {
            "split": args.split,
            "checkpoint": args.checkpoint,
            "epoch": run.epoch_of(args.checkpoint),
            "prior": args.prior,
        }
        classes = {"class_names": source.class_names, "train_counts": source.train_counts.tolist()}
        print(to_json({**about, **result, **classes}))
    else:
        which = args.checkpoint + " checkpoint" + run.progress(args.checkpoint)
        prior = f", for {args.prior} class frequencies" if args.prior else ""
        print(f"{args.folder}: {which} on {args.split}, {counted(result['n'], 'image')}{prior}")
        print(format_table(result, source.class_names, source.train_counts))
    if args.csv:
        write_classes(args.csv, result, source)
    if args.predictions:
        write_predictions(args.predictions, answers, source, args.split)
    return 0


def write_classes(path: str, result: dict[str, Any], source: Source) -> None:
    """One row per class: name, images trained and tested on, accuracy in per cent (empty for a class without one to test)."""
    accuracies = ["" if value is None else f"{value:.2f}" for value in result["per_class"]]
    rows = zip(source.class_names, source.train_counts.tolist(), result["test_counts"], accuracies, strict=True)
    write_csv(path, [("class", "train_images", "test_images", "accuracy"), *rows])


def write_predictions(path: str, answers: Iterable[tuple[int, int, int, float]], source: Source, split: str) -> None:
    """One row per picture of `answers` (place in the split, class, predicted class, its probability); nothing is predicted
    where the output was not finite."""
    names, paths = source.class_names, source.paths.get(split)
    rows = (
        (paths[i] if paths else i, names[true], *((names[found], f"{p:.6g}") if math.isfinite(p) else ("", "")))
        for i, true, found, p in answers
    )
    heads = ("path" if paths else "index", "class", "predicted", "probability")
    write_csv(path, itertools.chain([heads], rows), "--predictions")


def command_report(args: argparse.Namespace) -> int:
    from ltfast.report import report

    print(f"written {short(report(args.folders, args.out, args.max_minutes, data_dir=args.data_dir))}")
    return 0


def command_export(args: argparse.Namespace) -> int:
    from ltfast.export import export
    from ltfast.runs import RunFolder

    path = export(args.folder, args.format, which=args.checkpoint, out=args.out)
    run = None if os.path.isfile(args.folder) else RunFolder.open(args.folder)  # a file: an earlier export
    print(f"written {path}{run.progress(args.checkpoint) if run else ''}")
    return 0


def command_predict(args: argparse.Namespace) -> int:
    from ltfast.predict import load_trained, pictures_below, predict
    from ltfast.text import to_json

    problems: list[UserError] = []

    def unreadable(problem: UserError) -> None:
        problems.append(problem)
        print(f"ltfast: {problem}", file=sys.stderr)

    trained = load_trained(args.model, args.checkpoint)
    images, table = list(pictures_below(args.images)), csv.writer(sys.stdout, lineterminator="\n")
    rows = predict(trained, images, top=args.top, device=args.device, prior=args.prior, unreadable=unreadable)
    for number, row in enumerate(rows):
        if args.json:
            print(to_json(row))
            continue
        pairs = list(zip(row["classes"], row["probabilities"], strict=True))
        if args.csv:
            if number == 0:
                names = (f"{what}_{k}" for k in range(1, len(pairs) + 1) for what in ("class", "probability"))
                table.writerow(["image", *names])
            table.writerow([row["image"], *(cell for name, p in pairs for cell in (name, f"{p:.6g}"))])
        else:
            print(f"{row['image']}: " + ", ".join(f"{name} {100 * p:.1f} %" for name, p in pairs))
    return 2 if problems else 0


def print_result(result: dict[str, Any]) -> None:
    """The closing table of a training run."""
    from ltfast.baselines import baseline_for
    from ltfast.metrics import format_table
    from ltfast.runs import RunFolder

    folder = RunFolder.open(result["folder"])
    config = folder.config
    info = folder.data_row
    baseline = baseline_for(config)
    print(
        f"\ntest split, last checkpoint, {config.method}"
        + (f" beside ce (mean of {baseline['seeds']} seeds)" if baseline else "")
    )
    print(format_table(result["last"], info["class_names"], info["counts"], baseline, headings=(config.method, "ce")))
    if "best" in result:
        best = result["best"]
        print(
            f"\nthe checkpoint that was best on validation (epoch {best['epoch'] + 1}): top-1 {best['top1']:.2f} % on test"
        )
    skipped = folder.metrics("epoch")[-1]["skipped"]
    if skipped:
        print(f"steps skipped for a loss or gradient that was not finite: {skipped:,} of {result['steps']:,}")
    print(f"run folder: {folder}")
