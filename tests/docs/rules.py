"""How each command of the docs is tried at smoke size. A command that no rule fits fails its test.

Run: through the command's own entry point, with the words of `extra` added. Slow: the same, with -m slow only. Parsed: what
needs GPUs, several machines, large data sets, a download or an install; its words go through the parser that would read them.
"""

from __future__ import annotations

import re
from typing import NamedTuple

RUN, SLOW, PARSED = "run", "slow", "parsed"
QUICK = ("--epochs", "2", "--scout", "0.5", "--fisher-budget", "16", "--no-tensorboard", "--device", "cpu")
SMALL = (*QUICK, "--model", "resnet8", "--batch", "8", "--workers", "0", "--loader", "torch", "--image-size", "32")
TINY = ("--projection-hidden", "16", "--projection-out", "8")


class Rule(NamedTuple):
    """The first rule whose pattern is found at the start of a command decides."""

    pattern: str
    mode: str
    extra: tuple[str, ...] = ()


RULES = (
    Rule(r"pip install -e \.\[[\w,]+\]", PARSED),
    Rule(r"pytest\b", PARSED),
    Rule(r"torchrun .* -m ltfast train ", PARSED),
    Rule(r"python (-m )?benchmarks", PARSED),
    Rule(r"ltfast bench\b", PARSED),
    Rule(r"ltfast train .*--gpus ", PARSED),
    Rule(r"ltfast train .*--dataset (inat18|imagenet-lt|places-lt|webdataset)\b", PARSED),
    Rule(r"ltfast train .*--recipe ", PARSED),
    Rule(r"ltfast train .*--config ", PARSED),
    Rule(r"ltfast train .*--weights DEFAULT", PARSED),
    Rule(r"ltfast train --help", RUN),
    Rule(r"ltfast train --resume RUN", RUN),
    Rule(r"ltfast train --procs ", SLOW, (*QUICK, "--batch", "32")),
    Rule(r"ltfast train --dataset (folder|list)\b", RUN, (*SMALL, *TINY, "--method", "ce")),
    Rule(
        r"ltfast train --dataset cifar10-lt\b",
        RUN,
        (*QUICK, *TINY, "--model", "resnet8", "--batch", "32", "--imbalance", "4"),
    ),
    Rule(r"ltfast train\b", RUN, QUICK),
    Rule(r"ltfast eval RUN --data-dir NEW", PARSED),
    Rule(r"ltfast report RUN", RUN),
    Rule(r"ltfast export .*--format (torch-export|onnx)", SLOW),
    Rule(r"ltfast data check train-\{", PARSED),
    Rule(r"ltfast data contact .*--dataset", RUN, ("--image-size", "32")),
    Rule(r"ltfast (eval|export|predict|data|doctor|methods|datasets)\b.*", RUN),
    Rule(r"ltfast report$", PARSED),
)


def rule_for(text: str) -> Rule | None:
    """The rule for a command, or None."""
    return next((rule for rule in RULES if re.match(rule.pattern, text)), None)
