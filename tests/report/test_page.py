"""The report, looked at in a browser."""

import html
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from run_directories import EVIL, make_run_directory

from fv_distill import cli
from fv_distill.report import write_report

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
# On a developer's machine without a browser these are skipped; where changes are checked a missing one is a failure.
needs_browser = pytest.mark.skipif(CHROMIUM is None and not os.environ.get("CI"), reason="needs chromium")
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --disable-dev-shm-usage --no-first-run --disable-sync "
    "--disable-background-networking --disable-component-update --disable-extensions --disable-default-apps "
    "--enable-logging=stderr --virtual-time-budget=5000 --host-resolver-rules=MAP~*~NOTFOUND"
)

# What a visitor does and sees; the answers become the text of an element, which --dump-dom prints.
VISIT = """
<script>
window.problems = [];
window.addEventListener("error", (event) => problems.push(String(event.message)));
</script>
"""
MEASURE = """
<script>
window.addEventListener("load", async () => {
  const one = (selector) => document.querySelector(selector);
  const all = (selector) => [...document.querySelectorAll(selector)];
  const seen = {};
  await new Promise((resolve) => setTimeout(resolve, 500));
  seen.widths = [innerWidth, document.documentElement.scrollWidth];
  seen.wide = all("body *").filter((element) => !element.closest(".scroll, pre, svg, table") &&
    element.getBoundingClientRect().right > innerWidth + 1).map((element) => element.className);
  seen.resources = performance.getEntriesByType("resource").map((entry) => entry.name.slice(0, 40));
  seen.titles = all(".chart .title").map((title) => title.textContent);
  seen.paths = all(".chart .smooth").map((path) => path.getTotalLength());
  seen.areas = all(".area").map((area) => [area.clientWidth, area.clientHeight]);
  seen.cells = all(".map rect").length;
  seen.curves = all(".curves .smooth").length;
  seen.bad = all(".bad").length;
  seen.resumed = all(".chart")[0].querySelectorAll(".resumed").length;
  seen.attacked = window.attacked === true;
  seen.captions = all(".clips figcaption").map((caption) => caption.textContent);
  seen.pictures = all("img").map((image) => image.naturalWidth);
  seen.videos = all("video").map((video) => [video.videoWidth, video.error && video.error.message]);
  seen.background = getComputedStyle(document.body).backgroundColor;

  const [area] = all("[data-chart]"), box = area.getBoundingClientRect();
  const move = (x, y) => new PointerEvent("pointermove", { clientX: x, clientY: y, bubbles: true });
  area.dispatchEvent(move(box.left + box.width / 2, box.top + 5));
  seen.tip = area.querySelector(".tip").textContent;
  seen.cursors = all(".cursor").filter((cursor) => !cursor.hidden).length;
  area.dispatchEvent(new KeyboardEvent("keydown", { key: "Home" }));
  seen.home = area.querySelector(".tip").textContent;
  area.dispatchEvent(new PointerEvent("pointerleave"));
  seen.cursorsAfter = all(".cursor").filter((cursor) => !cursor.hidden).length;
  const map = one("[data-map]"), mapBox = map.getBoundingClientRect();
  map.dispatchEvent(move(mapBox.left + 2, mapBox.top + 2));
  seen.mapTip = map.querySelector(".tip").textContent;

  const shown = () => all(".validation").filter((step) => !step.hidden).map((step) => step.dataset.step);
  seen.steps = [shown()];
  one(".slider button").click();
  seen.steps.push(shown());
  const slider = one(".slider input");
  slider.value = 1;
  slider.dispatchEvent(new Event("input"));
  seen.steps.push(shown());
  seen.problems = window.problems;
  const answer = document.createElement("pre");
  answer.id = "answer";
  answer.textContent = JSON.stringify(seen);
  window.parent.document.body.append(answer);
});
</script>
"""


def chromium(folder: Path, page: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    assert CHROMIUM is not None, "chromium is not installed: apt-get install chromium"
    words = [flag.replace("~", " ") for flag in FLAGS.split()]
    command = [CHROMIUM, *words, f"--user-data-dir={folder / 'profile'}", *flags, page.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)


def visited(folder: Path, page: Path, *flags: str, width: int = 1280) -> dict:
    """What the page says of itself in a frame of a width (windows are no narrower than 500), and the browser of it."""
    # First the collector of errors, before any of the page's own elements.
    text = page.read_text().replace("<head>", f"<head>{VISIT}", 1).replace("</body>", f"{MEASURE}</body>", 1)
    frame = f'<iframe style="border:0;width:{width}px;height:900px" srcdoc="{html.escape(text)}"></iframe>'
    (folder / "frame.html").write_text(f"<!doctype html><body style='margin:0'>{frame}")
    log = folder / "net.json"
    words = ("--window-size=1400,1000", "--hide-scrollbars", "--dump-dom", f"--log-net-log={log}", *flags)
    result = chromium(folder, folder / "frame.html", *words)
    answer = re.search(r'<pre id="answer">(.*?)</pre>', result.stdout, re.DOTALL)
    assert answer, result.stdout[-2000:] + result.stderr[-2000:]
    seen = json.loads(html.unescape(answer[1]))
    seen["console"] = [line for line in result.stderr.splitlines() if "CONSOLE" in line]
    seen["requests"] = requests_of_pages(log)
    return seen


def requests_of_pages(log: Path) -> list[str]:
    """What pages asked the network for; the browser's own requests, for updates and the time, have no origin."""
    events = [event.get("params", {}) for event in json.loads(log.read_text())["events"]]
    urls = [params["url"] for params in events if params.get("initiator", "not an origin") != "not an origin"]
    return [url for url in urls if not url.startswith(("data:", "file:"))]


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    run = make_run_directory(tmp_path_factory.mktemp("report") / "a <b> & 'run'")
    return write_report(run)


@pytest.fixture(scope="module", params=[400, 1280])
def seen(request, page, tmp_path_factory):
    return visited(tmp_path_factory.mktemp("browser"), page, width=request.param) | {"width": request.param}


@needs_browser
def test_it_fits_its_window(seen):
    assert seen["widths"] == [seen["width"], seen["width"]]
    assert seen["wide"] == []
    assert all(width > 200 and height > 100 for width, height in seen["areas"])


@needs_browser
def test_nothing_goes_wrong_and_nothing_is_fetched(seen):
    assert seen["problems"] == [] and seen["console"] == []
    assert [name for name in seen["resources"] if not name.startswith("data:")] == []
    assert seen["requests"] == []


@needs_browser
def test_a_request_would_have_been_seen_and_the_policy_would_have_stopped_it(page, tmp_path):
    asking = tmp_path / "asking.html"
    asking.write_text(page.read_text().replace("<header>", "<header><img src='http://elsewhere.invalid/x.png'>", 1))
    seen = visited(tmp_path, asking)
    assert seen["requests"] == [] and "Content Security Policy" in "".join(seen["console"])
    asking.write_text(re.sub("<meta http-equiv=.*>", "", asking.read_text(), count=1))
    assert visited(tmp_path, asking)["requests"] == ["http://elsewhere.invalid/x.png"]


@needs_browser
def test_every_chart_is_drawn(seen):
    assert seen["titles"] == ["loss/student", "loss/critic", "grad_norm/student", "lr/critic"]
    assert all(length > 100 for length in seen["paths"]) and len(seen["paths"]) == 4
    # Six windows of nine bins; the tenth has no samples.
    assert (seen["cells"], seen["curves"]) == (54, 3)
    assert (seen["bad"], seen["resumed"]) == (1, 1)


@needs_browser
def test_what_users_write_stays_text(seen):
    assert seen["attacked"] is False
    assert seen["captions"] == ["a digit", EVIL] * 2


@needs_browser
def test_pictures_and_clips_are_decoded(seen):
    assert len(seen["pictures"]) == 4 and all(width >= 64 for width in seen["pictures"])
    assert seen["videos"] == [[64, None], [64, None]]


@needs_browser
def test_it_answers_to_pointer_keys_and_slider(seen):
    assert re.match(r"step (58|60|62): \S+\naverage \S+$", seen["tip"])
    assert seen["home"].startswith("step 2: 2.909")
    assert (seen["cursors"], seen["cursorsAfter"]) == (4, 0)
    assert seen["mapTip"] == "steps 1 to 20, sigma 0.9 to 1.0\nloss 7.369, 9 samples"
    assert seen["steps"] == [["120"], ["60"], ["120"]]


@needs_browser
def test_it_is_dark_where_the_system_is(page, tmp_path):
    light, dark = (visited(tmp_path, page, *flags) for flags in ((), ("--blink-settings=preferredColorScheme=0",)))
    brightness = [sum(map(int, re.findall(r"\d+", seen["background"])[:3])) for seen in (light, dark)]
    assert brightness[0] > 600 and brightness[1] < 150


def test_the_page_says_what_the_run_is(page):
    text = page.read_text()
    assert "<h1>a &lt;b&gt; &amp; &#39;run&#39;</h1>" in text
    for fact in ("DMD2Method", "120 of 200", "2, sharded", "1 damaged line of metrics.jsonl left out."):
        assert fact in text
    assert "step-00000120.incomplete" in text and "1.5 kB" in text and "2 x " in text
    assert EVIL not in text and "<img src=x" not in text


def test_a_run_that_has_only_begun(tmp_path, capsys):
    run = tmp_path / "run"
    run.mkdir()
    (run / "metrics.jsonl").write_text("")
    cli.main(["report", str(run), "--output", str(tmp_path / "pages" / "one.html")])
    assert capsys.readouterr().out.split() == ["wrote", str(tmp_path / "pages" / "one.html")]
    text = (tmp_path / "pages" / "one.html").read_text()
    assert "No step has been logged yet." in text and "There is no resolved_config.yaml" in text


@pytest.mark.parametrize(("name", "message"), [("none", "is no directory"), ("empty", "is no run: it has neither")])
def test_what_is_no_run_is_status_2(tmp_path, capsys, name, message):
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit) as caught:
        cli.main(["report", str(tmp_path / name)])
    assert caught.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / name / "report.html").exists()


def test_throughput_is_shown_where_it_was_measured(tmp_path):
    run = make_run_directory(tmp_path / "run", num_steps=3)
    assert "Throughput" not in write_report(run).read_text()
    (run / "throughput.jsonl").write_text('{"step": 1, "samples/s": 3.5}\n{"step": 2, "samples/s": 4.5}\n')
    assert re.search(r"<h2>Throughput</h2>.*samples/s", write_report(run).read_text(), re.DOTALL)
