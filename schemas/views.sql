-- The views of the store: what `eigenwatch query` opens, and any DuckDB shell after `eigenwatch query --emit-sql`.
-- $records, $eigenvalues, $alerts and $runs stand for the files of one table that count, of every run (see views.py and
-- parts.py). Every window below is partitioned by run_id first, so that a filter on it reaches the list of files;
-- through a join it does so as `run_id = …`.

-- Every row that was ever written: all attempts, all revisions.
CREATE OR REPLACE VIEW records_raw AS
SELECT * FROM $records;

-- Every spectrum that was ever written.
CREATE OR REPLACE VIEW eigenvalues_raw AS
SELECT * FROM $eigenvalues;

-- One row for each step, layer, site and expert: the newest revision of those that the most ranks made, on the timeline
-- that the run kept. A shard that was away may write late what it had heard before another took its layers over.
-- A restart goes back to a checkpoint and abandons what came after it, so an attempt is hidden from the first step
-- of any later attempt on, even at steps which the later one has not reached yet.
-- A row is of the newest attempt that has come as far as its step, or it is hidden.
-- Of $settled runs compaction has found that there is nothing to hide, which spares them all this.
CREATE OR REPLACE VIEW records AS
SELECT * FROM $settled
UNION ALL
SELECT * FROM (
    SELECT * FROM $unsettled
    QUALIFY row_number() OVER (
        PARTITION BY run_id, attempt, step, layer, site, expert ORDER BY ranks_seen DESC, written_at DESC
    ) = 1
)
QUALIFY attempt = max(attempt) OVER (PARTITION BY run_id ORDER BY step);

-- The spectra of exactly the rows of `records`: the aggregator writes both with one written_at.
CREATE OR REPLACE VIEW eigenvalues AS
SELECT spectrum.* FROM eigenvalues_raw AS spectrum JOIN records AS record ON (
    spectrum.run_id = record.run_id
    AND spectrum.attempt = record.attempt
    AND spectrum.step = record.step
    AND spectrum.layer = record.layer
    AND spectrum.site = record.site
    AND spectrum.expert IS NOT DISTINCT FROM record.expert
    AND spectrum.written_at = record.written_at
)
QUALIFY row_number() OVER (
    PARTITION BY spectrum.run_id, spectrum.attempt, spectrum.step, spectrum.layer, spectrum.site, spectrum.expert
) = 1;

-- One row for each alert, in its current state.
CREATE OR REPLACE VIEW alerts AS
SELECT * FROM $alerts
QUALIFY row_number() OVER (PARTITION BY run_id, alert_id ORDER BY written_at DESC, step DESC) = 1;

-- One row for each attempt of each run, in its current state.
CREATE OR REPLACE VIEW runs AS
SELECT * FROM $runs
QUALIFY row_number() OVER (PARTITION BY run_id, attempt ORDER BY written_at DESC) = 1;
