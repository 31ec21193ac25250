"""`pipeline status RUN --watch`: shows a run until it ends."""

import json
import sys
import time
from collections.abc import Callable
from typing import Any

from pipeline.engine.lines import StageLine, duration, fitting, stage_lines
from pipeline.engine.run_view import RunView
from pipeline.engine.status import run_status
from pipeline.engine.watch import RunWatch
from pipeline.errors import PipelineError, first_line
from pipeline.units import human_seconds

INTERVAL_S = 2.0
_PLAIN_WIDTH = 10_000


def watch_run(place: str, show_end: Callable[[dict[str, Any]], None], *, as_json: bool = False) -> None:
    """Shows the run until no process works in its folder any more, then calls `show_end` with its status.

    On a terminal the lines are rewritten in place; elsewhere a line is printed at each change, with `as_json` as JSON.
    What cannot be read for a moment is said, and tried again.

    Raises:
        ConfigError: the folder is not a run folder.
    """
    watch = RunWatch(place)
    status, view = run_status(place), watch.look()
    shown = _InPlace() if sys.stdout.isatty() and not as_json else _Changes(as_json=as_json)
    with shown:
        while view.is_running:
            shown.show(view, status["metrics"])
            time.sleep(INTERVAL_S)
            try:
                view = watch.look()
                if not view.stages:
                    status = run_status(place)
            except (PipelineError, OSError) as error:
                shown.say(first_line(error))
    show_end(run_status(place))


def view_lines(view: RunView, metrics: object, width: int) -> list[str]:
    """The state of a run in lines of at most `width` characters."""
    stages = [StageLine(s.name, s.done, s.total, s.rows_per_s, s.drops, s.eta_s) for s in view.stages]
    head = [view.workflow, view.state]
    if view.started and view.last_event:
        head.append(human_seconds(view.last_event - view.started))
    if view.eta_s is not None:
        head.append(f"ETA {duration(view.eta_s)}")
    if view.num_failed_tries:
        head.append(f"{view.num_failed_tries:,} failed tries")
    lines = [fitting(head, width), *stage_lines(stages, width)]
    if isinstance(metrics, dict):
        lines.append(fitting([f"{name} {_short(value)}" for name, value in metrics.items()], width))
    return lines


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


class _InPlace:
    """The lines of a terminal, rewritten."""

    def __enter__(self) -> "_InPlace":
        from rich.console import Console
        from rich.live import Live

        self._console = Console()
        self._live = Live(console=self._console, auto_refresh=False, transient=True)
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def show(self, view: RunView, metrics: object) -> None:
        from rich.text import Text

        lines = view_lines(view, metrics, self._console.width)
        self._live.update(Text("\n".join(lines), no_wrap=True, overflow="crop"), refresh=True)

    def say(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False)


class _Changes:
    """A line at each change of what is finished, dropped or failed."""

    def __init__(self, *, as_json: bool):
        self._as_json = as_json
        self._last: object = None

    def __enter__(self) -> "_Changes":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def show(self, view: RunView, metrics: object) -> None:
        state = [[(s.name, s.done, s.drops) for s in view.stages], view.num_failed_tries, metrics]
        if state == self._last:
            return
        self._last = state
        print(json.dumps(_values(view, metrics)) if self._as_json else self._line(view, metrics), flush=True)

    def say(self, text: str) -> None:
        if text != self._last:
            print(text, file=sys.stderr, flush=True)
        self._last = text

    @staticmethod
    def _line(view: RunView, metrics: object) -> str:
        head, *lines = view_lines(view, metrics, _PLAIN_WIDTH)
        words = (" ".join(word for word in line.split() if not word.startswith("[")) for line in lines)
        return "; ".join([head.replace("  ", " "), *words])


def _values(view: RunView, metrics: object) -> dict[str, object]:
    return {
        "run": view.url,
        "workflow": view.workflow,
        "state": view.state,
        "eta_s": view.eta_s,
        "stages": [
            {"stage": s.name, "shards": s.done, "total": s.total, "rows_per_s": s.rows_per_s, "drops": s.drops}
            for s in view.stages
        ],
        "failed_tries": view.num_failed_tries,
        "metrics": metrics,
    }
