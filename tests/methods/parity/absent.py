"""What mergekit and sd-mecha register and nothing here is compared with, by pattern, and why."""

from __future__ import annotations

ABSENT: dict[str, dict[str, str]] = {
    "mergekit": {"passthrough": "the expression's own arithmetic: `0.5 * a`"},
    "sd-mecha": {
        "scale": "the expression's own arithmetic: `0.5 * (a - b)`",
        "subtract": "the expression's own arithmetic: `a - b`",
        "add_opposite_mask": "not built: masks of one model's difference by another's",
        "add_strict_opposite_mask": "not built: masks of one model's difference by another's",
        "tensor_sum": "not built: replaces a range of rows by another model's",
        "top_k_tensor_sum": "not built: replaces the elements of certain ranks by another model's",
        "rotate": "not built: orthogonal Procrustes alignment",
        "truncate_kronecker": "not built: the nearest Kronecker product",
        "rebasin*": "of SDXL's permutations",
        "randperm*": "of SDXL's permutations",
        "balance_attention*": "of SDXL's attention",
        "exchange_ema*": "of SD 1's averaged weights",
        "fallback": "which model has a tensor is the plan's business",
        "*_component": "which tensors are used is the plan's business",
        "omit_non_finite": "a result that is not finite is an error, or kept by `--nonfinite keep`",
        "stack": "of sd-mecha's own graph",
        "get_*": "of sd-mecha's own graph",
        "cast": "of sd-mecha's own graph",
        "convert_*": "layouts: `mergetool convert`",
        "extract_*": "LoRAs: `mergetool diff`",
    },
}
