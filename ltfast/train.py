"""The training loop, top to bottom as in the paper: scout, fill the memory bank, group, preserve, descend.

for each epoch:
    if it is time:  groups <- spectral clustering of the bank                             MBG: preserve/grouping.py
                    anchor <- Fisher-weighted anchors, collapsed to one                   GKP: preserve/knowledge.py
    for each batch: ascent to theta + eps_k of every group      GSA: step.py; Eq. 12 to 15: kernels/coefficients.py
                    descent by alpha g(theta + eps) + (1 - alpha) lambda A (theta - T)    update.py
    bank <- this epoch's encoder, for classes whose features were never better            preserve/quality.py, bank.py
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ltfast import build
from ltfast.config import Config
from ltfast.data.rng import fold
from ltfast.dist import Ranks, Traffic
from ltfast.durable import Durable
from ltfast.errors import UserError, explained
from ltfast.evaluate import evaluate
from ltfast.flat import FlatBuffers, FlatParameters
from ltfast.launch import on_cpu, tell_begun
from ltfast.memory import check_main_memory, out_of_memory
from ltfast.metrics import format_table
from ltfast.observe import AscentMeter, observe_epoch, quality_row
from ltfast.places import moved
from ltfast.preserve import Anchor, MemoryBank, QualityStats, group_classes, group_sizes
from ltfast.preserve.anchor import critical_weight
from ltfast.preserve.bank import WEIGHTS
from ltfast.preserve.knowledge import collapse_knowledge
from ltfast.progress import Progress, counted
from ltfast.recipes import needs_groups, rule_of
from ltfast.reduce import Agreement, GradientReducer
from ltfast.resume import load_bank
from ltfast.runs import RunFolder
from ltfast.schedule import alpha_at, lambda_of, lr_at, scouting_epochs
from ltfast.speedrun import warm_up
from ltfast.start import imprint_classifier
from ltfast.step import TrainStep
from ltfast.survive import Action, Signals
from ltfast.syncbn import synchronise
from ltfast.update import Update


class Trainer(Durable):
    """Everything a run consists of; `fit` runs it, `Durable` writes it down so that it can go on after any step."""

    def __init__(self, config: Config, folder: RunFolder | None, ranks: Ranks, progress: Progress) -> None:
        self.config, self.folder, self.ranks, self.progress = config, folder, ranks, progress
        self.rule = rule_of(config)
        self.device = build.build_device(config, ranks)
        build.check_convolutions(config, self.device)
        self.source = build.build_data(config, self.device, ranks)
        self.config = config = build.fitting(config, self.source.num_classes)
        self.counts = self.source.train_counts.to(self.device)
        model = build.build_model(config, self.source.input_shape, self.source.num_classes)
        if ranks.rank:  # its own dropout and dropped layers; the weights are drawn
            torch.manual_seed(fold(config.run.seed, ranks.rank))
        if config.run.sync_bn:
            synchronise(model, ranks)
        self.model = model.to(self.device)
        if self.device.type == "cuda":
            self.model = self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.agreement = Agreement(ranks, config.run.ascent == "global")
        self.objective = build.build_objective(config, self.counts, self.agreement)
        self.forward = build.build_forward(config, self.model, self.objective, self.device, self.compiled, ranks)
        self.capture = build.build_capture(config, self.source, self.device, ranks, self.compiled)
        self.flat = FlatParameters(self.model.parameters())
        self.reducer = GradientReducer(self.flat, ranks) if ranks.world > 1 else None
        self.buffers = FlatBuffers(self.model)
        self.encoder = self.flat.span(self.model.encoder.parameters())
        optim = config.optim
        self.update = Update(
            self.flat, kind=optim.optimizer, momentum=optim.momentum, weight_decay=optim.weight_decay,
            nesterov=optim.nesterov, clip=optim.clip, scaler=build.build_scaler(config, self.device),
        )  # fmt: skip
        self.quality = QualityStats(self.source.num_classes, self.model.feature_dim, self.device)
        theta = self.flat.data[self.encoder]
        origin = theta if config.preserve.center else None
        self.bank = MemoryBank(self.source.num_classes, theta.numel(), origin=origin, holds=ranks.main)
        self.needs_groups = needs_groups(config, self.rule)
        self.scouts = scouting_epochs(config.preserve, optim.epochs) if self.needs_groups else 0
        self.gkp_lambda = lambda_of(config.preserve, self.source.num_classes)
        self.groups: Tensor | None = None  # [C] once the bank has been clustered
        self.meter = AscentMeter(self.source.steps_per_epoch)
        self.epoch = self.batch = self.steps = 0
        self.best: dict[str, Any] = {"score": -1.0, "epoch": -1}
        self.sums: dict[str, Tensor] = {}  # over the steps of this epoch so far, for the log
        self.seconds = 0.0  # spent on this epoch so far
        self.compiling = 0.0  # of them, since the epoch began or was taken up again
        self.started = time.perf_counter()  # of this epoch, as if it had never been broken off
        self.wire = Traffic()
        self.make_step()

    def take_bank(self) -> None:
        """Start from the memory bank of an earlier run, if --bank names one. UserError if it is none, or of other classes."""
        if run := self.config.preserve.bank:
            state = self.ranks.on_main(
                lambda: load_bank(Path(run), self.source.class_names, self.config.preserve.center)
            )
            self.bank.load_state_dict(self.ranks.tensors(state, kept=WEIGHTS))

    # -- the algorithm ---------------------------------------------------------------------------------------------------

    def fit(self) -> dict[str, Any]:
        """Train to the end; returns the evaluation of the last and the best checkpoint on the test split.

        Stopped early (by a signal or --max-hours) it returns {"stopped": reason} after a checkpoint.
        """
        with Signals(self.ranks.main) as signals:
            self.guard(signals)
            if self.config.run.untimed_steps and self.steps == 0:
                warm_up(self, self.config.run.untimed_steps)
            if self.config.model.imprints and self.steps == 0:
                imprint_classifier(self)
            for epoch in range(self.epoch, self.config.optim.epochs):
                self.epoch = epoch
                if self.grouping_due(epoch):
                    self.group()
                if self.train_epoch(epoch) is Action.STOP:
                    return self.stop()
                last = epoch + 1 == self.config.optim.epochs
                self.bad_steps.after_epoch(epoch, self.flat.data, self.source.steps_per_epoch if last else 0)
                self.remember(epoch)
                summary = self.summary()
                self.epoch, self.batch = epoch + 1, 0
                self.ranks.check_same(self.flat.data, "parameters")
                # BatchNorm statistics: each rank has seen its own part of the batches.
                self.ranks.mean_(self.buffers.data)
                observe_epoch(self, epoch)
                self.finish_epoch(epoch, summary)
                if self.watch.between_epochs() is Action.STOP:
                    return self.stop()
            return self.finish()

    def scouting(self, epoch: int) -> bool:
        """The first epochs, and as many more as leave the bank empty because all of their steps were skipped."""
        return epoch < self.scouts or not len(self.bank)

    def grouping_due(self, epoch: int) -> bool:
        """After scouting, then every `regroup` epochs; not in the middle of an epoch that is being resumed."""
        if not self.needs_groups or self.scouting(epoch) or self.batch:
            return False
        every = self.config.preserve.regroup
        return self.groups is None or bool(every and epoch > self.scouts and (epoch - self.scouts) % every == 0)

    def group(self) -> None:
        """MBG: cluster the bank into groups, then collapse the groups' Fisher-weighted anchors into one (GKP)."""
        cfg = self.config.preserve
        started = time.perf_counter()
        counts = self.source.train_counts
        seed = self.config.run.seed
        groups = self.ranks.on_main(lambda: group_classes(self.bank, counts, cfg.groups, center=cfg.center, seed=seed))
        self.groups = self.ranks.broadcast_(torch.zeros_like(counts) if groups is None else groups)
        members = [(self.groups == k).sum().item() for k in range(cfg.groups)]
        self.progress.note(
            f"grouped {counted(len(self.bank), 'snapshot')} into {cfg.groups} groups of {members} classes"
        )
        if cfg.gkp:
            sizes = group_sizes(self.groups, counts, cfg.groups, cfg.gkp_normalise)
            anchor = collapse_knowledge(
                self.model, self.flat, self.source, self.bank, self.groups, sizes, self.objective.classification,
                fisher=cfg.fisher, budget=cfg.fisher_budget, seed=seed,
                ranks=self.ranks,
            )  # fmt: skip
            self.update.anchor = self.stable(anchor.expanded(self.flat.size, self.encoder.start))
        self.make_step()
        seconds = time.perf_counter() - started
        self.log("group", epoch=self.epoch, groups=self.groups.tolist(), seconds=seconds)
        self.progress.grouped(seconds)

    def stable(self, anchor: Anchor) -> Anchor:
        """Cap A where the descent would overshoot the anchor, see `critical_weight`.

        The Fisher of early snapshots may be large; uncapped, descent then diverges.
        """
        cfg = self.config
        strongest = (1 - min(cfg.preserve.alpha_start, cfg.preserve.alpha_end)) * self.gkp_lambda
        limit = critical_weight(cfg.optim.lr, cfg.optim.momentum, strongest)
        theta = self.flat.data
        capped = float((anchor.weight > limit).sum() / sum(p.numel() for p in self.model.encoder.parameters()))
        if capped:
            self.progress.note(
                f"GKP weight capped at {limit:.3g} for {100 * capped:.2f} % of the encoder's parameters, so that they do not overshoot"
            )
        away = float((theta - anchor.target).mul(anchor.weight > 0).norm() / theta[self.encoder].norm())
        where = f"{away:.2g} of the encoder's norm away" if away else "where the encoder is now"
        self.progress.note(f"GKP's anchor lies {where}, its strength lambda is {self.gkp_lambda:g}")
        found = {"limit": limit, "capped": capped, "largest": float(anchor.weight.max()), "away": away}
        self.log("anchor", epoch=self.epoch, strength=self.gkp_lambda, **found)
        return anchor._replace(weight=anchor.weight.clamp_max(limit))

    def make_step(self) -> None:
        """The step for the groups there are: plain descent while scouting for them."""
        waiting = self.groups is None and self.rule is not None and self.rule.groups == "bank"
        rule = None if waiting else self.rule
        membership = build.build_membership(self.config, self.rule, self.source.train_counts, self.groups)
        # The stratified sampler needs to know them, too.
        self.source.set_groups(membership.argmax(1) if self.groups is None else self.groups)
        self.step = TrainStep(
            self.model, self.objective, self.flat, self.buffers, self.update, rule, membership, forward=self.forward,
            reducer=self.reducer, agreement=self.agreement, capture=self.capture,
        )  # fmt: skip

    def train_epoch(self, epoch: int) -> Action:
        """One pass over the training images (the rest of it after a resume); STOP if it was broken off."""
        self.model.train()
        self.started, sums, self.compiling = time.perf_counter() - self.seconds, self.sums, 0.0
        total = self.source.steps_per_epoch
        for batch in self.source.train(epoch, self.batch):
            self.set_schedules(epoch + self.batch / total)
            with self.ranks.traffic.noted_in(self.wire):
                result = self.step(batch)
            assert self.step.features is not None
            self.quality.update(self.step.features, batch.labels, result["good"])
            self.meter.add(self.batch, self.step.ascent_stats, result["good"])
            if sums:
                torch._foreach_add_(list(sums.values()), [result[name] for name in sums])
            else:
                sums |= {name: value.clone() for name, value in result.items()}
            self.batch += 1
            self.steps += 1
            self.progress.step(epoch, self.batch, total, sums.get("loss"))
            self.seconds = time.perf_counter() - self.started
            self.bad_steps.after_step(epoch, self.batch - 1, batch.index)
            action = self.watch.after_step()
            if action is Action.STOP and self.batch < total:
                return action
            if action is Action.CHECKPOINT and self.batch < total:
                self.save_state()
        return Action.GO

    def summary(self) -> dict[str, Any]:
        """Means over the epoch's steps that were not skipped and over the ranks; the sums start afresh."""
        sums = dict(zip(self.sums, self.ranks.mean_(torch.stack(list(self.sums.values()))).tolist(), strict=True))
        good = sums.pop("good", float(self.source.steps_per_epoch))
        result: dict[str, Any] = {name: value / good if good else math.nan for name, value in sums.items()}
        result["seconds"] = time.perf_counter() - self.started  # the device has finished: its figures have been read
        result["compiling"] = self.compiling  # seconds of those
        result["skipped"] = int(self.update.skipped)  # steps without a finite loss and gradient, since the run began
        result |= self.replaced_images()
        if self.ranks.world > 1:  # what this rank hands to collectives in a step
            result["comm"] = {k: v / self.source.steps_per_epoch for k, v in dataclasses.asdict(self.wire).items()}
            if self.epoch == 0:
                self.progress.note(
                    "each step sends {bytes:,.0f} bytes per rank in {calls:.1f} collectives".format(**result["comm"])
                )
        self.sums, self.seconds, self.wire = {}, 0.0, Traffic()
        return result

    def set_schedules(self, position: float) -> None:
        """Learning rate, alpha and the strength (1 - alpha) lambda of GKP at `position` epochs into the run."""
        cfg = self.config
        self.update.lr.fill_(lr_at(cfg.optim, position))
        if self.update.anchor is not None:
            alpha = alpha_at(cfg.preserve, position / cfg.optim.epochs)
            self.update.alpha.fill_(alpha)
            self.update.strength.fill_((1 - alpha) * self.gkp_lambda)

    def remember(self, epoch: int) -> None:
        """Give each class whose features were never better this epoch's encoder as its bank entry."""
        self.ranks.sum_(self.quality.flat)
        quality = self.quality.compute(self.config.preserve.lambda_q)
        if self.needs_groups and (self.scouting(epoch) or self.config.preserve.regroup):
            self.bank.update(quality.quality, self.flat.data[self.encoder], epoch)
        self.log("quality", epoch=epoch, **quality_row(quality, self.source.train_counts))
        self.quality.reset()

    # -- after an epoch ------------------------------------------------------------------------------------------------

    def finish_epoch(self, epoch: int, summary: dict[str, Any]) -> None:
        """Validate, log, keep the best, checkpoint."""
        cfg = self.config
        val: dict[str, Any] = {}
        if self.source.sizes.get("val", 0):
            val = self.evaluate("val")
            score = val["macro"]
            if score > self.best["score"]:
                self.best = {"score": score, "epoch": epoch}
                self.save_weights("best")
        phase = "scout" if self.needs_groups and self.groups is None else "train"
        short = {k: val[k] for k in ("top1", "many", "medium", "few", "ece") if val.get(k) is not None}
        self.log("epoch", epoch=epoch, phase=phase, lr=float(self.update.lr), **summary, val=short, bank=len(self.bank))
        self.progress.epoch(epoch, cfg.optim.epochs, phase, summary, short)
        if (epoch + 1) % cfg.run.checkpoint_every == 0 or epoch + 1 == cfg.optim.epochs:
            self.save_state()

    def finish(self) -> dict[str, Any]:
        """Evaluate the last (and the best-on-validation) weights on the test split; nothing was chosen by it.

        Raises:
            UserError: they give no finite output on any image; a checkpoint could not be written: the figures are then logged
                and shown all the same.
        """
        self.save_weights("last")
        result = {"last": self.evaluate("test")}
        useless = result["last"]["nonfinite"] == result["last"]["n"]
        try:
            self.flush()
        except UserError:
            if not useless:
                self.log("test", **result)
                self.progress.note(format_table(result["last"], self.source.class_names, self.source.train_counts))
            raise
        if useless:
            raise UserError("the trained network gives NaN or infinity on every test image; lower --lr or --rho")
        if self.best_written():
            self.load_weights("best")
            result["best"] = {**self.evaluate("test"), "epoch": self.best["epoch"]}
            self.load_weights("last")
        self.log("test", **result)
        return result

    def evaluate(self, split: str) -> dict[str, Any]:
        """Accuracy and calibration of the current weights on a split, over all ranks."""
        try:
            result = evaluate(
                self.model, self.source, split, self.device, self.ranks, logits=self.forward.logits, tta=self.config.run.tta
            )  # fmt: skip
        except UserError as error:  # an image of the split cannot be read
            if self.store is not None:
                self.store.flush()
            run = self.config.run.out or "RUN" if self.folder is None else self.folder
            safe = "the trained weights are safe and " if split == "test" else ""
            raise UserError(
                f"{error}; {safe}`ltfast train --resume {run} --on-bad-image skip` goes on without it"
            ) from error
        if not result["n"]:
            raise UserError(
                f"no {split} picture could be read; `ltfast data check` says why; bring them back, then --resume"
            )
        return result


def train(
    config: Config,
    *,
    resume: str | None = None,
    changes: Mapping[str, Any] | None = None,
    ranks: Ranks | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Train by `config`, or continue the run folder `resume` with its own config and these `changes`; returns the test
    results, see `Trainer.fit`."""
    ranks, progress = ranks or Ranks(), progress or Progress()
    folder, trainer = None, None
    try:
        resume = ranks.share(resume)  # after a restart rank 0 alone may see that the folder holds a run
        if resume:
            folder = ranks.on_main(lambda: RunFolder.open(resume, lock=True))
            values = (
                ranks.share(ranks.on_main(lambda: folder.resumed_config.to_dict() if folder is not None else {})) or {}
            )
            config = on_cpu(moved(Config.from_dict(values, resume), changes or {}), resumed=True)
        trainer = Trainer(config, folder, ranks, progress)  # bad input fails here, before a new run's folder exists
        check_main_memory(trainer)
        if resume:
            trainer.load_state()
        else:
            trainer.take_bank()
            trainer.folder = folder = ranks.on_main(lambda: RunFolder.create(config))
            tell_begun()
        trainer.describe()
        progress.begin(trainer)
        return {**trainer.fit(), "steps": trainer.steps, "folder": str(folder.path) if folder else None}
    except torch.OutOfMemoryError:
        if trainer is None:
            raise
        raise UserError(out_of_memory(trainer)) from None
    except (RuntimeError, ValueError) as error:
        if (told := explained(error, config.model.model)) is None:
            raise
        raise told from None
    finally:
        # After a mistake that all ranks meet, the launcher signals those that have not ended yet: they finish what is being
        # written. Who has been asked to stop before ends at once.
        asked = trainer is not None and hasattr(trainer, "watch") and trainer.watch.signals.received
        with contextlib.nullcontext() if asked else Signals(main=False):
            progress.end()
            if trainer is not None and trainer.store is not None:
                trainer.store.close()
        if folder is not None:
            with contextlib.suppress(OSError):
                folder.close()
