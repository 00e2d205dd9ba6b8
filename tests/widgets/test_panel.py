"""The panel without a browser: real sessions, widgets moved as a browser moves them."""

import dataclasses
import time

import pytest
import torch

from rwkv_nb import config
from rwkv_nb.config import replace
from rwkv_nb.runs import Run
from rwkv_nb.train.session import TrainSession
from rwkv_nb.train.snapshot import Sample
from rwkv_nb.widgets import panel_html
from rwkv_nb.widgets.panel import TrainPanel

SECONDS = 300    # for any one thing to happen, on a machine whose disk and cores are busy


def until(condition):
    end = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.02)


@pytest.fixture
def panel(tmp_path, settings):
    """A panel on a session that is long enough to be played with, stopped at the end."""
    session = TrainSession(Run(tmp_path), replace(settings, epoch_count=2000, epoch_save=2000),
                           prompts=["User: <b>red</b>\n\nAssistant:"], max_tokens=8)
    panel = TrainPanel(session)
    panel.session = session
    yield panel
    session.stop()
    if session.snapshot().status != "ready":
        session.join()


def events(run):
    return [row for row in run.metrics() if "event" in row]


def test_explanations_are_in_the_language_that_is_asked_for(panel):
    chinese = TrainPanel(panel.session, "zh")
    for field in config.leaf_fields(config.LiveSettings()):
        for shown, language in ((panel, "en"), (chinese, "zh")):
            assert getattr(shown, field.name).tooltip == field.metadata[language]


def test_what_is_asked_where_memory_ran_out_stands_beside_the_buttons(panel):
    def no_room(block, args):
        if len(args[0]) >= 4:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    session = panel.session
    session.pause()
    session.start()
    until(lambda: session.snapshot().status == "paused" and panel.pause.description == "Resume")
    session.trainer.model.blocks[-1].register_forward_pre_hook(no_room)
    panel.pause.click()
    until(lambda: "memory ran out in step 1" in panel.warnings.value and panel.pause.description == "Resume")
    assert "memory ran out" not in panel.notices.value and "held out" not in panel.warnings.value


def test_buttons_steer_the_session(panel):
    session = panel.session
    assert not panel.start.disabled and panel.pause.disabled and panel.stop.disabled
    panel.start.click()
    until(lambda: session.snapshot().step >= 2)
    panel.pause.click()
    until(lambda: session.snapshot().status == "paused")
    until(lambda: panel.pause.description == "Resume" and "paused" in panel.status.value)
    held = session.snapshot().step
    panel.save.click()
    until(lambda: f"adapter-step-{held}.safetensors" in panel.files.value)
    panel.pause.click()
    until(lambda: session.snapshot().step > held)
    panel.stop.click()
    until(lambda: "stopped" in panel.status.value)
    assert all(button.disabled for button in (panel.start, panel.pause, panel.stop, panel.save))
    assert [row["event"] for row in events(session.run)][:3] == ["pause", "save", "resume"]


def test_controls_change_what_trains_and_each_change_is_recorded(panel):
    session = panel.session
    panel.start.click()
    until(lambda: session.snapshot().step >= 1)
    panel.lr_init.value, panel.grad_clip.value, panel.log_every.value = 3e-4, 0.5, 2
    until(lambda: len(events(session.run)) == 3)
    assert {row["name"]: row["to"] for row in events(session.run)} == \
        {"lr_init": 3e-4, "grad_clip": 0.5, "log_every": 2}
    session.change(lr_init=1e-6)     # code, or another panel: this one follows, beyond its slider's end
    until(lambda: panel.lr_init.value == 1e-6)
    assert session.snapshot().live.lr_init == 1e-6


def test_it_paints_while_it_trains_and_ends_complete(tmp_path, settings):
    session = TrainSession(Run(tmp_path), settings, prompts=["User: <b>red</b>\n\nAssistant:"], max_tokens=8).start()
    panel, images = TrainPanel(session), set()
    panel.loss.observe(lambda change: images.add(bytes(change.new)), "value")
    end = session.join()
    until(lambda: not panel.painter.is_alive())
    assert panel.progress.value == panel.progress.max == end.total_steps > 0
    assert f"{end.step} / {end.total_steps}" in panel.figures.value
    assert images and all(image.startswith(b"\x89PNG") for image in images)
    assert "User: &lt;b&gt;red" in panel.samples.value and "<b>red" not in panel.samples.value
    assert "adapter-3.safetensors" in panel.files.value
    assert "finished" in panel.status.value


def test_what_stopped_the_training_is_shown(tmp_path, settings):
    session = TrainSession(Run(tmp_path), replace(settings, data_file=str(tmp_path / "<none>.jsonl"))).start()
    panel = TrainPanel(session)
    until(lambda: not panel.painter.is_alive())
    assert "failed" in panel.status.value
    assert "&lt;none&gt;.jsonl" in panel.error.value and "what to do:" in panel.error.value


def test_a_refused_request_is_shown_and_harms_nothing(panel):
    panel.start.click()
    panel.start.click()        # a second click before the button is grey
    panel.grad_clip.value = float("nan")
    until(lambda: "grad_clip" in panel.error.value)
    until(lambda: panel.session.snapshot().step >= 1)
    assert panel.session.snapshot().live.grad_clip == 1


def test_a_picture_that_fails_leaves_the_controls_alive(panel, monkeypatch):
    monkeypatch.setattr("rwkv_nb.widgets.panel.png", lambda figure, dpi: 1 / 0)
    panel.start.click()
    until(lambda: "ZeroDivisionError" in panel.error.value)
    until(lambda: panel.session.snapshot().step >= 1)
    panel.stop.click()
    until(lambda: not panel.painter.is_alive())
    assert "stopped" in panel.status.value


class Late:
    """A session whose snapshots lag behind what it was asked, as those of a run in other processes do."""

    def __init__(self, session):
        self._session, self.asked, self.told = session, [], {}

    def __getattr__(self, name):
        return getattr(self._session, name)

    def change(self, **changes):
        self.asked.append(changes)

    def snapshot(self):
        now = self._session.snapshot()
        return dataclasses.replace(now, live=replace(now.live, **self.told))


def test_what_a_late_snapshot_tells_undoes_nothing(tmp_path, settings):
    session = Late(TrainSession(Run(tmp_path), settings))
    panel = TrainPanel(session)
    panel.grad_clip.value = 0.5
    panel.grad_clip.value = 0.7
    for told in (0.5, 0.7):        # the first change arrives, then the second
        session.told = {"grad_clip": told}
        panel._wake.set()
        until(lambda told=told: panel.grad_clip.value == told)
    assert session.asked == [{"grad_clip": 0.5}, {"grad_clip": 0.7}]


def test_a_snapshot_that_fails_does_not_end_the_panel(panel, monkeypatch):
    session, look = panel.session, panel.session.snapshot
    monkeypatch.setattr(session, "snapshot", lambda: 1 / 0)
    panel._wake.set()
    until(lambda: "ZeroDivisionError" in panel.error.value)
    monkeypatch.setattr(session, "snapshot", look)
    panel.start.click()
    until(lambda: "training" in panel.status.value)


def test_samples_are_newest_first_and_escaped():
    text = panel_html.samples_html([Sample(1, "p", "b", "a"), Sample(9, "问", "<script>x</script>", "答")])
    assert text.index(">9<") < text.index(">1<")
    assert "<script>" not in text and "答" in text


def test_every_live_setting_on_the_panel_has_its_text(panel):
    texts = {field.name: field.metadata["en"] for field in config.leaf_fields(config.LiveSettings())}
    for name, text in texts.items():
        assert getattr(panel, name).tooltip == text and getattr(panel, name).description == name
