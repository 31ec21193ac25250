"""Cron expressions: what is read, what is refused, and the same times for systemd."""

import pytest

from pipeline.deploy.cron import Cron, parse_cron
from pipeline.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("* * * * *", Cron(None, None, None, None, None)),
        ("0 3 * * *", Cron((0,), (3,), None, None, None)),
        ("*/20 0-4/2 1,15 * *", Cron((0, 20, 40), (0, 2, 4), (1, 15), None, None)),
        ("5 0 * jan,JUL-Sep Mon-fri", Cron((5,), (0,), None, (1, 7, 8, 9), (1, 2, 3, 4, 5))),
        (" 59  23 31 12 0 ", Cron((59,), (23,), (31,), (12,), (0,))),
    ],
)
def test_the_five_fields_are_read(text: str, expected: Cron) -> None:
    assert parse_cron(text) == expected


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("0 3 * *", "needs five fields (minute, hour, day of month, month, day of week), got 4"),
        ("@daily", "needs five fields"),
        ("60 3 * * *", "minute is '60'; it takes 0-59"),
        ("0 24 * * *", "hour is '24'; it takes 0-23"),
        ("0 3 0 * *", "day of month is '0'; it takes 1-31"),
        ("0 3 * 13 *", "month is '13'; it takes 1-12 or JAN-DEC"),
        ("0 3 * * 7", "day of week is '7'; it takes 0-6 or SUN-SAT"),
        ("0 3 * * FRI-MON", "day of week is 'FRI-MON'"),
        ("*/0 * * * *", "minute is '*/0'"),
        ("5/2 * * * *", "minute is '5/2'"),
        ("1-3/ * * * *", "minute is '1-3/'"),
        ("1, * * * *", "minute is '1,'"),
        ("*-3 * * * *", "minute is '*-3'"),
        ("² * * * *", "minute is '²'"),
        ("$(id) * * * *", "minute is '$(id)'"),
        ("0 0 */2 * MON", "cron takes days that both name, Kubernetes days that either names"),
        ("0 0 13 * */2", "Write the steps out, as 1-31/2, or leave one as *"),
    ],
)
def test_what_not_every_scheduler_reads_is_refused(text: str, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_cron(text)
    assert f"--at {text!r}: " in str(caught.value)
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("text", "events"),
    [
        ("0 3 * * *", ["*-*-* 03:00:00 UTC"]),
        ("*/30 * * 2 *", ["*-02-* *:00,30:00 UTC"]),
        ("15 6 * * 1-3", ["Mon,Tue,Wed *-*-* 06:15:00 UTC"]),
        ("0 0 */10 * *", ["*-*-01,11,21,31 00:00:00 UTC"]),
        ("0 0 1 * SUN", ["Sun *-*-* 00:00:00 UTC", "*-*-01 00:00:00 UTC"]),  # cron takes either day
    ],
)
def test_systemd_gets_the_same_times(text: str, events: list[str]) -> None:
    assert parse_cron(text).calendar("UTC") == events
