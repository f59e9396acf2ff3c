"""What a target can run: refused before the first stage is paid for."""

from __future__ import annotations

from fusepress.pipeline.errors import TargetError
from fusepress.targets.profile import MAX_OPSET, Precision, Profile


def check_legality(profile: Profile, precision: str, *, sparsity: bool = False, opset: int | None = None) -> Precision:
    """Refuse what the target's hardware or runtime cannot do.

    Args:
        profile: the target.
        precision: what the release is to be built in.
        sparsity: whether 2:4 sparsity is asked for.
        opset: the ONNX opset that will be exported, if it was chosen by hand.

    Returns:
        The precision, now known to be one.

    Raises:
        TargetError: the precision, 2:4 sparsity or opset is not possible there.
    """
    checked = _check_precision(profile, precision)
    if sparsity:
        _check_sparsity(profile)
    if opset is not None:
        _check_opset(profile, opset)
    return checked


def _hardware(profile: Profile) -> str:
    capability = f", SM {profile.compute_capability}" if profile.compute_capability else ""
    return f"{profile.name} ({profile.arch}{capability})"


def _check_precision(profile: Profile, precision: str) -> Precision:
    for allowed in profile.precisions:
        if allowed == precision:
            return allowed
    reason = {
        "fp8": "FP8 tensor cores begin with SM 8.9",
        "int8": "it has no INT8 tensor cores",
    }.get(precision, "its runtime has no kernels for it")
    if profile.runtime == "onnxruntime":
        reason = "ONNX Runtime's CPU kernels do not compute in it"
    best = "int8" if "int8" in profile.precisions else "fp16"
    raise TargetError(
        f"expected a precision that {_hardware(profile)} can run, one of {', '.join(profile.precisions)}; "
        f"got {precision.upper()} at quantize.precision: {reason}; "
        f"set `quantize: {{precision: {best}}}` or choose another target"
    )


def _check_sparsity(profile: Profile) -> None:
    if profile.sparsity_2to4:
        return
    reason = (
        "no CPU kernel of ONNX Runtime uses it" if profile.family == "host" else "sparse tensor cores begin with SM 8.0"
    )
    raise TargetError(
        f"expected a target with 2:4 sparsity; got {_hardware(profile)} for the sparsify stage: {reason}; "
        "remove `sparsify` from the recipe or choose another target"
    )


def _check_opset(profile: Profile, opset: int) -> None:
    highest = profile.opset if profile.opset < 18 else MAX_OPSET
    if not 9 <= opset <= highest:
        release = profile.software[0]
        runs = "" if profile.runtime == "onnxruntime" else f" ({release.platform}, TensorRT {release.tensorrt})"
        raise TargetError(
            f"expected an ONNX opset from 9 to {highest} for {profile.name}{runs}; got {opset}; "
            f"export with opset {profile.opset}"
        )
