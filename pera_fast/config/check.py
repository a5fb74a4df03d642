"""Rules that a configuration must fulfil, each with its one-line message."""

import math
from collections.abc import Mapping
from typing import Any

from pera_fast.config.keys import KEYS, did_you_mean, flatten, show, wants
from pera_fast.config.tree import Config, band_key
from pera_fast.errors import UserError
from pera_fast.paths import refuse_url


def check(cfg: Config) -> None:
    """Raises UserError, naming the key to change, if the configuration cannot be run."""
    values = flatten(cfg)
    for key in KEYS:
        check_value(key, values[key])
    for key, path in (
        ("data.index", cfg.data.index),
        ("eval.data", cfg.eval.data),
        ("eval.root", cfg.eval.root),
        ("train.init_from", cfg.train.init_from),
    ):
        refuse_url(key, path or "")
    _check_sizes(cfg)
    _check_masks(cfg)
    _check_bands(cfg)
    _check_channels(cfg)
    _check_lengths(cfg)
    _check_teacher(cfg)
    if cfg.train.cuda_graph == "true" and cfg.loss.centering == "sinkhorn":
        raise fail("train.cuda_graph", True, "goes with loss.centering=center only, not with sinkhorn")


def fail(key: str, value: object, why: str) -> UserError:
    """The error about one key, for raising."""
    return UserError(f"{key}={show(value)}: {why}")


def check_value(key: str, value: Any) -> None:
    """Check the rules that stand beside a key in the tree, on a value of the key's type."""
    rule = KEYS[key].metadata
    if value is None:
        return  # whether null is allowed is a matter of type
    items = value if isinstance(value, list) else [value]
    for item in items if "choices" in rule else ():
        if item not in rule["choices"]:
            named = f"{show(item)} is none of them; " if isinstance(value, list) else ""
            raise fail(key, value, f"{named}allowed: {wants(key)}{did_you_mean(item, rule['choices'])}")
        if items.count(item) > 1:
            raise fail(key, value, f"names {item} {items.count(item)} times")
    for v in items:
        if isinstance(v, float) and not math.isfinite(v):
            raise fail(key, value, f"wants {wants(key)}, and finite")
        if isinstance(v, (int, float)) and not _within(v, rule):
            raise fail(key, value, f"wants {wants(key)}")
    if rule.get("rising") and (len(value) != 2 or value[0] > value[1]):
        raise fail(key, value, "wants two numbers [smallest,largest]")


def _within(v: float, rule: Mapping[str, float]) -> bool:
    return (
        v >= rule.get("low", -math.inf)
        and v <= rule.get("high", math.inf)
        and ("above" not in rule or v > rule["above"])
        and ("below" not in rule or v < rule["below"])
    )


def _check_sizes(cfg: Config) -> None:
    m, v = cfg.model, cfg.views
    for name in ("global_size", "local_size"):
        if name == "local_size" and v.num_local == 0:
            continue
        size = getattr(v, name)
        if size % m.patch_size:
            near = sorted({max(size // m.patch_size, 1) * m.patch_size, (size // m.patch_size + 1) * m.patch_size})
            why = f"must be a multiple of model.patch_size={m.patch_size}; nearest: {' or '.join(map(str, near))}"
            raise fail(f"views.{name}", size, why)
    if cfg.eval.size is not None and cfg.eval.size % m.patch_size:
        raise fail("eval.size", cfg.eval.size, f"must be a multiple of model.patch_size={m.patch_size}")
    if m.embed_dim % m.num_heads:
        heads = [h for h in range(1, min(m.embed_dim, 2**16) + 1) if m.embed_dim % h == 0]
        close = sorted(sorted(heads, key=lambda h: abs(h - m.num_heads))[:4])
        why = f"must divide model.embed_dim={m.embed_dim}; nearest that do: {', '.join(map(str, close))}"
        raise fail("model.num_heads", m.num_heads, why)


def _check_teacher(cfg: Config) -> None:
    m = cfg.model
    if m.teacher_precision != "fp8":
        return
    if cfg.train.precision != "bf16":
        why = f"goes with train.precision=bf16 only, not with {cfg.train.precision}: the products' results are bf16"
        raise fail("model.teacher_precision", "fp8", why)
    sizes = {"model.embed_dim": m.embed_dim, "model.mlp_ratio x model.embed_dim": int(m.embed_dim * m.mlp_ratio)}
    for name, size in sizes.items():
        if size % 16:
            raise fail("model.teacher_precision", "fp8", f"wants multiples of 16, and {name} is {size}")


def _check_masks(cfg: Config) -> None:
    m, v = cfg.model, cfg.views
    if m.masking == "none":
        for name in ("student_ratio", "teacher_ratio"):
            if getattr(m, name) != 1:
                why = "model.masking=none shows every patch to both networks; allowed with it: 1.0"
                raise fail(f"model.{name}", getattr(m, name), why)
        return
    if m.student_ratio + m.teacher_ratio > 1 + 1e-9:
        room = round(1 - m.teacher_ratio, 6)
        why = (
            f"with model.teacher_ratio={show(m.teacher_ratio)} the sum is over 1, and the masks are disjoint;"
            f" allowed: at most {show(room)} (or model.masking=none, where both see everything)"
        )
        raise fail("model.student_ratio", m.student_ratio, why)
    crops = [("global", v.global_size)] + ([("local", v.local_size)] if v.num_local else [])
    for crop, size in crops:
        total = (size // m.patch_size) ** 2
        student, predicted, teacher = m.patch_counts(total)
        for name, count in (("student", student), ("teacher", teacher)):
            if count == 0:
                why = (
                    f"the {name} would see no patch of a {crop} crop ({total} patches: {student} student, {predicted}"
                    f" between, {teacher} teacher); make this ratio or views.{crop}_size={size} larger"
                )
                raise fail(f"model.{name}_ratio", getattr(m, f"{name}_ratio"), why)


def _check_bands(cfg: Config) -> None:
    channels, bands, rgb = cfg.model.in_chans, cfg.data.bands, cfg.views.rgb_bands
    if bands is not None:
        if len(bands) != channels:
            why = f"has {len(bands)} band(s), wants one per channel: model.in_chans={channels}"
            raise fail("data.bands", bands, why)
        _distinct("data.bands", bands)
    if rgb:
        _distinct("views.rgb_bands", rgb)
        known = bands or list(range(1, channels + 1))
        if len(rgb) != 3:
            raise fail("views.rgb_bands", rgb, "wants the bands of red, green and blue, or [] for none")
        for band in rgb:
            if band_key(band) not in [band_key(other) for other in known]:
                where = f"data.bands={show(bands)}" if bands else f"the {channels} band(s), which are 1 to {channels}"
                raise fail("views.rgb_bands", rgb, f"{band} is not among {where}")
    band_scale(cfg)
    _check_ranges(cfg)


def _distinct(key: str, bands: list[int | str]) -> None:
    names = [band_key(band) for band in bands]
    for band, name in zip(bands, names, strict=True):
        if names.count(name) > 1:
            raise fail(key, bands, f"names the band {band} twice")


def band_scale(cfg: Config) -> tuple[float, float] | float | None:
    """data.band_scale: (low, high) percentiles, the number that divides, or None (auto, given). Raises UserError."""
    text = cfg.data.band_scale.replace(" ", "")
    if text in ("auto", "given"):
        return None
    method, _, rest = text.partition(":")
    try:
        numbers = [float(word) for word in rest.split(",")]
    except ValueError:
        numbers = []
    if method == "percentile" and len(numbers) == 2 and 0 <= numbers[0] < numbers[1] <= 100:
        return numbers[0], numbers[1]
    if method == "divide" and len(numbers) == 1 and 0 < numbers[0] < math.inf:
        return numbers[0]
    why = "allowed: auto | percentile:LOW,HIGH (0 to 100, rising) | divide:NUMBER (above 0) | given (data.band_range)"
    raise fail("data.band_scale", cfg.data.band_scale, why)


def _check_ranges(cfg: Config) -> None:
    ranges = cfg.data.band_range
    if ranges is None:
        if cfg.data.band_scale == "given":
            raise fail("data.band_scale", "given", "wants data.band_range=[[low,high],...] with it")
        return
    if len(ranges) not in (1, cfg.model.in_chans):
        why = f"has {len(ranges)} pairs, wants one per channel (model.in_chans={cfg.model.in_chans}) or one for all"
        raise fail("data.band_range", ranges, why)
    for low, high in ranges:
        if not (math.isfinite(low) and math.isfinite(high) and low < high):
            raise fail("data.band_range", ranges, f"wants low < high, and finite: [{show(low)},{show(high)}]")


def _check_channels(cfg: Config) -> None:
    for name in ("mean", "std"):
        values = getattr(cfg.views, name)
        if len(values) != cfg.model.in_chans:
            why = f"has {len(values)} numbers, wants one per channel: model.in_chans={cfg.model.in_chans}"
            raise fail(f"views.{name}", values, why)


def _check_lengths(cfg: Config) -> None:
    o, t = cfg.optim, cfg.train
    if len(o.betas) != 2:
        raise fail("optim.betas", o.betas, "wants two numbers such as [0.9,0.999]")
    for name in ("warmup_epochs", "teacher_temp_warmup_epochs"):
        if getattr(o, name) > t.epochs:
            why = f"is longer than train.epochs={t.epochs}; allowed: at most that"
            raise fail(f"optim.{name}", getattr(o, name), why)
    if t.total_batch_size is None:  # a total is checked once the number of devices is known
        t.resolve_batch(1)
