"""Evaluation figures against scikit-learn and naive loops in float64."""

import json
import math
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from sklearn.metrics import accuracy_score, balanced_accuracy_score, confusion_matrix, top_k_accuracy_score
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ltfast.metrics import CONFUSION_MAX_CLASSES, ECE_BINS, Accumulator, format_table

COUNTS = torch.tensor([500, 101, 100, 50, 20, 19, 1])
NAMES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "a class with a very long name indeed"]


class NoSync(TorchDispatchMode):
    """Fails on an op that makes the host wait."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func._opname not in {"_local_scalar_dense", "nonzero", "equal", "bincount"}, func
        return func(*args, **(kwargs or {}))


def stream(n: int = 203, classes: int = 7, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, classes, (n,), generator=generator)
    logits = 1.5 * torch.randn(n, classes, generator=generator)
    logits[torch.arange(n), labels] += 4 * torch.rand(n, generator=generator)
    return logits, labels


def evaluate(batches: Iterable[tuple[Tensor, Tensor]], classes: int, counts: Tensor) -> dict[str, Any]:
    accumulator = Accumulator(classes, counts)
    for logits, labels in batches:
        accumulator.update(logits, labels)
    return accumulator.to_dict()


def naive_ece(logits: Tensor, labels: Tensor, bins: int = 15) -> float:
    rows = []
    for row, label in zip(logits.double().tolist(), labels.tolist(), strict=True):
        odds = [math.exp(x) for x in row]
        best = max(range(len(row)), key=row.__getitem__)
        rows.append((odds[best] / sum(odds), best == label))
    total = 0.0
    for b in range(bins):
        inside = [(p, hit) for p, hit in rows if b / bins < p <= (b + 1) / bins]
        total += abs(sum(hit for _, hit in inside) - sum(p for p, _ in inside))
    return 100 * total / len(rows)


def assert_same(result: dict, expected: dict) -> None:
    """Equal in every count; the confidence sums behind ece may be added in another order."""
    assert result["ece"] == pytest.approx(expected["ece"], abs=1e-10)
    assert {**result, "ece": 0} == {**expected, "ece": 0}


def test_figures_are_those_of_sklearn_and_of_naive_loops() -> None:
    logits, labels = stream()
    result = evaluate(((logits[i : i + 17], labels[i : i + 17]) for i in range(0, 203, 17)), 7, COUNTS)
    predicted = logits.argmax(1)
    assert result["n"] == 203
    assert result["top1"] == pytest.approx(100 * accuracy_score(labels, predicted), abs=1e-10)
    assert result["top5"] == pytest.approx(100 * top_k_accuracy_score(labels, logits, k=5), abs=1e-10)
    assert result["macro"] == pytest.approx(100 * balanced_accuracy_score(labels, predicted), abs=1e-10)
    assert result["confusion"] == confusion_matrix(labels, predicted).tolist()
    assert result["ece"] == pytest.approx(naive_ece(logits, labels), abs=1e-10)
    assert result["ece"] != pytest.approx(naive_ece(logits, labels, bins=14), abs=1e-3)
    per_class = [100 * (predicted[labels == c] == c).double().mean().item() for c in range(7)]
    assert result["per_class"] == pytest.approx(per_class, abs=1e-10)
    assert result["many"] == pytest.approx(sum(per_class[:2]) / 2, abs=1e-10)  # > 100: 500, 101
    assert result["medium"] == pytest.approx(sum(per_class[2:5]) / 3, abs=1e-10)  # 20..100: 100, 50, 20
    assert result["few"] == pytest.approx(sum(per_class[5:]) / 2, abs=1e-10)  # < 20: 19, 1
    assert result["test_counts"] == labels.bincount(minlength=7).tolist()
    assert result["nonfinite"] == 0
    json.dumps(result, allow_nan=False)


def test_the_state_holds_what_a_reliability_diagram_shows() -> None:
    logits, labels = stream()
    accumulator = Accumulator(7, COUNTS)
    for i in range(0, 203, 17):
        accumulator.update(logits[i : i + 17], labels[i : i + 17])
    accumulator.update(logits[:4], torch.full((4,), -1))  # padding
    confidence, predicted = logits.double().softmax(1).max(1)
    state = accumulator.state()
    for b in range(ECE_BINS):
        inside = (confidence > b / ECE_BINS) & (confidence <= (b + 1) / ECE_BINS)
        assert int(state["bin_seen"][b]) == int(inside.sum())
        assert int(state["bin_correct"][b]) == int((inside & (predicted == labels)).sum())
        assert float(state["bin_confidence"][b]) == pytest.approx(float(confidence[inside].sum()), abs=1e-10)
    assert int(state["bin_seen"].sum()) == 203


@pytest.mark.parametrize("classes", [2, 3, 5])
def test_top5_of_five_classes_or_fewer_is_everything(classes: int) -> None:
    assert evaluate([stream(20, classes)], classes, torch.full((classes,), 50))["top5"] == 100


def test_perfect_and_confident_predictions_are_calibrated() -> None:
    labels = torch.arange(7).repeat(3)
    result = evaluate([(1e4 * torch.eye(7)[labels], labels)], 7, COUNTS)
    assert result["top1"] == result["few"] == 100
    assert result["ece"] == 0
    wrong = evaluate([(1e4 * torch.eye(7)[(labels + 1) % 7], labels)], 7, COUNTS)
    assert wrong["top1"] == 0
    assert wrong["ece"] == 100


def test_summing_the_states_of_ranks_gives_the_whole() -> None:
    logits, labels = stream()
    whole = evaluate([(logits, labels)], 7, COUNTS)
    parts = [Accumulator(7, COUNTS) for _ in range(3)]
    for rank, part in enumerate(parts):
        part.update(logits[rank::3], labels[rank::3])
    summed = Accumulator(7, COUNTS)
    for name, tensor in summed.state().items():
        tensor.copy_(sum(part.state()[name] for part in parts))
    assert parts[0].to_dict()["n"] < 203
    assert_same(summed.to_dict(), whole)


def test_padding_and_empty_batches_count_nothing() -> None:
    logits, labels = stream()
    accumulator = Accumulator(7, COUNTS)
    accumulator.update(logits, labels)
    accumulator.update(logits, torch.full_like(labels, -1))
    accumulator.update(logits[:0], labels[:0])
    padded = labels.clone()
    padded[100:150], padded[150:] = -1, -100  # -100: what torch.nn.functional.cross_entropy ignores
    half = Accumulator(7, COUNTS)
    half.update(logits, padded)
    assert_same(accumulator.to_dict(), evaluate([(logits, labels)], 7, COUNTS))
    assert_same(half.to_dict(), evaluate([(logits[:100], labels[:100])], 7, COUNTS))


def test_nonfinite_rows_are_wrong_and_counted() -> None:
    logits, labels = stream()
    broken = logits.clone()
    right = (logits.argmax(1) == labels).nonzero()[:2, 0]
    broken[right[0], 3], broken[right[1], labels[right[1]]] = float("nan"), float("inf")
    before, after = evaluate([(logits, labels)], 7, COUNTS), evaluate([(broken, labels)], 7, COUNTS)
    assert after["nonfinite"] == 2
    assert after["top1"] == pytest.approx(before["top1"] - 200 / 203)
    assert sum(map(sum, after["confusion"])) == 201
    rest = [i for i in range(203) if i not in right]
    assert after["ece"] == pytest.approx(naive_ece(logits[rest], labels[rest]), abs=1e-10)
    assert "images with NaN output %" in format_table(after, NAMES, COUNTS)
    assert "NaN" not in format_table(before, NAMES, COUNTS)
    assert evaluate([(logits * float("nan"), labels)], 7, COUNTS)["ece"] is None
    json.dumps(after, allow_nan=False)


def test_absent_groups_and_classes_are_none() -> None:
    logits, labels = stream()
    labels = labels.where(labels != 3, 2)
    result = evaluate([(logits, labels)], 7, torch.full((7,), 50))
    assert result["many"] is None
    assert result["few"] is None
    assert result["per_class"][3] is None
    present = [x for x in result["per_class"] if x is not None]
    assert result["medium"] == result["macro"] == pytest.approx(sum(present) / 6)
    nothing = Accumulator(7, COUNTS).to_dict()
    assert nothing["n"] == 0
    assert nothing["top1"] is nothing["ece"] is nothing["macro"] is None


def test_many_classes_keep_no_confusion_and_the_host_never_waits() -> None:
    classes = 8142
    assert classes > CONFUSION_MAX_CLASSES
    accumulator = Accumulator(classes, torch.arange(1, classes + 1))
    logits, labels = stream(33, classes)
    with NoSync():
        accumulator.update(logits.bfloat16(), labels)
    result = accumulator.to_dict()
    assert "confusion" not in result
    assert result["top1"] == pytest.approx(100 * (logits.bfloat16().argmax(1) == labels).double().mean().item())
    small = Accumulator(7, COUNTS)
    with NoSync():
        small.update(*stream())


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Accumulator(3, COUNTS), "train_counts"),
        (lambda: Accumulator(7, COUNTS).update(torch.zeros(2, 6), torch.zeros(2).long()), "logits"),
        (lambda: Accumulator(7, COUNTS).update(torch.zeros(2, 7), torch.zeros(1).long()), "labels"),
        (lambda: Accumulator(7, COUNTS).update(torch.zeros(2, 7), torch.zeros(2, 1).long()), "labels"),
        (lambda: format_table(evaluate([stream()], 7, COUNTS), NAMES[:6], COUNTS), "class_names"),
    ],
)
def test_bad_arguments_are_named(build, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


def test_table_puts_the_run_beside_the_baseline() -> None:
    run, baseline = evaluate([stream()], 7, COUNTS), evaluate([stream(seed=1)], 7, COUNTS)
    baseline["many"] = None
    lines = format_table(run, NAMES, COUNTS, baseline, headings=("gkp-gsa", "ce")).splitlines()
    assert lines[0].split() == ["gkp-gsa", "ce", "change"]
    figures = {line[:28].strip(): line[28:].split() for line in lines if line}
    change = f"{run['top1'] - baseline['top1']:+.2f}"
    assert figures["top-1 %"] == [f"{run['top1']:.2f}", f"{baseline['top1']:.2f}", change]
    assert figures["many-shot %"] == [f"{run['many']:.2f}", "-", "-"]
    assert figures["deer"][:3] == ["20", str(run["test_counts"][4]), f"{run['per_class'][4]:.2f}"]
    assert f"{NAMES[6][:13]}...{NAMES[6][-12:]}" in figures
    assert len({len(line) for line in lines if line}) == 1
    assert lines.index("") == 8
    long = format_table(run, NAMES, COUNTS, baseline, headings=("balanced-softmax+sam+gkp", "ce")).splitlines()
    assert long[0].split() == ["balanced-softmax+sam+gkp", "ce", "change"]
    assert len({len(line) for line in long if line}) == 1
    older = {key: value for key, value in run.items() if key != "test_counts"}
    assert format_table(older, NAMES, COUNTS).splitlines()[9].split() == ["class", "images", "this", "run"]
    alone = format_table(run, NAMES, COUNTS)
    assert alone.splitlines()[9].split() == ["class", "train", "test", "this", "run"]
    assert "change" not in alone
    assert "baseline" not in alone


def test_table_of_many_classes_shows_the_ten_worst() -> None:
    logits, labels = stream(4000, 40)
    labels = labels.where(labels != 7, 8)
    result = evaluate([(logits, labels)], 40, torch.arange(40, 0, -1))
    table = format_table(result, [f"class-{c}" for c in range(40)], torch.arange(40, 0, -1))
    lines = table.splitlines()
    shown = [int(line.split()[0].split("-")[1]) for line in lines if line.startswith("class-")]
    worst = sorted((c for c in range(40) if c != 7), key=lambda c: result["per_class"][c])[:10]
    assert shown == worst
    assert "10 worst classes" in table
    assert "never right" not in table


def test_of_equally_bad_classes_the_table_shows_the_largest() -> None:
    labels, counts = torch.arange(2000), torch.arange(2000) % 1997 + 1
    wrong = torch.nn.functional.one_hot((labels + 1) % 2000).float()
    result = evaluate([(wrong, labels)], 2000, counts)
    table = format_table(result, [f"class-{c}" for c in range(2000)], counts)
    shown = [int(line.split()[0].split("-")[1]) for line in table.splitlines() if line.startswith("class-")]
    assert shown == list(range(1996, 1986, -1))
    assert "\nclasses never right %" in table
    assert next(line for line in table.splitlines() if "never right" in line).split()[-1] == "100.00"
