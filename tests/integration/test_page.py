"""The live page in a real browser, before a real daemon; before a made-up one where a real one would need 512 ranks."""

import base64
import os
from pathlib import Path

import pytest
from support.endpoints import Shown, served
from support.nursery import outcome, state
from support.processes import stopped
from support.statuses import a_good_day, a_job, a_save, a_status
from support.waiting import wait_until

from ckptd.daemon.http.gate import Access

TOKEN = "correct-horse-battery"
# 16 KiB a write from one thread: slow enough to be seen.
SLOWLY = {"write_chunk_bytes": 16_384, "write_threads": 1}
# The contrast that WCAG 2.1 wants of text (1.4.3); returns what has less.
PALE = """
(() => {
  const luminance = (rgb) => {
    const [r, g, b] = rgb.map((v) => v / 255).map((v) => (v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const numbers = (colour) => colour.match(/[\\d.]+/g).map(Number);
  const behind = (element) => {
    for (let e = element; e; e = e.parentElement) {
      const [r, g, b, a = 1] = numbers(getComputedStyle(e).backgroundColor);
      if (a > 0) return [r, g, b];
    }
    return [255, 255, 255];
  };
  const pale = [];
  for (const element of document.querySelectorAll("body *")) {
    const text = [...element.childNodes].some((node) => node.nodeType === 3 && node.data.trim());
    if (!text || ["SCRIPT", "NOSCRIPT"].includes(element.tagName)) continue;
    const [a, b] = [numbers(getComputedStyle(element).color).slice(0, 3), behind(element)].map(luminance);
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (ratio < 4.5) pale.push([element.className || element.tagName, element.textContent.slice(0, 30), ratio]);
  }
  return pale;
})()
"""
FITS = "document.documentElement.scrollWidth <= document.documentElement.clientWidth"


def address(daemon):
    return Path(daemon.runtime.path, "http").read_text().strip()


def shows(text):
    return f"document.body.innerText.includes({text!r})"


def test_a_save_appears_progresses_and_commits_while_one_watches(start_daemon, client, tmp_path, tab):
    daemon = start_daemon(**SLOWLY)
    page = tab(f"http://{address(daemon)}/")
    page.wait(shows("No trainer has connected yet."), "a daemon with nothing to do")
    client.connect(state(64), slots=2)
    page.wait("document.querySelectorAll('.slot[data-state=free]').length === 2", "the trainer's free slots")
    [worker] = daemon.workers()
    future = client.async_save(state(64), checkpoint_id=tmp_path / "step-100")
    wait_until(lambda: any(0 < save["bytes_done"] < save["bytes_total"] for save in daemon.generations()), "progress")
    with stopped(worker):
        page.wait(shows("Saving step-100"), "the save")
        [save] = daemon.generations()
        percent = 100 * save["bytes_done"] // save["bytes_total"]
        page.wait(shows(f"{percent} %"), "how far it is")
        bar = page.get("document.querySelector('.save [role=progressbar]').getAttribute('aria-valuenow')")
        assert int(bar) == percent
        for words in ("/s", "left", "writing for", "Every rank has handed over its part"):
            assert words in page.text()
        assert page.get("document.querySelectorAll('.slot[data-state=persisting]').length") == 1
        assert page.get("document.title") == f"{percent} % ckptd"
    assert outcome(future) == "committed"
    page.wait(shows("Everything is saved"), "the commit")
    row = "document.querySelector('.past li')"
    assert page.get(f"{row}.innerText").startswith("step-100")
    phases = page.get(f"[...{row}.querySelectorAll('.span > i')].map((i) => i.dataset.phase)")
    assert {"plan", "stage", "queue", "write", "fsync", "commit"} == set(phases)
    assert page.get("document.title") == "ckptd"
    assert page.get("document.getElementById('link').innerText") == "live"


def test_a_failed_save_shows_why(daemon, client, tmp_path, tab):
    page = tab(f"http://{address(daemon)}/")
    (tmp_path / "file").touch()
    path = tmp_path / "file" / "step-7"
    assert outcome(client.async_save(state(), checkpoint_id=path)) != "committed"
    page.wait(shows("The last save failed"), "the failure")
    [save] = daemon.generations()
    assert save["error"] in page.get("document.querySelector('.lead').innerText")
    assert page.get("document.querySelector('.past [data-state=failed], .past li[data-state=failed] .cause').innerText")
    assert "errno" in page.get("document.querySelector('.cause').innerText")


def test_a_skipped_save_is_no_failure(daemon, client, tmp_path, tab):
    page = tab(f"http://{address(daemon)}/")
    client.connect(state(), slots=1, on_busy="skip")
    with stopped(*daemon.workers()):
        future = client.async_save(state(), checkpoint_id=tmp_path / "a")
        daemon.wait_for_save(tmp_path / "a", lambda save: save["state"] == "staged")
        assert "skip" in outcome(client.async_save(state(), checkpoint_id=tmp_path / "b")).lower()
    assert outcome(future) == "committed"
    page.wait(shows("The last save was skipped"), "the skipped save")
    assert page.get(
        "[...document.querySelectorAll('.facts div')].find((d) => /Failed/.test(d.innerText)).innerText"
    ).endswith("0")
    assert daemon.metric('ckptd_saves_total{outcome="skipped"}') == 1


def test_a_page_opened_from_an_exemplar_marks_its_save(daemon, client, tmp_path, tab):
    for name in ("a", "b"):
        client.save(state(), checkpoint_id=tmp_path / name)
    save_id = daemon.generations()[0]["save_id"]
    page = tab(f"http://{address(daemon)}/#save-{save_id}")
    page.wait("document.querySelector('.past li.target')", "a marked save")
    assert page.get("document.querySelector('.past li.target b').innerText") == "a"


def giant(ranks=512, absent=()):
    waits = "save of /c/step-2 waits for rank 3, 17, 44, 45, 46, 47, 48, 49, ... to stage its part"
    saves = [
        a_save(1, phases=(1, 2, 0.1, 30, 1, 3), ago_s=700),
        a_save(2, state="scheduled", ago_s=4, world_size=ranks, ranks_sealed=431, waiting_for=waits),
    ]
    job = a_job("giant", ranks, saves, slots=("free", "staging"))
    job["sessions"] = [session for session in job["sessions"] if session["rank"] not in absent]
    return a_status(job, last_commit_s=1_000_000 - 660.0)


def test_512_ranks_are_one_bar_and_what_is_wrong_is_named(tab):
    view = Shown(giant(absent={5, 301}))
    with served(view) as at:
        page = tab(f"http://{at}/")
        page.wait(shows("510 free"), "the shares of the slots' states")
        text = page.text()
        assert "431 of 512 ranks handed over" in text
        handed = "document.querySelector('.bar .handed')"
        share = page.get(f"{handed}.offsetWidth / {handed}.parentElement.offsetWidth")
        assert abs(share - 431 / 512) < 0.01
        assert "Not attached: rank 5, 301" in text
        assert "waits for rank 3, 17" in text
        assert page.get("document.body.offsetHeight") < 1600
        page.get("document.querySelector('details').open = true")
        assert page.get("document.querySelectorAll('.field .slot').length") == 1020
        view.answer = giant(absent={5, 301, 302})
        page.wait(shows("Not attached: rank 5, 301, 302"), "the next state")
        assert page.get("document.querySelector('.field').offsetHeight > 0")  # what a reader opened stays open


def test_what_others_named_is_text_and_nothing_runs(tab):
    evil = '<img src=x onerror="document.title=`owned`"><script>document.title=`owned`</script>'
    save = a_save(1, name=evil, state="failed", error=evil)
    with served(Shown(a_status(a_job(evil, 1, [save])))) as at:
        page = tab(f"http://{at}/")
        page.wait(shows("onerror="), "the name as text")
        assert page.get("document.querySelector('h2').textContent") == evil
        assert page.get("document.querySelectorAll('main img, main script').length") == 0
        assert page.get("document.title") == "ckptd"


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize(("width", "phone"), [(1280, False), (360, True)])
def test_it_is_readable_by_day_and_night_at_the_desk_and_on_a_phone(tab, dark, width, phone):
    status = a_good_day()
    status["jobs"][0]["generations"][2]["checkpoint_id"] = "/mnt/" + "a-very-long-name-without-a-blank" * 8
    with served(Shown(status)) as at:
        page = tab(f"http://{at}/", width=width, phone=phone, dark=dark)
        page.wait(shows("Saving step-800"), "the page")
        assert page.get(PALE) == []
        assert page.get(FITS)
        luminous = page.get("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)[0] > 127")
        assert luminous is not dark
        assert page.get("parseFloat(getComputedStyle(document.body).fontSize)") >= 16


def test_it_loads_nothing_from_elsewhere(tab):
    with served(Shown(a_good_day())) as at:
        page = tab(f"http://{at}/")
        page.wait(shows("Saving step-800"), "the page")
        assert page.urls
        assert {url.split("/")[2] for url in page.urls if not url.startswith("about:")} == {at}


def test_with_a_token_the_page_opens_once_it_was_shown(tab):
    with served(Shown(a_good_day()), access=Access(TOKEN)) as at:
        page = tab(f"http://{at}/?token={TOKEN}")
        page.wait("document.getElementById('link').innerText === 'live'", "events for who has the cookie")
        assert page.get("location.href") == f"http://{at}/"
        page.go(f"http://{at}/")
        page.wait(shows("Saving step-800"), "the page, without the token in its address")
        stranger = tab(f"http://{at}/")
        assert "show the token" in stranger.text()
        stranger.complaints.clear()  # the browser says 401, as it should


def test_a_daemon_that_is_away_is_said_to_be(tab):
    with served(Shown(a_good_day())) as at:
        page = tab(f"http://{at}/")
        page.wait("document.getElementById('link').innerText === 'live'", "the link")
    page.wait("document.getElementById('link').dataset.state === 'lost'", "that the link is lost")
    assert "no news for" in page.text()
    assert "Saving step-800" in page.text()  # the last that was heard stays
    page.complaints.clear()  # the browser says that it cannot connect


def test_where_no_stream_is_to_be_had_it_asks_again_and_again(tab, monkeypatch):
    monkeypatch.setattr("ckptd.daemon.http.events.MOST_STREAMS", 0)
    view = Shown(a_status())
    with served(view) as at:
        page = tab(f"http://{at}/")
        page.wait(shows("No trainer has connected yet."), "the first state, which comes with the page")
        view.answer = a_good_day()
        page.wait(shows("Saving step-800"), "a state asked for later")
        page.complaints.clear()  # the browser says 503, as it should


def test_the_picture_in_the_documentation_is_of_a_working_daemon(start_daemon, trainers, tmp_path, tab, browser):
    daemon = start_daemon(**SLOWLY)
    job = trainers.job(4, name="llama-finetune")
    for step in range(1, 6):
        job.do("dcp.save(state(value=rank), checkpoint_id=path)", path=str(tmp_path / f"step-{step}00"))
    job.do("outcome(dcp.async_save(state(), checkpoint_id='/dev/full/step-600'))")
    job.do(
        "big = {'w': torch.ones(12 << 20) * rank}; dcp.save(big, checkpoint_id=path)", path=str(tmp_path / "step-700")
    )
    job.do("future = dcp.async_save(big, checkpoint_id=path)", path=str(tmp_path / "step-800"))
    wait_until(
        lambda: any(save["bytes_done"] > save["bytes_total"] / 2 > 0 for save in daemon.generations()[-1:]), "half"
    )
    wait_until(lambda: "checkpoints" in daemon.status()["volumes"], "a look at the disk")
    with stopped(*daemon.workers(2)):
        url = f"http://{address(daemon)}/"
        desk = tab(url, width=1180, height=1240, scale=1.5)
        phone = tab(url, width=390, height=1240, scale=1.5, dark=True, phone=True)
        for page in (desk, phone):
            page.wait(shows("Saving step-800"), "the page")
            page.wait(shows("Room on disk"), "the room on the disk")
        pictures = [page.picture() for page in (desk, phone)]
    assert job.get("outcome(future)") == ["committed"] * 4
    picture = side_by_side(browser, *pictures)
    assert picture.startswith(b"\x89PNG")
    if wanted := os.environ.get("CKPTD_PAGE_PICTURE"):
        Path(wanted).write_bytes(picture)


def side_by_side(browser, *pictures):
    """Return one picture of several, made by the browser itself."""
    images = "".join(
        f'<img height=1240 style="border-radius:16px;box-shadow:0 4px 30px #0003" src="data:image/png;base64,{data}">'
        for data in (base64.b64encode(picture).decode() for picture in pictures)
    )
    page = browser.open("about:blank", width=1700, height=1320, scale=1.2)
    frame = page.call("Page.getFrameTree")["frameTree"]["frame"]["id"]
    style = "margin:0;padding:40px;display:flex;gap:40px;justify-content:center;background:#dfe3df"
    page.call("Page.setDocumentContent", frameId=frame, html=f'<body style="{style}">{images}</body>')
    page.wait("[...document.images].every((image) => image.complete && image.naturalWidth)", "the pictures")
    picture = page.picture()
    page.close()
    return picture
