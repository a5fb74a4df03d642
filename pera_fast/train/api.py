"""`pretrain`: trains on a folder of images and exports the teacher's weights."""

import hashlib
import logging
import os
from collections.abc import Sequence
from contextlib import ExitStack
from os import PathLike
from pathlib import Path
from stat import S_ISDIR
from typing import Literal

import torch

from pera_fast.config import Config
from pera_fast.data.bands.sensor import adopt, describe
from pera_fast.data.files.manifest import Manifest
from pera_fast.data.files.shards import file_of
from pera_fast.data.files.skipped import SkippedFiles
from pera_fast.data.index.build import open_or_build
from pera_fast.data.loading.decode_on import pixels
from pera_fast.data.loading.decode_on import plan as plan_decoding
from pera_fast.data.loading.loader import Loader
from pera_fast.data.loading.streams import step_stream
from pera_fast.errors import UserError
from pera_fast.model.export import export_teacher
from pera_fast.model.inputs import StepInputs
from pera_fast.model.pera import PerA
from pera_fast.run_result import RunResult
from pera_fast.storage import Storage, mode
from pera_fast.train.attention import describe_attention, prefer_attention
from pera_fast.train.compute_copies import make_copies
from pera_fast.train.console import RunLog
from pera_fast.train.distributed import World, collective_timeout, world
from pera_fast.train.early import let_main_speak, write_finished
from pera_fast.train.environment import check_environment, check_launcher
from pera_fast.train.flops import fastest_rate
from pera_fast.train.fused_update import make_update
from pera_fast.train.graph import choose_graph
from pera_fast.train.host_memory import reuse_freed_memory
from pera_fast.train.host_threads import hold_to_quota
from pera_fast.train.init_from import Initial, initialise, read_initial
from pera_fast.train.inputs import make_inputs
from pera_fast.train.loop import Run, fit
from pera_fast.train.memory_plan import choose_recompute, loader_bytes
from pera_fast.train.optim import make_optimizer, make_scaler
from pera_fast.train.probe import Probe, labelled
from pera_fast.train.run_folder import (
    RunFolder,
    Start,
    change_notes,
    check_resumed_batch,
    resumed_position,
    start_auto,
    start_new,
    start_resumed,
)
from pera_fast.train.schedules import make_schedules
from pera_fast.train.signals import StopRequest, exit_on_termination
from pera_fast.train.step import make_graph
from pera_fast.train.teacher_precision import check_teacher_precision

log = logging.getLogger(__name__)

LOOKED_FOR = 32  # of the run's images, before another folder is taken for a mistake


def pretrain(
    data: str | PathLike[str],
    out: str | PathLike[str],
    recipe: str | PathLike[str] | None = "vit_b16",
    resume: bool | Literal["auto"] = False,
    overrides: Sequence[str] = (),
) -> RunResult:
    """Pretrains on all images below `data`; everything that results lies in the run folder `out`.

    Under torchrun this is data-parallel. SIGINT, SIGTERM, SIGUSR1 and SIGHUP finish the step, write a checkpoint and
    return; their handlers are put back afterwards.

    Args:
        data: folder of images.
        out: run folder; new, empty, or with `resume` one that holds a run.
        recipe: see `pera_fast.config.recipe_names()`. None with `resume`: whichever the run has.
        resume: continue the run in `out` from its newest checkpoint. "auto": start it where `out` holds no run; the
            settings are then given in full each time and must be those of the run.
        overrides: `section.key=value` each.

    Raises:
        UserError: one line about what the user can mend.
    """
    folder = RunFolder(Path(out))
    try:
        check_launcher()
        if resume == "auto":
            start = start_auto(folder, recipe or "vit_b16", overrides)
        elif resume:
            start = start_resumed(folder, recipe, overrides)
        else:
            start = start_new(folder, recipe or "vit_b16", overrides)
        check_environment(start, folder, Path(data))
        joined = world(start.cfg.train.device, collective_timeout(start.cfg))
        with exit_on_termination(), joined as here, ExitStack() as stack:
            here.barrier()  # all ranks have looked at the folder before rank 0 writes there
            here.on_main(lambda: stack.enter_context(folder.opened()))
            stack.enter_context(RunLog(folder.log if here.main else None))
            stack.enter_context(step_stream(here.device))
            return _pretrain(Path(data), folder, start, here)
    except UserError as error:
        let_main_speak(error)
        raise


def _pretrain(data: Path, folder: RunFolder, start: Start, here: World) -> RunResult:
    cfg = start.cfg
    plan = cfg.train.resolve_batch(here.size)
    choose_graph(cfg, here.device)  # what cannot be is said before anything else
    check_teacher_precision(cfg, here.device)
    if start.checkpoint:
        check_resumed_batch(start.checkpoint, plan.total, here.size)
    initial = None if start.checkpoint else read_initial(cfg)
    probed = here.on_main(lambda: labelled(cfg))  # before the images are indexed, which may take long
    manifest = _open_data(data, folder, start, here)
    start.cfg = cfg = adopt(cfg, manifest)
    position = 0
    if start.checkpoint:
        position, note = resumed_position(start.checkpoint, plan.total, here.size, len(manifest.readable))
        start.notes += [note] if note else []
    start.notes += change_notes(start.changed, cfg, here.device.type, torch.cuda.is_available())
    for note in start.notes:
        log.info("%s", note)
    rate = fastest_rate(cfg, here.device)
    decoding = plan_decoding(cfg, manifest, here.device, ranks=here.size, step_rate=rate)
    with StopRequest() as stop:  # from here on a signal waits for the next step's end
        loader = Loader(
            cfg, manifest,
            batch_size=plan.per_device, accumulate=plan.accumulate, rank=here.rank, world_size=here.size,
            device=here.device, skipped=SkippedFiles(folder.skipped), start_micro_step=position * plan.accumulate,
            transform=lambda batch: make_inputs(batch, cfg, here.rank), decoding=decoding,
            asked_to_stop=lambda: bool(stop.exit_code),
        )  # fmt: skip
        try:
            run = _build(folder, start, here, manifest, loader, initial)
            run.position = position
            run.probe = here.on_main(lambda: None if probed is None else Probe(cfg, run.pera, probed, folder.best))
            if here.main:
                folder.finished.unlink(missing_ok=True)
                if not start.resumed:
                    folder.loggers.unlink(missing_ok=True)  # of a run whose other files were deleted
                folder.cut_metrics(run.step)
            _announce(run)
            log.info("%s", decoding)
            code, metrics = fit(run, stop)
            if here.main and not code:
                write_finished(folder, run.step, run.position, loader.steps_per_epoch, plan.total)
            here.barrier()  # rank 0 may still be writing
        finally:
            loader.close()
    log.info("%s after %d steps: %s", "stopped" if code else "done", run.step, folder.root)
    return RunResult(code, folder.root, run.step, metrics)


def _build(
    folder: RunFolder,
    start: Start,
    here: World,
    manifest: Manifest,
    loader: Loader[StepInputs],
    initial: Initial | None = None,
) -> Run:
    """The run with its model and optimiser, continued from the checkpoint if there is one."""
    cfg = start.cfg
    hold_to_quota()
    if here.device.type == "cpu":
        reuse_freed_memory()
    prefer_attention(cfg, here.device)
    pera = make_model(cfg).to(here.device)  # while the first batches are read
    if initial is not None:
        initialise(pera, initial)
    plan, scaler = cfg.train.resolve_batch(here.size), make_scaler(cfg, here.device)
    beside = 0.0
    if here.device.type == "cuda":  # what the loader has taken by now counts twice, to be safe
        beside = loader_bytes(cfg, plan.per_device, loader.decoding, sum(pixels(manifest)))
    choice = choose_recompute(cfg, pera, here.device, plan.per_device, beside)
    pera.recompute = choice.policy
    if cfg.model.recompute == "auto":
        log.info("recompute: %s (%s)", choice.policy, choice.reason)
    graph = choose_graph(cfg, here.device)
    log.info("CUDA graph: %s (%s)", "yes" if graph.use else "no", graph.reason)
    log.info("attention: %s", describe_attention(cfg, here.device))
    model: torch.nn.Module = pera
    if graph.use:
        here.share_parameters(pera)
    else:
        model = here.wrap(pera, unused=_tokens(cfg)["global"][1] == 0)
    make_copies(pera)  # after rank 0's weights were sent to all: writing to a weight makes its copy stale
    optimizer = make_optimizer(pera.parameters(), cfg)
    run = Run(
        cfg=cfg,
        folder=folder,
        world=here,
        plan=plan,
        schedules=make_schedules(cfg, loader.steps_per_epoch),
        pera=pera,
        model=model,
        optimizer=optimizer,
        scaler=scaler,
        batches=loader,
        images=len(manifest.readable),
        data=_digest(manifest),
        export=export_teacher,
        begin=lambda: folder.write_config(cfg, start.asked),
        graph=make_graph(pera, scaler, plan.accumulate) if graph.use else None,
        update=make_update(pera, optimizer, scaler),
    )
    if start.checkpoint:
        run.load(start.checkpoint, str(folder.root))
        if (start.checkpoint["images"], start.checkpoint["data"]) != (run.images, run.data):
            log.warning(
                "the data is not what it was (%d readable images, now %d): going on, with other images per step",
                start.checkpoint["images"], run.images,
            )  # fmt: skip
        start.checkpoint = None  # its copy of the weights is not needed any more
    return run


def make_model(cfg: Config) -> PerA:
    """The model with the weights that `train.seed` gives, the same on every device; leaves the caller's RNG alone."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(cfg.train.seed)
        model = PerA(cfg)
    if cfg.train.compile:
        model.compile_blocks()
    return model


def _open_data(data: Path, folder: RunFolder, start: Start, here: World) -> Manifest:
    """The images of this run, the same on all ranks and after every resume.

    A new run keeps a copy of the data's index as it was. Resuming takes that copy, so that files which came, went or
    broke in the meantime do not shift what the other samples are.
    """

    def open_on_main() -> Manifest:
        if start.resumed and folder.index.exists():
            return _known_data(data, folder, start.cfg.data.storage_timeout)
        manifest = open_or_build(data, start.cfg)
        manifest.save(folder.index)
        return manifest

    return here.on_main(open_on_main) or _known_data(data, folder, start.cfg.data.storage_timeout)


def _known_data(data: Path, folder: RunFolder, timeout: float) -> Manifest:
    """The run's own index, for images that lie below `data` (perhaps moved since). Raises UserError if they do not."""
    storage = Storage(os.sep, timeout)  # where the images' folder is missing, that is the user's to mend
    if not S_ISDIR(mode(storage, data)):
        raise UserError(f"--data {data}: no such folder")
    try:
        manifest = Manifest.load(folder.index)
    except UserError as error:
        raise UserError(f"{error}; delete it, and the images are indexed anew") from None
    manifest.root = data.absolute()
    files = manifest.readable
    some = files.paths[:LOOKED_FOR].to_pylist()
    if not any(mode(storage, manifest.root / file_of(*row)) for row in zip(some, files.offset, strict=False)):
        raise UserError(
            f"--data {data}: holds none of the images that this run was started with (such as {some[0]});"
            " give the folder where they are now"
        )
    return manifest


def _digest(manifest: Manifest) -> str:
    """Digest of the readable images' names in order: runs with equal digests number their samples alike."""
    digest = hashlib.sha256()
    for chunk in manifest.readable.paths.chunks:
        for start in range(0, len(chunk), 2**14):
            paths = chunk.slice(start, 2**14).to_pylist()
            digest.update("\0".join([*paths, ""]).encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def _tokens(cfg: Config) -> dict[str, tuple[int, int, int]]:
    """(student, predicted, teacher) patches of a global and a local crop."""
    counts = {}
    for name, size in (("global", cfg.views.global_size), ("local", cfg.views.local_size)):
        counts[name] = cfg.model.patch_counts((size // cfg.model.patch_size) ** 2)
    return counts


def _announce(run: Run) -> None:
    """Log the plan of the run in a few lines."""
    cfg, device = run.cfg, run.world.device
    threads = torch.get_num_threads()
    cpu = f"CPU, {threads} thread{'s' if threads > 1 else ''}"
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu
    log.info("recipe %s on %s (%s), %s", cfg.recipe, device, name, cfg.train.precision)
    log.info("%s; %d images, %d steps per epoch", run.plan, run.images, run.batches.steps_per_epoch)
    log.info("%s", run.schedules)
    if told := describe(cfg):
        log.info("%s", told)
    student, predicted, teacher = _tokens(cfg)["global"]
    text = f"{cfg.views.num_global} global crops: {student} student, {predicted} predicted, {teacher} teacher patches"
    if cfg.views.num_local:
        student, _, teacher = _tokens(cfg)["local"]
        text += f"; {cfg.views.num_local} local crops: {student} student, {teacher} teacher patches"
    log.info("%s", text)
    if left := run.schedules.steps - run.place:
        log.info("steps %d to %d", run.step, run.step + left)
    else:
        log.info("all %d steps are done; with a greater train.steps the run goes on", run.step)
