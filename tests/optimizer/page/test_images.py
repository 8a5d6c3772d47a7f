"""The grids of images on the page, and how the page speaks of their likeness."""

from __future__ import annotations

import dataclasses
import html
import re
from base64 import b64encode

from answers import bare, report

from edgewise.optimizer.page.images import images_section
from edgewise.optimizer.page.render import page_of, render
from edgewise.optimizer.pictures import Pictures
from edgewise.optimizer.report import Report, Score

SEEN = Pictures(40, 500, 37.62, 0.98765, b"\x89PNG before", b"\x89PNG after", (1.5, 1.62, 0.16))


def told() -> Report:
    return dataclasses.replace(report(), images=SEEN, score=Score("psnr", 100.0, 37.6, 70.0, 384))


def test_both_grids_are_in_the_page_itself() -> None:
    page = render(told())
    for png in (SEEN.before, SEEN.after):
        assert f'src="data:image/png;base64,{b64encode(png).decode()}"' in html.unescape(page)
    assert page.count("<img ") == 2
    assert all('alt="40 images of the ' in tag for tag in re.findall("<img [^>]*>", page))


def test_says_how_alike_they_are_and_how_real() -> None:
    page = render(told())
    assert "500 images have a PSNR of 37.6 dB against those before, a difference that is hard to see" in page
    assert "an SSIM of 0.9877." in page
    assert "1.50 before, 1.62 after (other real images: 0.16)." in page


def test_psnr_is_told_by_what_is_reached_and_wanted() -> None:
    """That so many dB of a cap are lost says nothing to anybody."""
    page = page_of(told())
    (headline,) = (h for h in page.headlines if h.label == "Likeness of the images")
    assert headline.value == "37.6 dB"
    assert "at least 30 dB wanted" in headline.detail
    assert headline.tone == "good"
    assert page.summary.endswith("with images 37.6 dB PSNR from the input's.")
    assert "70 may be lost" not in render(told())


def test_is_absent_where_nothing_is_drawn() -> None:
    assert images_section(None) == ()
    assert "images" not in [s.name for s in page_of(bare()).sections]
    assert "<img" not in render(bare())
