"""Gates: verdicts from stored numbers, never from the user's code. Pure numpy and scipy.

**What is judged.** `judge` reads a `RunRecord` (latency measurements, artifacts, the target), the paired bootstrap
replicates that the stage `verify` stored (accuracy, floors, robustness), and the stored release where one is named. A
missing number fails its gate.

**Bootstrap** (bootstrap.py). Clusters (scenes, drives) are drawn with replacement and their samples concatenated; both
models are scored on the same draw, so that what the samples have in common cancels in the difference. The draws depend
only on the cluster structure, the number of replicates and the seed: the clean condition and every failure use the same
draws as long as these three agree, which is what pairs them. With a single cluster, blocks of consecutive samples are
drawn instead, and every verdict says so.

**Interval** (intervals.py). 95 %, from the stored replicates and jackknife alone:

* 20 or more units (clusters or blocks): BCa (Efron 1987), read at the expanded level Phi(-t * sqrt(k / (k - 1))) in
  place of 2.5 % (Hesterberg 2015, "What Teachers Should Know About the Bootstrap", section 5), with t the quantile of
  Student's t at k - 1 degrees of freedom, for the quantiles of k units are too narrow when k is small;
* fewer: point +- t * standard error * sqrt(k / (k - 1)), to be shown; it is not trusted, and every gate that needs it
  is INCONCLUSIVE.

A draw in which a metric is undefined counts as the worst at either end; where an end falls among such draws there is
no interval, and the gate is INCONCLUSIVE. The interval is widened to hold the point estimate, so that no gate passes
with a value beyond its limit.

**Verdict** (verdicts.py, family.py). PASS where the whole interval is within the limit, FAIL where it is beyond, else
INCONCLUSIVE, with how many more samples would decide. FAILs of several gates are held together by Holm's procedure.

**replicates.npz**, schema 1 (plain arrays, no pickles, byte-identical for the same content), `<p>` being empty for the
clean condition and `robustness/<failure>/<severity>/` for a failure:

* `<p>dense/<metric>`, `<p>compressed/<metric>`: float64 (R,), row r of both is the same draw;
* `<p>dense_jackknife/<metric>`, `<p>compressed_jackknife/<metric>`: float64 (G,), units left out (optional);
* `<p>dense_point/<metric>`, `<p>compressed_point/<metric>`: float64 (), the metric over all samples;
* `constant_point/<metric>`: float64 (), what the best constant prediction reaches (optional);
* `meta/schema`, `meta/samples`, `meta/clusters`: int64 (); `meta/artifact_sha256`: text (), the judged ONNX, without
  which they count for none;
* `strata/<label>/...`: all of these but the last for the samples of one stratum, the label percent-encoded.

**Gate names**: `accuracy.<metric>`, `latency.mean_ms`, `latency.p99_ms`, `floors.<metric>`,
`floors.<metric>@<stratum>`, `robustness.<failure>` (extra drop), `robustness.<failure>.min` (absolute floor), with
`<failure>@<severity>` where the recipe writes it so, `release.<metric>` and `release.latency.mean_ms`.
"""

from __future__ import annotations

from fusepress.pipeline.gates.bootstrap import (
    Condition,
    Score,
    Stats,
    block_length,
    bootstrap_replicates,
    compare,
    jackknife_values,
    unit_count,
)
from fusepress.pipeline.gates.family import NO_GATE, FailOn, exit_code, overall, together
from fusepress.pipeline.gates.intervals import CONFIDENCE, TRUSTED_UNITS, Interval, bca_levels, interval
from fusepress.pipeline.gates.judging import judge
from fusepress.pipeline.gates.release import Baseline, load_baseline, make_baseline, save_baseline
from fusepress.pipeline.gates.replicates import (
    REPLICATES_NPZ,
    Direction,
    Replicates,
    drop_interval,
    extra_drop_interval,
    load_replicates,
    metric_intervals,
    save_replicates,
)
from fusepress.pipeline.gates.verdicts import Finding, more_needed

__all__ = [
    "CONFIDENCE",
    "NO_GATE",
    "REPLICATES_NPZ",
    "TRUSTED_UNITS",
    "Baseline",
    "Condition",
    "Direction",
    "FailOn",
    "Finding",
    "Interval",
    "Replicates",
    "Score",
    "Stats",
    "bca_levels",
    "block_length",
    "bootstrap_replicates",
    "compare",
    "drop_interval",
    "exit_code",
    "extra_drop_interval",
    "interval",
    "jackknife_values",
    "judge",
    "load_baseline",
    "load_replicates",
    "make_baseline",
    "metric_intervals",
    "more_needed",
    "overall",
    "save_baseline",
    "save_replicates",
    "together",
    "unit_count",
]
