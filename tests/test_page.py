"""The page of an analysis, in a browser."""

import base64
import io
import json
import re

import numpy as np
import pytest
import torch
from browser import CHROMIUM, Browser
from PIL import Image

from timm_mfd.figures import correlation_by_stage
from timm_mfd.moments import ChannelMoments, ClassMeans
from timm_mfd.page import write_page
from timm_mfd.page.page import viewed_channels
from timm_mfd.page.sprites import sprite, thumbnail
from timm_mfd.redundancy import StageRedundancy
from timm_mfd.stages import StageInfo

NAMES = ("runs/a", "<b>'&\"</script>")


def planted(seed, channels):
    """A stage of noise in which 5 and 2 are one group, 1, 6 and 7 another, channel 3 is dead, and 6 is flipped."""
    torch.manual_seed(seed)
    x = torch.randn(30, channels, 4, 4)
    x[:, 5], x[:, 6], x[:, 7], x[:, 3] = 2 * x[:, 2], -x[:, 1], x[:, 1] + 0.02 * x[:, 0], 0.25
    moments = ChannelMoments()
    moments.update(x)
    stage = StageRedundancy.of(
        StageInfo(seed % 2, f"layer{seed % 2}", channels, 2), (4, 4), moments, ClassMeans(0), 0.95
    )
    assert stage.groups == ((1, 6, 7), (2, 5))
    return stage, x[:2]


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """A page of two models with two stages of 12 and 70 channels, two images and a picture."""
    folder = tmp_path_factory.mktemp("page")
    both = [[planted(2 * number + index, channels) for index, channels in ((0, 12), (1, 70))] for number in range(2)]
    models = {name: [stage for stage, _ in stages] for name, stages in zip(NAMES, both, strict=True)}
    maps = {name: [x for _, x in stages] for name, stages in zip(NAMES, both, strict=True)}
    pictures = {}
    for ending in ("png", "svg"):
        values = {name: [0.2, 0.1] for name in NAMES}
        pictures[f"as {ending}"] = correlation_by_stage(values, [0, 1], folder / f"a.{ending}", "mean |r|")
    images = torch.stack([torch.zeros(3, 8, 8), torch.ones(3, 8, 8)])
    return (
        write_page(
            folder / "report.html",
            models,
            maps,
            images,
            ["black <&>", "white"],
            data="noise",
            pictures=pictures,
            facts={NAMES[1]: "top-1 50 %"},
            notes=["a note"],
        ),
        models,
        maps,
    )


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    if CHROMIUM is None:
        pytest.skip("no Chromium is installed; the page was not looked at")
    started = Browser(tmp_path_factory.mktemp("profile"))
    yield started
    started.close()


@pytest.fixture
def browser(chromium, page):
    """The page as it is before anybody has clicked."""
    chromium.open(page[0])
    return chromium


def test_every_picture_is_shown_and_nothing_is_complained_about_or_fetched(page, browser):
    sizes = browser.evaluate("Array.from(document.images, (image) => image.complete && image.naturalWidth)")
    assert len(sizes) == 2 + 2  # two pictures, two thumbnails
    assert all(sizes)
    assert [browser.evaluate(f"document.querySelectorAll('figure img')[{n}].alt") for n in (0, 1)] == [
        "as png",
        "as svg",
    ]
    for stage in (0, 1):
        for image in (0, 1):
            click(browser, "images", image)
            click(browser, "stages", stage)
            for panel in (0, 1):
                address = browser.evaluate(
                    f"{PANEL(panel)}.querySelector('.picture').style.backgroundImage.slice(5, -2)"
                )
                wide = browser.evaluate(
                    "new Promise((done) => { const sheet = new Image(); sheet.onload = () => done(sheet.naturalWidth);"
                    f" sheet.onerror = () => done(0); sheet.src = {json.dumps(address)}; }})"
                )
                assert wide == 16 * 4
    assert browser.complaints == []
    assert browser.requests == [page[0].as_uri()]


def test_the_tables_say_what_was_measured(page, browser):
    rows = browser.evaluate("Array.from(document.querySelectorAll('#means tbody tr'), (row) => row.innerText)")
    first, second = page[1].values()
    for row, a, b in zip(rows, first, second, strict=True):
        ratio = b.mean_abs_r / a.mean_abs_r
        assert row.split() == [
            *(str(a.stage), a.module, f"{a.mean_abs_r:.3f}", f"{b.mean_abs_r:.3f}", f"{ratio:.2f}"),
            *(f"{a.effective_rank:.1f}", f"{b.effective_rank:.1f}", "1", "1"),
        ]
    rows = browser.evaluate("Array.from(document.querySelectorAll('#statistics tbody tr'), (row) => row.innerText)")
    assert len(rows) == 4
    for row, (letter, stage) in zip(rows, [*(("A", s) for s in first), *(("B", s) for s in second)], strict=True):
        cells = row.split()
        assert cells[:4] == [letter, str(stage.stage), str(stage.channels), "4x4"]
        assert cells[8:] == [f"{stage.effective_rank:.1f}", "1", "0", "5", "-"]
    names = browser.evaluate("Array.from(document.querySelectorAll('.model'), (name) => name.innerText)")
    assert names == [f"A {NAMES[0]}", f"B {NAMES[1]}top-1 50 %"]
    text = browser.evaluate("document.body.innerText")
    assert "a note" in text
    assert "every pair of a group has |r| > 0.95" in text


def PANEL(number):
    return f"document.querySelectorAll('.panel')[{number}]"


def click(browser, kind, index):
    browser.evaluate(f"document.querySelectorAll('#{kind} button')[{index}].click()")


def channels(browser, panel):
    return browser.evaluate(
        f"Array.from({PANEL(panel)}.querySelectorAll('.map'), (map) => Number(map.dataset.channel))"
    )


def choose(browser, panel, value):
    browser.evaluate(
        f"{{ const select = {PANEL(panel)}.querySelector('select'); select.value = {json.dumps(value)};"
        " select.dispatchEvent(new Event('change')); }"
    )


def test_stage_image_and_group_can_be_chosen_and_each_model_has_its_own_groups(browser):
    assert channels(browser, 0) == channels(browser, 1) == list(range(12))
    choose(browser, 0, "group 1")
    assert channels(browser, 0) == [2, 5]
    assert channels(browser, 1) == list(range(12))
    choose(browser, 1, "group 0")
    assert channels(browser, 1) == [1, 6, 7]
    before = browser.evaluate(f"{PANEL(0)}.querySelector('.picture').style.backgroundImage")
    click(browser, "images", 1)
    assert browser.evaluate(f"{PANEL(0)}.querySelector('.picture').style.backgroundImage") != before
    assert channels(browser, 0) == [2, 5]  # another image shows the same channels
    click(browser, "stages", 1)
    assert channels(browser, 0) == channels(browser, 1) == list(range(64))
    assert "70 channels of 4x4" in browser.evaluate(f"{PANEL(1)}.innerText")
    pressed = "Array.from(document.querySelectorAll('[aria-pressed=true]'), (button) => button.innerText)"
    assert browser.evaluate(pressed) == ["white", "1"]


def test_each_map_is_the_place_of_its_channel_in_the_sprite_and_the_matrix_holds_their_r(page, browser):
    click(browser, "stages", 1)
    stage = next(iter(page[1].values()))[1]
    places = browser.evaluate(
        f"Array.from({PANEL(0)}.querySelectorAll('.picture'), ({{ style }}) =>"
        " [style.backgroundSize, style.backgroundPosition, style.aspectRatio])"
    )
    for channel, (size, position, ratio) in enumerate(places):
        columns, rows = (float(value.strip("%")) / 100 for value in size.split())
        left, top = (float(value.strip("%")) / 100 for value in position.split())
        assert (columns, rows) == (16, 5)  # 70 maps
        assert 16 * round(top * (rows - 1)) + round(left * (columns - 1)) == channel
        assert ratio.split()[0] == "1"
    red = browser.evaluate(
        f"{{ const canvas = {PANEL(0)}.querySelector('canvas');"
        " Array.from(canvas.getContext('2d').getImageData(0, 0, 64, 64).data).filter((_, place) => place % 4 === 0) }"
    )
    expected = 255 - 247 * stage.correlation[:64, :64].abs().numpy()
    np.testing.assert_allclose(np.array(red).reshape(64, 64), expected, atol=1)


def test_the_focus_stays_on_the_channel(browser):
    browser.evaluate(f"{PANEL(0)}.querySelector('[data-channel=\"10\"]').focus()")
    browser.evaluate("document.activeElement.click()")
    assert browser.evaluate("document.activeElement.dataset.channel") == "10"
    assert channels(browser, 0)[0] == 10


def test_frames_letters_and_crosses_are_those_of_the_groups_and_the_dead(browser):
    marks = browser.evaluate(
        f"Array.from({PANEL(0)}.querySelectorAll('.grouped'), (map) => [Number(map.dataset.channel),"
        " map.querySelector('.picture').dataset.letter, map.style.getPropertyValue('--frame')])"
    )
    assert [mark[:2] for mark in marks] == [[1, "a"], [2, "b"], [5, "b"], [6, "a"], [7, "a"]]
    assert len({mark[2] for mark in marks}) == 2
    assert browser.evaluate("document.querySelectorAll('.dead').length") == 2
    assert browser.evaluate(f"{PANEL(1)}.querySelector('.dead').title") == "channel 3, dead"


def test_a_clicked_map_brings_what_resembles_it_to_the_front_with_its_sign(page, browser):
    click(browser, "stages", 1)
    browser.evaluate(f"{PANEL(1)}.querySelector('[data-channel=\"6\"]').click()")
    stage = list(page[1].values())[1][1]
    r = stage.correlation[6]
    by_size = sorted((c for c in range(70) if c != 6), key=lambda c: -abs(round(float(r[c]), 3)))
    found = channels(browser, 1)
    assert found[:3] == [6, 1, 7]
    assert sorted(found[1:]) == sorted(by_size[:63])
    written = browser.evaluate(f"Array.from({PANEL(1)}.querySelectorAll('.map'), (map) => map.innerText.trim())")
    written = [text.split() for text in written]
    assert written[0] == ["6"]
    assert [int(channel) for channel, _ in written[1:]] == found[1:]
    assert [float(value) for _, value in written[1:]] == pytest.approx([float(r[c]) for c in found[1:]], abs=5.1e-4)
    assert float(written[1][1]) == -1
    browser.evaluate(f"{PANEL(1)}.querySelector('[data-channel=\"6\"]').click()")
    assert channels(browser, 1) == list(range(64))


def test_a_sprite_holds_every_map_in_its_place_scaled_by_itself():
    maps = torch.randn(20, 4, 6)
    maps[3] = 7.0
    sheet = pixels_of(sprite(maps, 16))
    assert sheet.shape == (2 * 4, 16 * 6)
    for channel in range(20):
        row, column = divmod(channel, 16)
        cell = sheet[4 * row : 4 * row + 4, 6 * column : 6 * column + 6]
        one = maps[channel].numpy()
        expected = np.full((4, 6), 0.5) if channel == 3 else (one - one.min()) / (one.max() - one.min())
        np.testing.assert_allclose(cell / 255, expected, atol=0.003)
    assert not sheet[4:, 4 * 6 :].any()
    assert pixels_of(sprite(torch.tensor([1.0, 3.0, 2.0])[:, None, None], 3)).tolist() == [[0, 255, 128]]
    assert pixels_of(sprite(torch.randn(2, 100, 30), 16)).shape == (48, 16 * 30)
    assert pixels_of(thumbnail(torch.rand(3, 400, 200))).shape == (128, 64, 3)


def pixels_of(uri):
    return np.array(Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))))


def test_of_a_wide_stage_the_first_channels_and_the_largest_groups_are_in_the_page():
    stage, _ = planted(0, 500)
    groups = (tuple(range(300, 400)), (410, 411), (2, 480))
    object.__setattr__(stage, "groups", groups)
    viewed = viewed_channels(stage)
    assert len(viewed) == 192
    assert {*range(64), *groups[0], 410, 411, 480} <= set(viewed)
    object.__setattr__(stage, "groups", (tuple(range(200, 500)), (1, 2)))
    assert len(viewed_channels(stage)) == 192


def test_nothing_in_the_page_is_outside_of_it(page):
    html = page[0].read_text()
    assert not re.findall(r"""(?:src|href)=["'](?!data:)""", html)
    assert "http" not in re.sub(r"data:[^\"']*", "", html)
    assert "</script>'" not in html


def test_nothing_to_show_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="no models or no images"):
        write_page(tmp_path / "a.html", {}, {}, torch.empty(0, 3, 4, 4), [], data="nothing", pictures={})
