"""What a notebook shows of runs: pictures, tables, curves that grow while a run goes on."""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import html
import io
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from PIL import Image  # matplotlib needs it

from experiments import compare
from rlhf_jax.evaluation.panels import DPO_PANELS, PPO_PANELS, Panel, draw_panels
from rlhf_jax.training.run import OnStep

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Of pictures in a notebook, which keeps them in its file.
DPI = 72
COLORS = 64
MAX_ROWS = 20  # of a table that are shown; all of them are in it
# What curves may be named by before anything is logged.
KNOWN = (*PPO_PANELS, *DPO_PANELS)


@dataclasses.dataclass(frozen=True, repr=False)
class Picture:
    """A PNG that a notebook shows where a cell ends with it.

    Attributes:
      png: the file's content.
    """

    png: bytes

    @classmethod
    def of(cls, figure: Figure) -> Picture:
        """A figure of matplotlib as it is now, in `COLORS` colours: a third of the bytes."""
        drawn, small = io.BytesIO(), io.BytesIO()
        figure.savefig(drawn, dpi=DPI, format="png")
        Image.open(drawn).convert("RGB").quantize(COLORS).save(small, "PNG", optimize=True)
        return cls(small.getvalue())

    def save(self, path: str | Path) -> Path:
        """Writes the file, and returns its path."""
        Path(path).write_bytes(self.png)
        return Path(path)

    def html(self) -> str:
        """The picture as an HTML element that needs no file."""
        return f'<img src="data:image/png;base64,{base64.b64encode(self.png).decode()}">'

    def _repr_png_(self) -> bytes:
        return self.png

    def __repr__(self) -> str:
        return f"Picture({len(self.png):,} bytes)"


class Table(list[dict[str, Any]]):
    """Rows, each a mapping from column to value; `pandas.DataFrame(table)` takes it as it is.

    A notebook shows the first `MAX_ROWS` of them.
    """

    def head(self, rows: int = 5) -> Table:
        """The first rows."""
        return Table(self[:rows])

    def columns(self, *names: str) -> Table:
        """Some columns of every row, in this order; what a row lacks is left out."""
        return Table({name: row[name] for name in names if name in row} for row in self)

    def html(self, rows: int = MAX_ROWS) -> str:
        """The first rows as an HTML table; texts are shown as they are, never read as HTML."""
        columns = list(dict.fromkeys(name for row in self for name in row))
        head = "".join(f"<th>{html.escape(str(name))}</th>" for name in columns)
        lines = [f"<tr>{head}</tr>"]
        for row in self[:rows]:
            cells = "".join(f"<td>{_cell(row.get(name, ''))}</td>" for name in columns)
            lines.append(f"<tr>{cells}</tr>")
        more = f"<p>{len(self) - rows} more rows</p>" if len(self) > rows else ""
        return f"<table>{''.join(lines)}</table>{more}"

    def _repr_html_(self) -> str:
        return self.html()


def _cell(value: Any) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return html.escape(text).replace("\n", "<br>")


class LiveCurves:
    """Curves in a notebook's cell, drawn again while runs go on.

      curves = LiveCurves("reward/mean", "policy/kl_ref_sequence")
      with curves: notebook.run("ppo_max", "tiny,kl", on_step=curves.of("kl"))

    Outside of a notebook nothing is shown, and `picture` is all the same.

    Args:
      *names: titles of panels, or metrics, see `compare.panel_named`.
      every: seconds between two drawings, at the least.

    Raises:
      ValueError: no name, or one that is neither a panel's title nor looks like a metric.
    """

    def __init__(self, *names: str, every: float = 1.0):
        if not names:
            raise ValueError("name at least one metric to be drawn, such as 'reward/mean'")
        self._panels: tuple[Panel, ...] = tuple(
            compare.panel_named(name, KNOWN, ()) for name in names
        )
        self._every, self._drawn = every, -np.inf
        self._logs: dict[str, dict[int, Mapping[str, float]]] = {}
        self._handle: Any = None

    def of(self, label: str) -> OnStep:
        """The callback of one run, which adds the curve `label`."""
        log = self._logs.setdefault(label, {})

        def add(step: int, metrics: Mapping[str, float]) -> None:
            # A run that went back to an earlier step makes those after it again.
            for later in [old for old in log if old >= step]:
                del log[later]
            log[step] = dict(metrics)
            if time.monotonic() - self._drawn >= self._every:
                self._show()

        return add

    def picture(self) -> Picture | None:
        """The curves as they are now; None while none of the metrics has been logged."""
        logs = {label: [_columns(log)] for label, log in self._logs.items() if log}
        try:
            return Picture.of(draw_panels(logs, self._panels))
        except ValueError:
            if any(panel.metrics.keys() & logs for panel in self._panels):
                raise
            return None

    def _show(self) -> None:
        picture = self.picture()
        if self._handle is not None and picture is not None:
            self._handle.update(picture)
        self._drawn = time.monotonic()

    def __enter__(self) -> Self:
        with contextlib.suppress(ImportError):
            from IPython import get_ipython
            from IPython.display import HTML, display

            if get_ipython() is not None:
                self._handle = display(HTML("<i>no step yet</i>"), display_id=True)
        return self

    def __exit__(self, *_: object) -> None:
        self._show()


def _columns(log: Mapping[int, Mapping[str, float]]) -> dict[str, np.ndarray]:
    """Steps with their metrics as `read_metrics` gives a log."""
    names = dict.fromkeys(name for metrics in log.values() for name in metrics)
    columns = {"step": np.array(sorted(log))}
    for name in names:
        columns[name] = np.array([log[step].get(name, np.nan) for step in sorted(log)])
    return columns


def titled(parts: Sequence[tuple[str, str]]) -> str:
    """Headings with what is below them, as HTML; empty parts are left out."""
    return "".join(f"<h4>{html.escape(title)}</h4>{part}" for title, part in parts if part)
