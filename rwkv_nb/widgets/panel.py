"""The live training panel.

Callbacks only pass requests on to the session. A thread of the panel's own paints from snapshots by setting traits,
once a second and where something changed, while a cell awaits session.wait() and while the kernel is idle.
"""

import math
import threading
import time

import ipywidgets as widgets

from ..config import LiveSettings, leaf_fields, values
from ..errors import RwkvNbError
from ..train.launch import LaunchedSession
from ..train.session import TrainSession
from ..train.snapshot import DONE, Snapshot
from . import panel_html as html
from .common import button, confirm_changes
from .panel_form import setting_input, shell_command
from .plots import loss_figure, png

LIVE = tuple(values(LiveSettings()))    # lr_init, which has the slider, is the first
SHOWN, WRAPPED = 3, {"flex_flow": "row wrap"}                        # so many are in sight, the others fold out
SECOND = 1.0             # between two paints
FIGURE_SHARE = 0.03      # painting the figure takes no more of the time: drawing holds Python's lock
DECADES = 1.5            # the learning rate's slider reaches so far to both sides of its start
BAR_STYLES = {"finished": "success", "failed": "danger", "paused": "warning", "pausing": "warning"}


class TrainPanel(widgets.VBox):
    """Buttons, sliders, progress, loss and samples of a TrainSession: display(TrainPanel(session)).

    A panel may be made before or after session.start(). It paints until the session is done.
    language: en or zh, that of the settings' explanations
    """

    def __init__(self, session: TrainSession | LaunchedSession, language: str = "en"):
        self._session, self._live = session, session.snapshot().live
        self._held, self._complaint = False, ""     # held: the button says Resume
        self._wake, self._painted, self._figure_due = threading.Event(), 0, 0.0
        confirm_changes()
        self._make_controls(self._live, language)
        self._make_displays()
        super().__init__([
            self.status, widgets.HBox([self.start, self.pause, self.stop, self.save]),
            self.live, self.error, self.warnings, self.progress, self.figures, self.loss, self.samples, self.files,
            self.notices, self.command],
            layout={"max_width": "800px"})
        self._paint_texts(session.snapshot())
        self.painter = threading.Thread(target=self._paint_until_done, name="rwkv_nb panel", daemon=True)
        self.painter.start()

    def __repr__(self) -> str:
        return f"TrainPanel({self._session.run.name})"

    # -- controls ------------------------------------------------------------------------------------------------

    def _make_controls(self, live: LiveSettings, language: str) -> None:
        session = self._session
        self.start = button("Start", lambda: self._ask(session.start), icon="play", style="success",
                            tooltip="begin to train")
        self.pause = button("Pause", lambda: self._ask(session.resume if self._held else session.pause),
                            icon="pause", tooltip="hold after the step that is under way; press again to go on")
        self.stop = button("Stop", lambda: self._ask(session.stop), icon="stop", style="danger",
                           tooltip="save an adapter and a checkpoint, then end; a later session goes on from there")
        self.save = button("Save now", lambda: self._ask(session.save_now), icon="save",
                           tooltip="save an adapter after the step under way, and let it answer the prompts")

        fields = {field.name: field for field in leaf_fields(live)}
        rate = max(live.lr_init, 1e-9)
        self.lr_init = widgets.FloatLogSlider(
            value=rate, min=math.log10(rate) - DECADES, max=math.log10(rate) + DECADES, step=0.02,
            readout_format=".2e", continuous_update=False, description="lr_init",
            tooltip=fields["lr_init"].metadata[language], style={"description_width": "initial"},
            layout={"width": "350px"})
        for name in LIVE[1:]:
            setattr(self, name, setting_input(fields[name], getattr(live, name), language))
        for name in LIVE:
            getattr(self, name).observe(self._change, "value")
        inputs = [getattr(self, name) for name in LIVE]
        for beside_the_slider in inputs[1:SHOWN]:
            beside_the_slider.style.description_width, beside_the_slider.layout.width = "initial", "205px"
        more = widgets.Accordion([widgets.HBox(inputs[SHOWN:], layout=WRAPPED)], titles=("more that may change",))
        self.live = widgets.VBox([widgets.HBox(inputs[:SHOWN], layout=WRAPPED), more])

    def _ask(self, action) -> None:
        """Pass a request on to the session; what it refuses is shown."""
        try:
            action()
            self._complaint = ""
        except (RwkvNbError, OSError) as error:
            self._complaint = html.error_html(error)
        self._wake.set()

    def _change(self, change) -> None:
        if threading.current_thread() is not self.painter:  # its values are the session's: what was asked since counts
            self._ask(lambda: self._session.change(**{change.owner.description: change.new}))

    # -- painting ------------------------------------------------------------------------------------------------

    def _make_displays(self) -> None:
        self.status, self.error, self.warnings, self.figures, self.notices, self.samples, self.files = (
            widgets.HTML() for _ in range(7))
        self.progress = widgets.FloatProgress(min=0, max=1, layout={"width": "99%"})
        self.loss = widgets.Image(format="png", layout={"width": "99%", "display": "none"})
        self.command = widgets.HTML(html.command_html(shell_command(self._session.settings, self._session.run)))

    def _paint_until_done(self) -> None:
        done = False
        while not done:
            try:
                done = self._session.snapshot().done
                self._paint()
            except Exception as error:  # a picture that fails must not take the rest with it
                self._complaint = self.error.value = html.error_html(error)
            self._wake.wait(SECOND)
            self._wake.clear()

    def _paint(self) -> None:
        """Paint what changed since the last time."""
        self._show_live()
        now = self._session.snapshot()
        self._paint_texts(now)
        due = time.monotonic() >= self._figure_due or now.paused or now.done
        if due and len(now.rows) != self._painted:
            began, self.loss.layout.display = time.monotonic(), "block"
            self.loss.value = png(loss_figure(now.rows), dpi=150)
            self._painted = len(now.rows)
            self._figure_due = began + max(SECOND, (time.monotonic() - began) / FIGURE_SHARE)

    def _show_live(self) -> None:
        """Controls follow what was changed elsewhere: by a resumed run, another panel, or code."""
        before, self._live = self._live, self._session.snapshot().live
        for name in LIVE:
            value, control = getattr(self._live, name), getattr(self, name)
            if value == getattr(before, name) or value == control.value:
                continue
            if name == "lr_init":
                if value <= 0:  # a logarithm has no zero
                    continue
                control.min = min(control.min, math.log10(value))
                control.max = max(control.max, math.log10(value))
            control.value = value

    def _paint_texts(self, now: Snapshot) -> None:
        session, status = self._session, now.shown
        self.status.value = html.status_html(session.run.name, status)
        self.start.disabled = status != "ready"
        self.pause.disabled = self.stop.disabled = self.save.disabled = status in ("ready", "stopping", *DONE)
        for name in LIVE:
            getattr(self, name).disabled = now.done
        self._held = now.paused and not now.done
        self.pause.description, self.pause.icon = ("Resume", "play") if self._held else ("Pause", "pause")
        self.progress.max, self.progress.value = max(now.total_steps, 1), now.step
        self.progress.bar_style = BAR_STYLES.get(status, "info")
        self.figures.value = html.figures_html(now, session.settings.train.epoch_count)
        warnings = [text for text in now.notices if text.startswith("WARNING")]    # in sight: one may be a question
        self.warnings.value = html.notices_html(warnings)
        self.notices.value = html.notices_html(text for text in now.notices if text not in warnings)
        self.samples.value = html.samples_html(now.samples)
        self.files.value = html.files_html(session.run.name, now.files)
        self.error.value = self._failure() if status == "failed" else self._complaint

    def _failure(self) -> str:
        try:
            self._session.result()
        except BaseException as error:
            return html.error_html(error)
        return ""
