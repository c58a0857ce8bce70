-- The questions that are asked most, as macros over the views: SELECT … FROM layer_summary('llama-130m').
-- `run` is one run id, `runs` a list of them; a literal one reaches the list of files, so that only the files of these
-- runs are opened. The others are named `at_site`, `of_layer`, …, since DuckDB takes a parameter that is named as a column
-- for the column. docs/sql.md has the columns and an example of each.

-- The shares p of a spectrum, which sum to 1; all of it in the first direction where there is no variance. The total is the
-- parameter of a lambda of its own, since DuckDB would sum the list again for each of its elements.
CREATE OR REPLACE MACRO variance_shares(eigenvalues) AS
list_extract(list_transform(
    [list_sum(CAST(eigenvalues AS DOUBLE[]))],
    lambda total: list_transform(
        CAST(eigenvalues AS DOUBLE[]),
        lambda value, k: CASE WHEN total = 0 THEN CAST(k = 1 AS DOUBLE) ELSE value / total END
    )
), 1);

-- The rank of any order of a spectrum: exp of the Rényi entropy of its shares. 1 is the soft rank, 2 the hard rank,
-- 'infinity' one over the largest share. The higher the order, the less the tail counts.
CREATE OR REPLACE MACRO renyi_rank(eigenvalues, rank_order) AS
CASE
    WHEN rank_order = 1 THEN exp(-list_sum(list_transform(
        variance_shares(eigenvalues), lambda p: CASE WHEN p > 0 THEN p * ln(p) ELSE 0 END
    )))
    WHEN rank_order = CAST('infinity' AS DOUBLE) THEN 1 / list_max(variance_shares(eigenvalues))
    ELSE pow(list_sum(list_transform(
        variance_shares(eigenvalues), lambda p: CASE WHEN p > 0 THEN pow(p, rank_order) ELSE 0 END
    )), 1.0 / (1 - rank_order))
END;

-- The share of the variance in the first directions, a fraction of all of them.
CREATE OR REPLACE MACRO variance_share(eigenvalues, fraction) AS
list_sum(list_slice(variance_shares(eigenvalues), 1, CAST(ceil(fraction * len(eigenvalues)) AS BIGINT)));

-- Half of a 95 % interval in standard errors: Student's t at 0.975, exact to 1e-5 (beyond 30 by Cornish and Fisher).
CREATE OR REPLACE MACRO student_t_95(degrees) AS
CASE
    WHEN degrees < 1 THEN NULL
    WHEN degrees <= 30 THEN list_extract([
        12.706205, 4.302653, 3.182446, 2.776445, 2.570582, 2.446912, 2.364624, 2.306004, 2.262157, 2.228139,
        2.200985, 2.178813, 2.160369, 2.144787, 2.131450, 2.119905, 2.109816, 2.100922, 2.093024, 2.085963,
        2.079614, 2.073873, 2.068658, 2.063899, 2.059539, 2.055529, 2.051831, 2.048407, 2.045230, 2.042272
    ], CAST(degrees AS INTEGER))
    ELSE 1.959964 + 2.372271 / degrees + 2.822499 / pow(degrees, 2) + 2.555850 / pow(degrees, 3)
END;

-- One row a layer, expert and metric: the middle, spread and course of it over all its samples.
CREATE OR REPLACE MACRO layer_summary(run, at_site := 'post') AS TABLE
SELECT
    layer, expert, width, metric,
    count(value) AS samples,
    median(value) AS median,
    quantile_cont(value, 0.25) AS lower_quartile,
    quantile_cont(value, 0.75) AS upper_quartile,
    arg_max(value, step) AS last,
    max(step) FILTER (value IS NOT NULL) AS last_step,
    1000 * regr_slope(value, step) AS trend_per_1000_steps
FROM (
    SELECT record.layer, record.expert, record.width, record.step, unnest([
        {'metric': 'hard_rank', 'value': record.hard_rank},
        {'metric': 'soft_rank', 'value': record.soft_rank},
        {'metric': 'effective_dimension', 'value': record.effective_dimension},
        {'metric': 'hard_utilization', 'value': record.hard_utilization},
        {'metric': 'soft_utilization', 'value': record.soft_utilization},
        {'metric': 'spectral_concentration', 'value': record.spectral_concentration},
        {'metric': 'power_law_alpha', 'value': record.power_law_alpha}
    ], recursive := true)
    FROM records AS record
    WHERE record.run_id = run AND record.site = at_site
)
GROUP BY layer, expert, width, metric
ORDER BY layer, expert NULLS FIRST, metric;

-- Two runs side by side at the steps that both have sampled: one row a step, layer and expert.
CREATE OR REPLACE MACRO compare(run_a, run_b, at_site := 'post') AS TABLE
SELECT
    a.step, a.layer, a.expert,
    a.width AS width_a, b.width AS width_b,
    a.hard_rank AS hard_rank_a, b.hard_rank AS hard_rank_b,
    a.soft_rank AS soft_rank_a, b.soft_rank AS soft_rank_b,
    a.effective_dimension AS effective_dimension_a, b.effective_dimension AS effective_dimension_b,
    a.hard_utilization AS hard_utilization_a, b.hard_utilization AS hard_utilization_b,
    a.soft_utilization AS soft_utilization_a, b.soft_utilization AS soft_utilization_b,
    a.spectral_concentration AS spectral_concentration_a, b.spectral_concentration AS spectral_concentration_b,
    a.tokens_per_width AS tokens_per_width_a, b.tokens_per_width AS tokens_per_width_b
FROM (FROM records AS record WHERE record.run_id = run_a AND record.site = at_site) AS a
JOIN (FROM records AS record WHERE record.run_id = run_b AND record.site = at_site) AS b
    ON a.step = b.step AND a.layer = b.layer AND a.expert IS NOT DISTINCT FROM b.expert
ORDER BY a.step, a.layer, a.expert NULLS FIRST;

-- The points of a law, one a run and width, from records in three medians: over the experts of a layer at a step, over
-- the last part of the layer's samples, over the layers. The quartiles are those of the layers.
CREATE OR REPLACE MACRO width_points(runs, at_site := 'post', last := 0.1) AS TABLE
SELECT
    run_id, width, metric,
    median(value) AS value,
    quantile_cont(value, 0.25) AS lower_quartile,
    quantile_cont(value, 0.75) AS upper_quartile,
    count(value) AS layers
FROM (
    SELECT run_id, width, layer, metric, median(value) AS value
    FROM (
        SELECT run_id, width, layer, step, metric, median(value) AS value
        FROM (
            SELECT run_id, width, layer, step, unnest([
                {'metric': 'hard_rank', 'value': hard_rank},
                {'metric': 'soft_rank', 'value': soft_rank},
                {'metric': 'effective_dimension', 'value': effective_dimension},
                {'metric': 'hard_utilization', 'value': hard_utilization},
                {'metric': 'soft_utilization', 'value': soft_utilization},
                {'metric': 'utilization_index', 'value': utilization_index}
            ], recursive := true)
            FROM (
                SELECT record.run_id, record.width, record.layer, record.step,
                    record.hard_rank, record.soft_rank, record.effective_dimension,
                    record.hard_utilization, record.soft_utilization, record.utilization_index,
                    dense_rank() OVER (of_layer ORDER BY record.step) AS nth,
                    dense_rank() OVER (of_layer ORDER BY record.step DESC) AS back
                FROM records AS record
                WHERE list_contains(runs, record.run_id) AND record.site = at_site
                    AND record.solver IS DISTINCT FROM 'skipped'
                WINDOW of_layer AS (PARTITION BY record.run_id, record.width, record.layer)
            )
            WHERE back <= ceil(last * (nth + back - 1))
        )
        GROUP BY run_id, width, layer, step, metric
    )
    GROUP BY run_id, width, layer, metric
)
GROUP BY run_id, width, metric
ORDER BY metric, width, run_id;

-- log value = beta · log width + intercept over the points above, by least squares; `beta_ci95` is half of the 95 %
-- interval of beta, from Student's t with points − 2 degrees of freedom. Null where fewer than three points are left.
CREATE OR REPLACE MACRO width_fit(runs, at_site := 'post', last := 0.1) AS TABLE
SELECT
    metric,
    CASE WHEN widths > 2 THEN slope END AS beta,
    CASE WHEN widths > 2
        THEN student_t_95(points - 2) * sqrt(greatest(syy - slope * sxy, 0) / (points - 2) / sxx) END AS beta_ci95,
    CASE WHEN widths > 2 AND syy > 0 THEN r2 END AS r2,
    CASE WHEN widths > 2 THEN intercept END AS intercept,
    points, widths
FROM (
    SELECT metric, regr_slope(y, x) AS slope, regr_intercept(y, x) AS intercept, regr_r2(y, x) AS r2,
        regr_sxx(y, x) AS sxx, regr_sxy(y, x) AS sxy, regr_syy(y, x) AS syy,
        count(y) AS points, count(DISTINCT x) AS widths
    FROM (
        SELECT point.metric, ln(point.width) AS x, ln(point.value) AS y
        FROM width_points(runs, at_site := at_site, last := last) AS point
        WHERE point.value > 0
    )
    GROUP BY metric
);

-- How the ranks grow with the width.
CREATE OR REPLACE MACRO width_law(runs, at_site := 'post', last := 0.1) AS TABLE
FROM width_fit(runs, at_site := at_site, last := last)
WHERE metric IN ('hard_rank', 'soft_rank', 'effective_dimension') ORDER BY metric;

-- How the share of the width that is used falls with the width.
CREATE OR REPLACE MACRO utilization_law(runs, at_site := 'post', last := 0.1) AS TABLE
FROM width_fit(runs, at_site := at_site, last := last)
WHERE metric IN ('hard_utilization', 'soft_utilization', 'utilization_index') ORDER BY metric;

-- One row an eigenvalue, the largest first, at the sampled step nearest to `near_step` (of two, the earlier); every expert
-- unless one is named.
CREATE OR REPLACE MACRO spectrum(run, of_layer, near_step, at_site := 'post', of_expert := NULL) AS TABLE
SELECT
    value.run_id, value.step, value.layer, value.site, value.expert, value.k, value.eigenvalue,
    value.eigenvalue / nullif(sum(value.eigenvalue) OVER of_all, 0) AS share,
    sum(value.eigenvalue) OVER (of_all ORDER BY value.k) / nullif(sum(value.eigenvalue) OVER of_all, 0)
        AS cumulative_share
FROM (
    SELECT one.run_id, one.step, one.layer, one.site, one.expert,
        generate_subscripts(one.eigenvalues, 1) AS k, unnest(CAST(one.eigenvalues AS DOUBLE[])) AS eigenvalue
    FROM eigenvalues AS one
    WHERE one.run_id = run AND one.layer = of_layer AND one.site = at_site AND (of_expert IS NULL OR one.expert = of_expert)
    QUALIFY row_number() OVER (PARTITION BY one.expert ORDER BY abs(one.step - near_step), one.step) = 1
) AS value
WINDOW of_all AS (PARTITION BY value.expert)
ORDER BY value.expert NULLS FIRST, value.k;

-- The records that an alert points at, with their spectra, as its attempt wrote them: also where a restart has hidden
-- them from `records` since. Say which run it is where you know it, or those of all runs are looked through.
CREATE OR REPLACE MACRO alert_evidence(of_alert, run := NULL) AS TABLE
SELECT
    alert.run_id, alert.alert_id, alert.kind, alert.state, record.step, record.layer, record.site, record.expert,
    record.width, record.tokens_per_width, record.complete, record.hard_rank, record.soft_rank,
    record.hard_utilization, record.soft_utilization, record.spectral_concentration, record.effective_dimension,
    spectrum.eigenvalues
FROM alerts AS alert
JOIN records_raw AS record ON (
    record.run_id = alert.run_id
    AND record.attempt = alert.attempt
    AND record.layer = alert.layer
    AND record.site = alert.site
    AND record.expert IS NOT DISTINCT FROM alert.expert
    AND list_contains(alert.evidence_steps, record.step)
)
LEFT JOIN eigenvalues_raw AS spectrum ON (
    spectrum.run_id = record.run_id
    AND spectrum.attempt = record.attempt
    AND spectrum.step = record.step
    AND spectrum.layer = record.layer
    AND spectrum.site = record.site
    AND spectrum.expert IS NOT DISTINCT FROM record.expert
    AND spectrum.written_at = record.written_at
)
WHERE alert.alert_id = of_alert AND (run IS NULL OR alert.run_id = run)
QUALIFY row_number() OVER (
    PARTITION BY alert.run_id, record.step ORDER BY record.ranks_seen DESC, record.written_at DESC
) = 1
ORDER BY alert.run_id, record.step;

-- What a metric that nobody had thought of is computed from: each spectrum as shares `p` and as eigenvalues, beside the
-- metrics that were stored.
CREATE OR REPLACE MACRO recompute(runs, at_site := 'post') AS TABLE
SELECT
    record.run_id, record.step, record.layer, record.site, record.expert, record.width, record.tokens_per_width,
    spectrum.eigenvalues, variance_shares(spectrum.eigenvalues) AS p,
    record.hard_rank, record.soft_rank, record.effective_dimension, record.spectral_concentration
FROM records AS record
JOIN eigenvalues_raw AS spectrum ON (
    spectrum.run_id = record.run_id
    AND spectrum.attempt = record.attempt
    AND spectrum.step = record.step
    AND spectrum.layer = record.layer
    AND spectrum.site = record.site
    AND spectrum.expert IS NOT DISTINCT FROM record.expert
    AND spectrum.written_at = record.written_at
)
WHERE list_contains(runs, record.run_id) AND list_contains(runs, spectrum.run_id) AND record.site = at_site
QUALIFY row_number() OVER (
    PARTITION BY record.run_id, record.step, record.layer, record.expert
) = 1;
