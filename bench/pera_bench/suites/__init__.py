"""Benchmark suites, one module each, in the order in which a training step calls them.

A suite has `CASES` (name -> directions), `IMPLEMENTATIONS` (names, or the name of the op in `pera_kernels.backend`
whose implementations they are) and `make(point, case)`, which gives a `Work` or a `Whole`. Bytes and FLOPs are stated
there and nowhere else; the READMEs of the ops say where they come from.
"""

OPS = (
    "contrast_mean",
    "visible_patches",
    "embed_tokens",
    "sequence_norm",
    "attention",
    "sequence_add",
    "add_norm",
    "gelu",
    "linear_gelu",
    "query_attention",
    "cls_attention",
    "add_norm_fp8",
    "gelu_fp8",
    "quantize_rows",
    "mask_tokens",
    "column_sums",
    "transposed",
    "unit_rows",
    "distillation_loss",
    "koleo",
    "prototype_losses",
    "pixel_loss",
)
WHOLES = ("block", "update", "step", "crop_resize", "data")
SUITES = (*OPS, *WHOLES)
