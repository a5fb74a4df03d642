"""The HTML page of a profile: summary, cards, plots, all numbers."""

from __future__ import annotations

from pera_fast.page import Section, grid, render
from pera_fast.profile.fits import CARDS, CONTEXT, FRAGMENTATION, GB
from pera_fast.profile.tables import (
    GIB,
    Profile,
    breakdown_table,
    comparison_table,
    fits_table,
    notes,
    points_table,
    predictions_table,
    work_table,
)

RESERVE = (
    f"A card's GB are counted as 10<sup>9</sup> bytes ({CARDS[0]} GB = {CARDS[0] * GB / GIB:.1f} GiB), the least that"
    f" is sold under that number. {CONTEXT / GB:.0f} GB of them is kept free for the CUDA context and libraries"
)
PREDICTED = (
    "From launches, bytes and FLOPs of the simulated step, each card's published rates, and the shares of them that an"
    " H200 was measured to reach; no other card was measured. A card need not hold the batch."
)
HOW = {
    "simulate": (
        "Nothing was run: the trainer's own step went over tensors without bytes (PyTorch's FakeTensorMode), and"
        " what was alive was counted from birth to death. The allocator's rounding, cuBLAS workspaces and the CUDA"
        " context are not in it."
    ),
    "cuda": "Real steps of the trainer on random crops, every point in a process of its own.",
    "cpu": (
        "Real steps of the trainer on random crops, every point in a process of its own. Resident memory holds the"
        " libraries too, and says nothing about a GPU."
    ),
}


def report_html(profile: Profile, pictures: dict[str, bytes]) -> str:
    """The page. ``pictures``: memory, and where there are any breakdown, ratios and throughput, as PNGs."""
    sections = [_memory(profile, pictures)]
    if "breakdown" in pictures:
        sections.append(
            Section(
                "What the bytes are",
                "Grays stay from step to step or come with the parameters; colours grow with the batch. Backward:"
                " gradients of activations, and gradients of parameters that are not summed yet.",
                pictures["breakdown"],
                "Bytes alive at the moment of a step at which most are.",
                grid(*breakdown_table(profile)),
            )
        )
    for title, text, (header, rows) in (
        ("Predicted ms a step", PREDICTED, predictions_table(profile)),
        ("Work of a step on a GPU", "By part of the step.", work_table(profile)),
    ):
        if rows:
            sections.append(Section(title, text, table=grid(header, rows)))
    if "ratios" in pictures:
        text = (
            "What the student does not see and is not to predict costs it nothing; what the teacher sees is not kept."
        )
        sections.append(Section("Mask ratios", text, pictures["ratios"], "At large batches; the rest is predicted."))
    if "throughput" in pictures:
        sections.append(
            Section("Speed", "Whole steps, data on the device already.", pictures["throughput"], "Median of the steps.")
        )
    header, rows = comparison_table(profile)
    if rows:
        sections.append(
            Section("Simulated against measured", "MiB that an image adds to the peak.", table=grid(header, rows))
        )
    header, rows = points_table(profile)
    failed = " ".join(line for line in notes(profile)[: sum(not p.ok for p in profile.points)])
    sections.append(Section("Points", failed or "All ran.", table=grid(header, rows)))
    machine = {key.replace("_", " "): str(value) for key, value in profile.machine.items() if value is not None}
    lead = f"{' '.join(str(claim) + '.' for claim in profile.claims)} {HOW[profile.device]}".strip()
    return render("Memory and speed against batch size", lead, _cards(profile), sections, machine)


def _cards(profile: Profile) -> dict[str, str]:
    """The key numbers."""
    cards: dict[str, str] = {}
    for claim in profile.claims[:2]:
        cards[f"less memory an image with the masks ({claim.recipe}, {claim.policy})"] = f"{claim.memory:.2f}x"
        cards[f"fewer FLOPs an image ({claim.recipe})"] = f"{claim.flops:.2f}x"
        if claim.speed is not None:
            cards[f"the images per second ({claim.recipe})"] = f"{claim.speed:.2f}x"
    if profile.predicts:
        for variant in list(profile.fits())[:3]:
            cards[f"largest batch on 80 GB, {variant.label()}"] = str(profile.largest(variant, 80) or "-")
    return cards


def _memory(profile: Profile, pictures: dict[str, bytes]) -> Section:
    text = "Peak = fixed + slope x batch."
    if profile.device == "simulate":
        text += (
            " The peak is the largest of several moments of a step, each a line of its own, so it may bend upwards:"
            " batches beyond those asked for are simulated too, and the last two give the line that predicts."
        )
    if profile.predicts:
        gaps = "" if profile.device == "cuda" else f", and {FRAGMENTATION:.0%} for the allocator's rounding and gaps"
        text += f" {RESERVE}{gaps}: set aside, not measured."
    caption = "Points: what was found. Lines: fitted; dashed: predicted."
    caption += " Gray: all bytes of a card." if profile.predicts else ""
    caption += " Crosses at the top: out of memory." if any(p.status == "out of memory" for p in profile.points) else ""
    return Section("Memory against batch size", text, pictures["memory"], caption, grid(*fits_table(profile)))
