#!/usr/bin/env bash
# One cron expression, three schedules: a step in one day field next to a value in the other.
#
# In cron, a row runs on days that match either day field if both are restricted. Whether `*/2` counts as a restriction
# is answered differently: cronsim 2.8 says no, as Debian's cron does (a field that starts with `*`), so both fields must
# match; croniter 7.0.0 says yes, so either may match; APScheduler 3.11.3 (`CronTrigger.from_crontab`) always wants both,
# even where cronsim and croniter agree on either, as for `1-31/2`. So the same line in a crontab and in a scheduler
# built on another of these packages runs on different days, from twice a month to every other day, without a warning.
# `pipeline schedule` refuses such expressions (pipeline/deploy/cron.py), as its targets differ in the same way.
#
# Prints the first eight days after 2026-11-01 of each; fails if they are not those seen on 2026-11-29.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check cronsim==2.8 croniter==7.0.0 apscheduler==3.11.3
"$folder/venv/bin/python" - <<'PYTHON'
from collections.abc import Iterator
from datetime import datetime, timezone
from itertools import islice

from apscheduler.triggers.cron import CronTrigger
from croniter import croniter
from cronsim import CronSim

START = datetime(2026, 11, 1, 0, 30, tzinfo=timezone.utc)


def apscheduler(expression: str) -> Iterator[datetime]:
    trigger = CronTrigger.from_crontab(expression, timezone=timezone.utc)
    last = None
    while True:
        last = trigger.get_next_fire_time(last, last or START)
        yield last


BOTH = "11-09 11-23 12-07 12-21 01-11 01-25 02-01 02-15"  # Mondays with an odd day of the month
EITHER = "11-02 11-03 11-05 11-07 11-09 11-11 11-13 11-15"  # Mondays, and odd days of the month
EXPECTED = {
    "0 0 */2 * MON": {"cronsim": BOTH, "croniter": EITHER, "apscheduler": BOTH},
    "0 0 1-31/2 * MON": {"cronsim": EITHER, "croniter": EITHER, "apscheduler": BOTH},
}
for expression, expected in EXPECTED.items():
    streams = {
        "cronsim": CronSim(expression, START),
        "croniter": croniter(expression, START).all_next(datetime),
        "apscheduler": apscheduler(expression),
    }
    for name, stream in streams.items():
        found = " ".join(f"{day:%m-%d}" for day in islice(stream, 8))
        print(f"{expression:17} {name:12} {found}")
        assert found == expected[name], f"{name} has changed: {found} instead of {expected[name]}"
PYTHON
