"""`finetune`: trains a backbone and a head on labelled images, and exports the best network."""

import json
import logging
import os
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from os import PathLike
from typing import Literal

import torch

from pera_fast.config import Config
from pera_fast.config.finetune import check_finetune, load_finetune
from pera_fast.config.load import finetune_recipe_names
from pera_fast.data.files.skipped import SkippedFiles
from pera_fast.errors import UserError
from pera_fast.features.masks import Masks, masks_of
from pera_fast.features.samples import Samples, read_samples
from pera_fast.finetune.data import LabelledData, length_of
from pera_fast.finetune.loop import Tuning, fit
from pera_fast.finetune.model import FineTuner, parameter_groups, plan_head
from pera_fast.finetune.tuned import load_tuned
from pera_fast.finetune.validate import validate
from pera_fast.paths import local_path, refuse_inside
from pera_fast.run_result import RunResult
from pera_fast.train.attention import prefer_attention
from pera_fast.train.checkpoint_size import finetune_bytes
from pera_fast.train.console import RunLog
from pera_fast.train.distributed import choose_device
from pera_fast.train.environment import check_environment, check_launcher
from pera_fast.train.host_memory import reuse_freed_memory
from pera_fast.train.host_threads import hold_to_quota
from pera_fast.train.optim import make_scaler
from pera_fast.train.run_folder import (
    RunFolder,
    Settings,
    Start,
    change_notes,
    replace_text,
    start_auto,
    start_new,
    start_resumed,
)
from pera_fast.train.schedules import make_schedules
from pera_fast.train.signals import StopRequest, exit_on_termination
from pera_fast.weights.backbone import Backbone, new_transformer
from pera_fast.weights.load import load_backbone

log = logging.getLogger(__name__)
TESTED = "test.json"  # in the run folder: scores on the test part


@dataclass(frozen=True)
class _Parts:
    """Labelled samples of a run: val and test are None where there are none."""

    classes: tuple[str, ...]
    several: bool
    masks: Masks | None
    train: Samples
    val: Samples | None
    test: Samples | None


def finetune(
    task: str,
    data: str | PathLike[str],
    out: str | PathLike[str],
    weights: str | PathLike[str] | None = None,
    *,
    root: str | PathLike[str] | None = None,
    recipe: str | PathLike[str] | None = None,
    resume: bool | Literal["auto"] = False,
    overrides: Sequence[str] = (),
) -> RunResult:
    """Fine-tunes weights on labelled images; everything that results lies in the run folder `out`.

    The best network by the validation part is `out/exported/model.safetensors`; `predict.predict` runs it.

    Args:
        task: scene, segmentation or change.
        data: a CSV or a folder, as `features.samples.read_samples` takes it.
        out: run folder; new, empty, or with `resume` one that holds a run.
        weights: what `weights.load.load_backbone` takes; with `resume=True` it may be left out.
        root: folder of the paths in a CSV.
        recipe: see `pera_fast.config.load.finetune_recipe_names()`, or a YAML file. None: finetune, or the run's.
        resume: continue the run in `out` from its newest checkpoint. "auto": start it where `out` holds no run.
        overrides: `section.key=value` each.

    Raises:
        UserError: one line about what the user can mend.
    """
    check_finetune(recipe, overrides)
    check_launcher()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("pera-fast finetune trains in one process, on one device; start it without torchrun")
    folder = RunFolder(local_path("--out", out))
    source = local_path("--data", data)
    refuse_inside("--out", folder.root, source)
    if weights is None and not (resume is True or (resume and folder.holds_run())):
        raise UserError("--weights is missing: give a run, a file of weights, a timm model's name or random:RECIPE")
    samples = read_samples(task, source, None if root is None else local_path("--root", root))
    backbone = load_backbone(weights) if weights is not None else None
    start = _start(folder, task, backbone, recipe, resume, overrides)
    device = choose_device(start.cfg.train.device)
    check_environment(start, folder, None, finetune_bytes(start.cfg))
    parts = _divide(samples, start.cfg)
    with exit_on_termination(), ExitStack() as stack:
        stack.enter_context(folder.opened())
        stack.enter_context(RunLog(folder.log))
        return _finetune(parts, backbone, folder, start, device)


def _start(
    folder: RunFolder,
    task: str,
    backbone: Backbone | None,
    recipe: str | PathLike[str] | None,
    resume: bool | Literal["auto"],
    overrides: Sequence[str],
) -> Start:
    def load(recipe: str | PathLike[str], overrides: Sequence[str], saved: Config | None) -> Config:
        base = backbone.cfg if backbone is not None else saved
        assert base is not None, "a new run has weights"
        cfg = load_finetune(base, task, recipe, overrides)
        if choose_device(cfg.train.device).type == "cpu":  # plain CPUs have no fast bfloat16
            cfg = load_finetune(base, task, recipe, overrides, precision="fp32")
        return cfg

    kind = Settings("finetune", finetune_recipe_names, load)
    if resume == "auto":
        return start_auto(folder, recipe or kind.default, overrides, kind)
    if resume:
        start = start_resumed(folder, recipe, overrides, kind)
        if start.cfg.finetune.task != task:
            raise UserError(f"--task {task}: the run in {folder.root} is of --task {start.cfg.finetune.task}")
        if start.checkpoint is None and backbone is None:
            raise UserError(f"--out {folder.root}: has no checkpoint yet; give --weights, to start from step 0")
        return start
    return start_new(folder, recipe or kind.default, overrides, kind)


def _divide(samples: Samples, cfg: Config) -> _Parts:
    """Parts to train, validate and test on. Without splits all are `train`, and a share of that is to validate on.

    Raises:
        UserError: there is nothing to train on, or masks are not what they must be.
    """
    f, seed = cfg.finetune, cfg.train.seed
    train = samples.need("train") if any(samples.splits) else samples
    val, test = (part if len(part) else None for part in (samples.part("val"), samples.part("test")))
    masks, classes, several = None, samples.classes, samples.several
    if samples.task == "scene":
        for name in ("ignore", "classes"):
            if getattr(f, name) is not None:
                raise UserError(f"finetune.{name}={getattr(f, name)}: is for masks, and --task is scene; leave it out")
    else:
        others = samples.take(row for row, split in enumerate(samples.splits) if split in ("val", "test"))
        masks = masks_of(train, others, f.ignore, [str(name) for name in f.classes or ()])
        classes = masks.classes
    if val is None and f.val_share:
        rest, held = train.divided(f.val_share, seed)
        train, val = (rest, held) if len(held) else (train, None)
    if f.labels < 1:
        train = train.divided(f.labels, seed)[1]
    if not len(train):
        raise UserError(f"{samples.source}: no sample is left to train on; raise finetune.labels={f.labels}")
    return _Parts(classes, several, masks, train, val, test)


def _finetune(
    parts: _Parts, backbone: Backbone | None, folder: RunFolder, start: Start, device: torch.device
) -> RunResult:
    cfg, skipped = start.cfg, SkippedFiles(folder.skipped)

    def data(samples: Samples | None) -> LabelledData | None:
        if samples is None:
            return None
        return LabelledData(cfg, samples, len(parts.classes), parts.several, parts.masks, skipped)

    train = data(parts.train)
    assert train is not None
    if start.checkpoint is None:
        train.check_some()
    run = _build(parts, backbone, folder, start, device, train, data(parts.val))
    _announce(run, start, parts, backbone)
    with StopRequest() as stop:  # from here on a signal waits for the step's end
        folder.cut_metrics(run.step)
        folder.finished.unlink(missing_ok=True)
        code, metrics = fit(run, stop)
        test = data(parts.test)
        if not code and test is not None and (metrics or not (folder.root / TESTED).exists()):
            _test(run, test)
    log.info("%s after %d steps: %s", "stopped" if code else "done", run.step, folder.root)
    return RunResult(code, folder.root, run.step, metrics)


def _build(
    parts: _Parts,
    backbone: Backbone | None,
    folder: RunFolder,
    start: Start,
    device: torch.device,
    train: LabelledData,
    val: LabelledData | None,
) -> Tuning:
    """The run with its network and optimiser, continued from the checkpoint if there is one."""
    cfg = start.cfg
    hold_to_quota()
    if device.type == "cpu":
        reuse_freed_memory()
    prefer_attention(cfg, device)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(cfg.train.seed)
        network = new_transformer(cfg) if backbone is None else backbone.model
        model = FineTuner(network.requires_grad_(True), plan_head(cfg, parts.classes, parts.several), cfg)
    model = model.to(device).train()
    o, f = cfg.optim, cfg.finetune
    groups = parameter_groups(model, f.layer_decay, f.head_lr)
    length = length_of(cfg, train.crops)
    run = Tuning(
        cfg=cfg,
        folder=folder,
        asked=start.asked,
        device=device,
        model=model,
        optimizer=torch.optim.AdamW(groups, lr=o.lr, betas=(o.betas[0], o.betas[1]), eps=o.eps, fused=True),
        scaler=make_scaler(cfg, device),
        schedules=make_schedules(cfg, length.steps_per_epoch),
        length=length,
        train=train,
        val=val,
        digest=train.digest(),
    )
    if start.checkpoint is not None:
        run.load(start.checkpoint, str(folder.root))
        start.checkpoint = None  # its copy of the weights is not needed any more
    return run


def _announce(run: Tuning, start: Start, parts: _Parts, backbone: Backbone | None) -> None:
    """Log the plan of the run in a few lines."""
    cfg, plan, length = run.cfg, run.model.plan, run.length
    notes = [*start.notes, *(backbone.notes if backbone else ()), *(parts.masks.notes if parts.masks else ())]
    for note in [*notes, *change_notes(start.changed, cfg, run.device.type, torch.cuda.is_available())]:
        log.info("%s", note)
    source = f"weights {backbone.source}, " if backbone else ""
    log.info("%srecipe %s on %s, %s", source, cfg.recipe, run.device, cfg.train.precision)
    names = ", ".join(plan.classes[:6]) + (", ..." if len(plan.classes) > 6 else "")
    how = f"{plan.head} head" + ("" if plan.dense else f" on {plan.pooling}")
    log.info("%s of %d classes (%s), %s, %d px", plan.task, len(plan.classes), names, how, plan.size)
    counts = [len(run.train), *(len(part) if part is not None else 0 for part in (run.val, parts.test))]
    batch = f"{length.batch} x {length.accumulate}" if length.accumulate > 1 else f"{length.batch}"
    log.info("%d samples to train, %d to validate, %d to test on", *counts)
    log.info("batch %s, %d steps per epoch, %d steps", batch, length.steps_per_epoch, run.schedules.steps)
    if length.batch < (cfg.train.batch_size or 1):
        log.info("fewer samples than train.batch_size=%d: a step takes %d", cfg.train.batch_size, length.batch)
    if run.val is None:
        log.info("nothing to validate on: the last network is kept, not the best")
    if not cfg.data.band_range and cfg.data.depth == "auto":
        log.info("the weights say nothing of bits and ranges: files of more than 8 bits are read by their type")
    if plan.size != cfg.views.global_size:
        log.info("positions interpolated from %d px, of the weights, to %d px", cfg.views.global_size, plan.size)
    if run.step:
        log.info("steps %d to %d", run.step, run.schedules.steps)


def _test(run: Tuning, test: LabelledData) -> None:
    """Measure the exported network on the test part: RUN/test.json and a line in the log."""
    model, _ = load_tuned(run.folder.model, run.device, run.cfg.train.precision)
    found = validate(model, test, run.length.batch, run.cfg.finetune.overlap)
    told = {"samples": len(test), "step": run.validations.step or run.step, **found}
    replace_text(run.folder.root / TESTED, json.dumps(told) + "\n")
    log.info("tested on %d samples: %s", len(test), ", ".join(f"{key} {value:.4f}" for key, value in found.items()))
