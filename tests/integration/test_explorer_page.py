"""Tests of the explorer's page in headless Chromium: it shows what the models compute."""

import shutil
import threading
import time

import pytest
import torch

pytest.importorskip("starlette", reason='the explorer needs pip install -e ".[explore]"')
pytest.importorskip("selenium", reason="these tests need selenium")

import uvicorn
from selenium import webdriver
from selenium.webdriver import ActionChains
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

from betavae.applications.explorer import queries, server
from tests.unit.applications.test_explorer import make_run, png, to_bytes


@pytest.fixture(scope="module")
def explorer(data_root):
    return queries.load_models([make_run(3, 0.25, data_root), make_run(15, 4.0, data_root)])


@pytest.fixture(scope="module")
def url(explorer):
    listening = server.open_socket("127.0.0.1", 0)
    serving = uvicorn.Server(uvicorn.Config(server.build_app(explorer, set()), log_level="warning", lifespan="off"))
    thread = threading.Thread(target=serving.run, args=([listening],), daemon=True)
    thread.start()
    yield server.get_page_url(listening)[0]
    serving.should_exit = True
    thread.join(10)


@pytest.fixture(scope="module")
def browser():
    chromium, driver = shutil.which("chromium") or shutil.which("google-chrome"), shutil.which("chromedriver")
    if not chromium or not driver:
        pytest.skip("no Chromium with its chromedriver here (Debian: chromium, chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for argument in ("headless=new", "no-sandbox", "disable-gpu", "disable-dev-shm-usage", "window-size=1300,1500"):
        options.add_argument(f"--{argument}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    browser = webdriver.Chrome(options=options, service=Service(driver))
    yield browser
    browser.quit()


class Page:
    """The page in a browser, and the models to compare it with."""

    def __init__(self, browser, url, explorer):
        self.browser, self.models, self.images = browser, explorer.models, explorer.images
        browser.get(url)
        self.until(lambda: browser.execute_script("return document.body.dataset.ready"))

    def until(self, condition):
        deadline = time.monotonic() + 20
        while not condition():
            assert time.monotonic() < deadline, f"timed out; the page's message is {self.find('#message').text!r}"
            time.sleep(0.02)

    def find(self, css):
        return self.browser.find_element(By.CSS_SELECTOR, css)

    def pixels(self, css):
        """Read the red channel of a canvas, `(H, W)`."""
        width, *values = self.browser.execute_script(
            """const canvas = document.querySelector(arguments[0]);
            const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
            return [canvas.width, ...data.filter((_, i) => i % 4 === 0)];""",
            css,
        )
        return torch.tensor(values).view(-1, width)

    def shown(self, run):
        return self.pixels(f"#pictures .card:nth-of-type({run + 2}) canvas")

    def shows(self, latents):
        """Tell whether each run's image is what its model decodes, up to rounding."""
        wanted = [to_bytes(each.vae.decode(z[None])) for each, z in zip(self.models, latents, strict=True)]
        return all((self.shown(run) - image).abs().max() <= 1 for run, image in enumerate(wanted))

    def encoded(self, x):
        return [each.vae.encode(x.view(1, 1, 28, 28)).mean[0] for each in self.models]

    def moved(self, rank, value):
        """Make latents of 0 except for the dimension of this rank by KL."""
        latents = [torch.zeros(each.vae.latent_dim) for each in self.models]
        for z, each in zip(latents, self.models, strict=True):
            if rank < len(z):
                z[each.kl.argsort(descending=True)[rank]] = value
        return latents


@pytest.fixture
def page(browser, url, explorer):
    page = Page(browser, url, explorer)
    yield page
    assert not [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
    asked = browser.execute_script("return performance.getEntriesByType('resource').map((entry) => entry.name)")
    assert asked and all(name.startswith((url, "data:", "blob:")) for name in asked), (
        "the page loads nothing from other sites"
    )


def test_slider_changes_the_images_of_all_runs(page):
    page.until(lambda: page.shows(page.encoded(page.images.pixels[0].float() / 255)))
    page.find("#zero").click()
    page.until(lambda: page.shows(page.moved(0, 0.0)))
    before = page.shown(0)
    slider = page.find("#slider0")
    ActionChains(page.browser).move_to_element(slider).click_and_hold().move_by_offset(60, 0).release().perform()
    value = float(slider.get_attribute("value"))
    assert value > 0.5
    page.until(lambda: page.shows(page.moved(0, value)))
    assert (page.shown(0) - before).abs().max() > 10
    assert page.find("#sliders .slider output").text == f"{value:.2f}"
    slider.send_keys(Keys.ARROW_RIGHT)  # with the keyboard
    assert float(slider.get_attribute("value")) == pytest.approx(value + 0.01)
    page.until(lambda: page.shows(page.moved(0, value + 0.01)))


def test_sliders_are_sorted_by_kl_of_the_selected_run(page):
    visible = [s for s in page.browser.find_elements(By.CSS_SELECTOR, ".slider") if s.is_displayed()]
    order = page.models[0].kl.argsort(descending=True).tolist()
    assert [s.text.split(" ")[0] for s in visible] == [f"z{d}" for d in order]
    page.find("#lead").send_keys("latent_dim=15")
    visible = [s for s in page.browser.find_elements(By.CSS_SELECTOR, ".slider") if s.is_displayed()]
    assert len(visible) == 12 and page.find("#all").text == "Show all 15"
    page.find("#all").click()
    order = page.models[1].kl.argsort(descending=True).tolist()
    assert [s.text.split(" ")[0] for s in page.browser.find_elements(By.CSS_SELECTOR, ".slider")] == [
        f"z{d}" for d in order
    ]


def test_random_sample_agrees_with_the_sliders(page):
    page.find("#sample").click()
    page.until(lambda: "sample" in page.find("#chosen").text)
    values = [float(page.find(f"#slider{rank}").get_attribute("value")) for rank in range(3)]
    z = page.moved(0, 0)[0]
    z[page.models[0].kl.argsort(descending=True)] = torch.tensor(values)
    wanted = to_bytes(page.models[0].vae.decode(z[None]))
    page.until(lambda: (page.shown(0) - wanted).abs().max() <= 2)  # sliders round to 0.01
    assert any(values) and not page.find(".card dl").text


def test_click_on_the_map_chooses_the_nearest_image(page):
    canvas = page.find("#map canvas")
    width, height = (
        page.browser.execute_script(f"return arguments[0].client{side}", canvas) for side in ("Width", "Height")
    )
    x, y = 30, -40  # from the middle, down is positive
    ActionChains(page.browser).move_to_element_with_offset(canvas, x, y).click().perform()
    points = queries.compute_map(page.models[0], "pca").points
    low, high = points.min(0).values, points.max(0).values
    scale = 0.95 * min(width / (high - low)[0], height / (high - low)[1])
    away = ((points - (low + high) / 2) * scale - torch.tensor([x, -y])).norm(dim=1)
    page.until(lambda: page.find("#index").get_attribute("value") != "0")
    index = int(page.find("#index").get_attribute("value"))
    assert away[index] < away.min() + 2  # pixels
    assert torch.equal(page.pixels("#input canvas"), page.images.pixels[index, 0].long())
    page.until(lambda: page.shows(page.encoded(page.images.pixels[index].float() / 255)))
    assert f"label {page.images.labels[index]}" in page.find("#chosen").text


def test_a_tsne_map_rings_the_chosen_image(page, monkeypatch):
    pytest.importorskip("sklearn")
    monkeypatch.setattr(queries, "MAX_TSNE_IMAGES", 100)
    page.find("#axes option[value=tsne]").click()
    page.until(lambda: page.find("#share").text == "t-SNE of the first 100 test images")
    ring = page.pixels("#map canvas:nth-of-type(2)")
    page.find("#start").click()  # a path has no place on this map
    page.find("#slider0").send_keys(Keys.ARROW_RIGHT)
    assert torch.equal(page.pixels("#map canvas:nth-of-type(2)"), ring) and ring.any()
    canvas = page.find("#map canvas")
    ActionChains(page.browser).move_to_element_with_offset(canvas, 30, -40).click().perform()
    page.until(lambda: page.find("#index").get_attribute("value") != "0")
    assert int(page.find("#index").get_attribute("value")) < 100
    page.until(lambda: not torch.equal(page.pixels("#map canvas:nth-of-type(2)"), ring))
    page.find("#zero").click()  # no image is chosen
    page.until(lambda: not page.pixels("#map canvas:nth-of-type(2)").any())
    assert not page.find("#message").text


def test_drawing_is_reconstructed_and_scored(page):
    canvas = page.find("#drawing")
    actions = ActionChains(page.browser, duration=20).move_to_element_with_offset(canvas, -40, -60).click_and_hold()
    actions.move_by_offset(80, 0).move_by_offset(-30, 130).release().perform()
    page.until(lambda: "drawing" in page.find("#chosen").text)
    page.until(lambda: page.pixels("#input canvas").gt(60).any(1).sum() in (19, 20))  # when its foot is drawn
    seen = page.pixels("#input canvas")
    rows = seen.gt(60).sum(1)
    top, bottom = rows.nonzero()[[0, -1], 0].tolist()
    assert rows[top + 1] > 8 and rows[bottom - 1] < 6  # a bar above, a point below
    page.until(lambda: page.shows(page.encoded(seen.float() / 255)))
    score = float(page.find(".card dd").text.split()[0])
    assert score == pytest.approx(queries.encode_image(page.models[0], seen.float()[None] / 255)[1][0].value, abs=0.06)
    page.find("#clear").click()
    page.until(lambda: "prior" in page.find("#chosen").text)


def test_upload_is_shown_and_one_too_large_is_rejected(page, tmp_path):
    digit = page.images.pixels[8, 0]
    (tmp_path / "dark.png").write_bytes(png(255 - digit))
    page.find("#center").click()
    page.find("#file").send_keys(str(tmp_path / "dark.png"))
    page.until(lambda: torch.equal(page.pixels("#input canvas"), 255 - digit.long()))
    page.find("#invert").click()
    page.until(lambda: torch.equal(page.pixels("#input canvas"), digit.long()))
    page.until(lambda: page.shows(page.encoded(digit.float() / 255)))
    (tmp_path / "large.png").write_bytes(b"0" * (10 * 2**20 + 1))
    page.find("#file").send_keys(str(tmp_path / "large.png"))
    page.until(lambda: "too large" in page.find("#message").text)


def test_path_connects_the_two_images(page):
    index = page.find("#index")
    index.clear()
    index.send_keys("4", Keys.ENTER)
    page.until(lambda: "image 4" in page.find("#chosen").text)
    page.find("#end").click()
    ends = [page.encoded(page.images.pixels[number].float() / 255) for number in (0, 4)]
    wanted = [[to_bytes(each.vae.decode(z[None])) for each, z in zip(page.models, end, strict=True)] for end in ends]

    def drawn(run):
        strip = page.pixels(f"#strips figure:nth-of-type({run + 1}) canvas")
        return all(
            (strip[:, part] - wanted[end][run]).abs().max() <= 1
            for end, part in enumerate((slice(28), slice(-28, None)))
        )

    page.until(lambda: drawn(0) and drawn(1))
    page.find("#along").send_keys(Keys.HOME)
    page.until(lambda: page.shows(ends[0]))
    for _ in range(50):
        page.find("#along").send_keys(Keys.ARROW_RIGHT)
    page.until(lambda: page.shows([(start + end) / 2 for start, end in zip(*ends, strict=True)]))
    page.find("#end").click()
    assert page.find("#ends").text == "from test image 0 to a custom point"
