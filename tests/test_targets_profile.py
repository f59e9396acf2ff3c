"""Profiles: every shipped one loads and adds up; every mistake in a file is told in words."""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from fusepress.pipeline.errors import TargetError
from fusepress.targets.legality import check_legality
from fusepress.targets.profile import PROFILE_FOLDER, TOPS_TOLERANCE, list_profiles, load_profile, profile_path
from fusepress.targets.roofline import constants_of

ORIN = "jetson-agx-orin-64gb"
DEVICES_CSV = Path(__file__).resolve().parents[2] / "shared" / "targets" / "devices.csv"


def edited(tmp_path: Path, **changes: Any) -> Path:
    """A copy of the Orin profile with some keys changed; None removes one."""
    raw = yaml.safe_load((PROFILE_FOLDER / f"{ORIN}.yaml").read_text())
    for key, value in changes.items():
        *parents, last = key.split("__")
        place = raw
        for parent in parents:
            place = place[int(parent)] if isinstance(place, list) else place[parent]
        if value is None:
            del place[last]
        else:
            place[last] = value
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(raw))
    return path


@pytest.mark.parametrize("name", list_profiles())
def test_every_shipped_profile_loads_and_bears_its_own_name(name: str) -> None:
    profile = load_profile(name)
    assert profile.name == name
    assert profile.opset == (17 if profile.software[0].tensorrt.startswith("8.") else 18)
    assert all(profile.peak_tops("fp16", mode) > 0 for mode in profile.power_modes)
    assert ("fp8" in profile.precisions) == (float(profile.compute_capability or 0) >= 8.9)
    assert profile.sparsity_2to4 == (float(profile.compute_capability or 0) >= 8.0)


@pytest.mark.parametrize("name", [name for name in list_profiles() if load_profile(name).declared])
def test_sm_times_clock_times_operations_closes_the_declared_total(name: str) -> None:
    profile = load_profile(name)
    for claim in profile.declared:
        mode = profile.power_modes[profile.default_mode]
        ops = profile.ops_per_clock_per_sm[claim.rate].value * (2 if claim.sparse else 1)
        derived = mode.sm_count * mode.gpu_mhz * ops / 1e6
        if claim.with_dla:
            assert profile.dla is not None
            derived += profile.dla.cores * mode.dla_mhz * profile.dla.int8_ops_per_clock * 2 / 1e6
        assert derived == pytest.approx(claim.value, rel=TOPS_TOLERANCE)


def test_the_dense_int8_rate_of_agx_orin_is_85_and_not_275() -> None:
    profile = load_profile(ORIN)
    assert profile.peak_tops("int8") == pytest.approx(85.2, abs=0.1)
    assert profile.dla_tops() == pytest.approx(52.4, abs=0.1)
    assert profile.peak_tops("int8", sparse=True) + profile.dla_tops(sparse=True) == pytest.approx(275, rel=0.01)


def test_the_families_that_are_promised_are_there() -> None:
    profiles = [load_profile(name) for name in list_profiles()]
    assert sum(profile.family in ("desktop", "workstation") for profile in profiles) >= 10
    orin = [p for p in profiles if p.compute_capability == "8.7" and p.family == "jetson"]
    assert len(orin) == 11
    assert all(len(p.power_modes) >= 4 for p in orin if p.name != "jetson-agx-orin-industrial")
    assert {"drive-agx-orin", "jetson-agx-thor-t5000", "drive-agx-thor", "host-cpu"} <= set(list_profiles())


@pytest.mark.skipif(not DEVICES_CSV.exists(), reason="the device table is not beside the repository")
def test_profiles_agree_with_the_device_table() -> None:
    with DEVICES_CSV.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["name"] for row in rows} == set(list_profiles()) - {"host-cpu"}
    for row in rows:
        profile = load_profile(row["name"])
        assert profile.peak_tops("fp16") == pytest.approx(float(row["fp16_tc_dense_tflops"]), rel=TOPS_TOLERANCE)
        assert profile.mode().dram_gbps == float(row["dram_gbps"])
        assert profile.mode().sm_count == int(row["sm_count"])


def test_recalled_figures_are_marked_unconfirmed() -> None:
    for name in list_profiles():
        profile = load_profile(name)
        recalled = {where for where, part in profile.sourced() if "recalled" in profile.sources[part.source]}
        assert recalled <= set(profile.unconfirmed)
    assert "l2_mib" in load_profile("jetson-orin-nx-16gb").unconfirmed
    assert "power_modes.MAXN" not in load_profile(ORIN).unconfirmed


def test_a_power_mode_is_chosen_by_name() -> None:
    profile = load_profile(ORIN)
    assert profile.mode().gpu_mhz == 1300.5
    assert profile.mode("30W").sm_count == 8
    assert profile.peak_tops("int8", "15W") == pytest.approx(10.03, abs=0.01)
    with pytest.raises(
        TargetError, match=r"expected a power mode of jetson-agx-orin-64gb, one of MAXN, 50W.*got '60W'"
    ):
        profile.mode("60W")


@pytest.mark.parametrize(
    ("asked", "hint"),
    [("jetson-agx-orin", "jetson-agx-orin-64gb"), ("rtx4090", "rtx-4090"), ("orin-nano", "jetson-orin-nano")],
)
def test_an_unknown_name_is_refused_with_close_matches(asked: str, hint: str) -> None:
    with pytest.raises(TargetError, match=rf"got '{asked}'; did you mean .*{hint}.*targets ls"):
        load_profile(asked)


def test_a_yaml_file_beside_the_recipe_works(tmp_path: Path) -> None:
    edited(tmp_path, name="my-ecu")
    assert load_profile("mine.yaml", base=tmp_path).name == "my-ecu"
    assert load_profile(tmp_path / "mine.yaml").name == "my-ecu"
    assert profile_path(ORIN).parent == PROFILE_FOLDER


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"memmory_gib": 3}, r"expected only known keys; got 'memmory_gib' at .*mine\.yaml; write 'memory_gib'"),
        ({"power_modes__MAXN__gpu_mhzz": 3}, r"got 'power_modes\.MAXN\.gpu_mhzz' at .*; write 'gpu_mhz'"),
        ({"zebra": 1}, r"got 'zebra' at .*; remove it"),
        ({"memory_gib": None}, r"expected a value for 'memory_gib'; got none at .*; add it"),
        ({"power_modes__MAXN__gpu_mhz": -5}, r"greater than 0; got -5 at .*power_modes\.MAXN\.gpu_mhz; correct it"),
        ({"power_modes__MAXN__sm_count": "many"}, r"got 'many' at .*power_modes\.MAXN\.sm_count"),
        ({"family": "toaster"}, r"expected input should be 'jetson', 'drive'.*got 'toaster' at .*: family"),
        ({"default_mode": "60W"}, r"default_mode must be one of .*got '60W'"),
        ({"precisions": ["fp32", "fp64"]}, r"got 'fp64' at .*precisions\.1"),
        ({"precisions": ["fp32", "fp8"]}, r"channel_multiple must name every allowed precision; fp8 is missing"),
        ({"ops_per_clock_per_sm__int8": None}, r"ops_per_clock_per_sm must name .* int8 is missing"),
        ({"memory_gib__source": "hearsay"}, r"memory_gib\.source must be a key of `sources`.*got 'hearsay'"),
        ({"ops_per_clock_per_sm__tf32__confirmed": True}, r"tf32 must carry `confirmed: false`.*recalled"),
        ({"declared__0__value": 300}, r"declared\.0 must equal SM x clock x operations within 2\.5%.*declared 300"),
        ({"opset": 23}, r"less than or equal to 20; got 23 at .*: opset"),
        ({"compute_capability": None}, r"compute_capability must be given for runtime tensorrt"),
        ({"schema": 2}, r"expected input should be 1; got 2 at .*: schema"),
    ],
)
def test_a_file_that_does_not_fit_names_file_key_and_remedy(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(TargetError, match=message):
        load_profile(edited(tmp_path, **changes))


def test_files_that_cannot_be_read_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(TargetError, match=r"expected a readable target file; got none at .*gone\.yaml"):
        load_profile(tmp_path / "gone.yaml")
    (tmp_path / "bad.yaml").write_text("a: [1,\n")
    with pytest.raises(TargetError, match=r"expected YAML; got a file that does not parse at .*bad\.yaml"):
        load_profile(tmp_path / "bad.yaml")
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(TargetError, match=r"expected a mapping of profile fields; got list .*targets cp"):
        load_profile(tmp_path / "list.yaml")


@pytest.mark.parametrize(
    ("name", "precision", "sparsity", "message"),
    [
        (ORIN, "fp16", True, None),
        (ORIN, "int8", True, None),
        (
            ORIN,
            "fp8",
            False,
            r"expected a precision that jetson-agx-orin-64gb \(GA10B, SM 8\.7\).*got FP8 .*SM 8\.9.*int8",
        ),
        ("drive-agx-orin", "fp8", False, r"got FP8 at quantize\.precision"),
        ("jetson-agx-thor-t5000", "fp8", True, None),
        ("rtx-4090", "fp8", True, None),
        ("rtx-3090", "fp8", False, r"got FP8"),
        ("rtx-3090", "int8", True, None),
        ("t4", "int8", False, None),
        ("t4", "int8", True, r"expected a target with 2:4 sparsity; got t4 .*SM 8\.0; remove `sparsify`"),
        ("v100-sxm2", "int8", False, r"got INT8 .*no INT8 tensor cores; set `quantize: \{precision: fp16\}`"),
        ("host-cpu", "fp32", False, None),
        ("host-cpu", "int8", False, None),
        ("host-cpu", "fp8", False, r"ONNX Runtime's CPU kernels do not compute in it"),
        ("host-cpu", "int8", True, r"no CPU kernel of ONNX Runtime uses it"),
        (ORIN, "bf16", False, r"got BF16 at quantize\.precision: its runtime has no kernels"),
    ],
)
def test_what_a_target_cannot_do_is_refused(name: str, precision: str, sparsity: bool, message: str | None) -> None:
    profile = load_profile(name)
    if message is None:
        assert check_legality(profile, precision, sparsity=sparsity) == precision
        return
    with pytest.raises(TargetError, match=message):
        check_legality(profile, precision, sparsity=sparsity)


def test_the_opset_is_bounded_by_the_target() -> None:
    check_legality(load_profile(ORIN), "fp16", opset=20)
    with pytest.raises(TargetError, match=r"opset from 9 to 20 for jetson-agx-orin-64gb .*TensorRT 10\.3\); got 23"):
        check_legality(load_profile(ORIN), "fp16", opset=23)
    with pytest.raises(TargetError, match=r"opset from 9 to 17 for drive-agx-orin .*got 18; export with opset 17"):
        check_legality(load_profile("drive-agx-orin"), "fp16", opset=18)


def test_a_scatter_lowers_the_opset_where_tensorrt_is_older_than_10_9() -> None:
    assert load_profile(ORIN).opset_for({"Conv", "ScatterND"}) == 17
    assert load_profile(ORIN).opset_for({"Conv"}) == 18
    assert load_profile("rtx-4090").opset_for({"ScatterND"}) == 18


def test_channels_align_to_whole_vectors() -> None:
    profile = load_profile(ORIN)
    assert [profile.align(p) for p in ("fp32", "fp16", "int8")] == [8, 8, 16]
    assert profile.align("fp16", sparsity=True) == 16
    with pytest.raises(TargetError, match=r"expected a precision of jetson-agx-orin-64gb.*got 'fp8'"):
        profile.align("fp8")


def test_reading_profiles_imports_neither_torch_nor_onnx() -> None:
    code = (
        "import sys; from fusepress.targets import legality, measure, predict, profile; "
        "profile.load_profile('rtx-4090'); "
        "print([m for m in ('torch', 'onnx', 'onnxruntime', 'scipy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_file_beside_the_recipe_wins_and_inherits_what_it_leaves_out(tmp_path: Path) -> None:
    own = {
        "inherits": ORIN,
        "name": ORIN,
        "power_modes": {"bench": {"sm_count": 16, "gpu_mhz": 1100, "dram_gbps": 200, "source": "mine"}},
        "sources": {"mine": "our board"},
    }
    (tmp_path / f"{ORIN}.yaml").write_text(yaml.safe_dump(own))
    shipped, found = load_profile(ORIN), load_profile(ORIN, base=tmp_path)
    assert set(found.power_modes) == {*shipped.power_modes, "bench"}
    assert found.mode("bench").gpu_mhz == 1100
    assert found.ops_per_clock_per_sm == shipped.ops_per_clock_per_sm
    assert found.sources == shipped.sources | {"mine": "our board"}
    assert load_profile("t4", base=tmp_path) == load_profile("t4")


def test_inheritance_from_what_does_not_exist_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("inherits: jetson-agx-orin\n")
    with pytest.raises(TargetError, match=r"got 'jetson-agx-orin'; did you mean .*jetson-agx-orin-64gb"):
        load_profile(path)


def test_traps_are_told_for_what_they_concern() -> None:
    nx = load_profile("jetson-orin-nx-16gb")
    assert any("408 MHz" in text for text in nx.warnings("fp16", "25W"))
    assert not any("408 MHz" in text for text in nx.warnings("fp16", "15W"))
    assert any("never 2x" in text for text in nx.warnings("int8"))
    assert not any("never 2x" in text for text in nx.warnings("fp16"))
    assert any("no document stands behind l2_mib" in text for text in nx.warnings("fp16"))
    assert any(
        "power_modes.MAXN_SUPER" in t for t in load_profile("jetson-orin-nano-8gb").warnings("fp16", "MAXN_SUPER")
    )


def test_a_trap_of_an_unknown_mode_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TargetError, match=r"traps must name power modes of .*got \['99W'\]"):
        load_profile(edited(tmp_path, traps=[{"text": "slow", "modes": ["99W"]}]))


def test_constants_of_another_version_are_refused(tmp_path: Path) -> None:
    fit = {
        "constants": {"compute_fp16": 0.5}, "stream_ms": 0.005, "devices": {}, "gmacs": {}, "precisions": {}, "ops": [],
        "shares": {}, "known": 1.2, "sibling": 1.3, "rows": 3, "command": "fusepress targets fit measured.yaml",
    }  # fmt: skip
    with pytest.raises(TargetError, match=r"expected the constants .*got \['compute_fp16'\] at latency\.constants of"):
        constants_of(load_profile(edited(tmp_path, latency=fit)))
