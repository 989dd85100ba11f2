"""Options that were given and do nothing beside the others: no error, one set of flags may serve many methods."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from ltfast.config import FIELDS, Config
from ltfast.data.registry import DATASETS
from ltfast.recipes import needs_groups, reads_groups, rule_of


def unread(config: Config, given: Iterable[str]) -> list[str]:
    """Those of the fields `given` that a run of this config does not read."""
    rule, gkp = rule_of(config), config.preserve.gkp
    bcl = config.loss.loss == "bcl"
    read = dict.fromkeys(("a_ce", "a_scl", "temperature", "projection_hidden", "projection_out"), bcl)
    read["tau"] = config.loss.loss != "ce"
    read["scale"], read["nesterov"] = config.model.classifier == "cosine", config.optim.optimizer == "sgd"
    imbalance = DATASETS[config.data.dataset].imbalance if config.data.imbalance is None else config.data.imbalance
    read["imbalance_type"] = imbalance not in (None, 1)
    read |= dict.fromkeys(("scout", "regroup", "center", "bank"), needs_groups(config, rule))
    read["groups"] = reads_groups(config)
    read |= dict.fromkeys(("gkp_lambda", "gkp_normalise", "fisher", "fisher_budget", "alpha_start", "alpha_end"), gkp)
    if rule is None:
        read |= {f.name: False for f in dataclasses.fields(config.sharpness) if f.name != "sharpness"}
    else:
        read |= dict.fromkeys(("radius_C", "rho_min", "rho_max"), rule.rho is None)
        read |= dict.fromkeys(("sigma", "lmbda"), rule.direction == "friendly")
        read |= dict.fromkeys(("focal_gamma", "focal_strength"), rule.groups == "focal")
        read["tail_below"], read["gram_every"] = rule.groups == "head-tail", rule.scope == "all"
        read["gram_ema"] = rule.scope == "all" and rule.gram_every > 1
        directions = rule.groups in ("class", "bank") and rule.direction != "joint"  # several, to take the mean of
        read["aggregate"] = rule.objective == "shared" and directions
    if config.data.sampler == "group-stratified":
        grouped = needs_groups(config, rule) or (rule is not None and rule.groups != "one")
        read["sampler"] = grouped  # else it is "instance"
    chosen = set(given)
    return [name for name in FIELDS if name in chosen and not read.get(name, True)]
