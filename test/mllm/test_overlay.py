"""The overlay: which pixels are bright, which lines are drawn, and for how long a look is shown."""

from __future__ import annotations

import numpy as np
import pytest

from mllm.errors import PolicyError
from mllm.overlay import BADGE, COMPUTED, CONTINUED, DIMMED, LINK, REUSED, SIDE, Badge, Overlay, kept_pixels, links
from mllm.policy import ActionStep, TokenLayout

TWO = TokenLayout(("front", "wrist"), 2, 3)
ACTION = np.zeros(7, np.float32)


def pixels(layout, camera, kept, shape):
    """Rows of an image as text: # bright, . dark."""
    bright = kept_pixels(layout, camera, None if kept is None else np.array(kept), shape)
    return ["".join(".#"[pixel] for pixel in row) for row in bright.astype(int)]


def test_a_token_s_pixels_are_bright_and_count_over_all_cameras():
    kept = [1, 3, 8, 11]
    assert pixels(TWO, "front", kept, (4, 6)) == ["..##..", "..##..", "##....", "##...."]
    assert pixels(TWO, "wrist", kept, (4, 6)) == ["....##", "....##", "....##", "....##"]


def test_a_pixel_between_two_tokens_is_the_one_s_that_its_middle_lies_in():
    assert pixels(TokenLayout(("front",), 1, 2), "front", [0], (1, 5)) == ["##..."]
    assert pixels(TokenLayout(("front",), 1, 3), "front", [1], (1, 7)) == ["..###.."]


def test_a_model_that_sees_the_image_mirrored_keeps_the_other_side():
    mirrored = TokenLayout(("front",), 2, 3, mirror=True)
    assert pixels(mirrored, "front", [0, 4], (2, 3)) == ["..#", ".#."]


def test_what_the_crop_cuts_off_is_dark_and_the_tokens_share_the_middle():
    cropped = TokenLayout(("front",), 2, 2, area=0.25)
    assert pixels(cropped, "front", None, (4, 8)) == ["........", "..####..", "..####..", "........"]
    assert pixels(cropped, "front", [1], (4, 8)) == ["........", "....##..", "........", "........"]


def test_all_is_bright_where_none_was_chosen_and_nothing_of_a_camera_that_the_model_has_not():
    assert pixels(TWO, "wrist", None, (2, 2)) == ["##", "##"]
    assert pixels(TWO, "side", None, (2, 2)) == ["..", ".."]


def test_a_line_goes_from_the_merged_token_s_middle_to_its_new_one_s():
    merged = np.array([[0, 5], [7, 6], [2, 9]])  # the last goes to the other camera
    np.testing.assert_array_equal(links(TWO, "front", merged, (20, 30)), [[[5, 5], [25, 15]]])
    np.testing.assert_array_equal(links(TWO, "wrist", merged, (20, 30)), [[[15, 5], [5, 5]]])
    assert links(TWO, "side", merged, (20, 30)).shape == (0, 2, 2)


def test_a_line_is_mirrored_and_cropped_with_its_tokens():
    layout = TokenLayout(("front",), 2, 2, area=0.25, mirror=True)
    np.testing.assert_array_equal(links(layout, "front", np.array([[0, 2]]), (40, 80)), [[[50, 15], [50, 25]]])


def test_the_picture_has_kept_pixels_as_they_were_the_rest_dimmed_and_a_line():
    layout = TokenLayout(("front",), 2, 2)
    overlay = Overlay(layout)
    badge = overlay.add(ActionStep(ACTION, kept=np.array([0, 3]), merged=np.array([[1, 3]])))
    picture = overlay.draw(np.full((SIDE, SIDE, 3), 200, np.uint8), "front", badge)
    assert picture.shape == (SIDE + BADGE, SIDE, 3)
    quarter = SIDE // 4
    assert (picture[quarter, quarter] == 200).all()
    assert (picture[3 * quarter, quarter] == round(200 * DIMMED)).all()
    np.testing.assert_allclose(picture[2 * quarter, 3 * quarter], LINK, atol=20)  # antialiased
    assert tuple(picture[-1, 0]) == COMPUTED


def test_a_small_image_is_enlarged_by_a_whole_number_and_a_large_one_is_not():
    overlay = Overlay(None)
    badge = overlay.add(ActionStep(ACTION))
    assert overlay.draw(np.zeros((100, 150, 3), np.uint8), "any", badge).shape == (400 + BADGE, 600, 3)
    large = np.random.default_rng(0).integers(0, 256, (400, 500, 3), np.uint8)
    np.testing.assert_array_equal(overlay.draw(large, "any", badge)[:400], large)


@pytest.mark.parametrize(
    ("flags", "badge"),
    [
        ({}, Badge("computed", COMPUTED)),
        ({"reuse": False, "reuse_reason": "computed-frame-changed"}, Badge("computed: frame changed", COMPUTED)),
        (
            {"reuse": True, "reuse_angle": 4.2, "reuse_overlap": 0.81, "reuse_surprise": 12.0},
            Badge("reused: 4 deg, 81% same, 12 grey", REUSED),
        ),
    ],
)
def test_the_badge_says_what_was_done_and_why(flags, badge):
    assert Overlay(TWO).add(ActionStep(ACTION, flags=flags)) == badge


def test_a_reuse_of_several_actions_keeps_the_badge_that_it_began_with():
    overlay = Overlay(TWO)
    started = overlay.add(ActionStep(ACTION, flags={"reuse": True, "reuse_reason": "reused", "reuse_angle": 4.0}))
    assert started.text == "reused: 4 deg"
    assert overlay.add(ActionStep(ACTION, flags={"reuse": True})) == started
    again = overlay.add(ActionStep(ACTION, flags={"reuse": True, "reuse_reason": "reused", "reuse_angle": 5.0}))
    assert again.text == "reused: 5 deg"


def test_reuses_and_the_rest_of_a_plan_show_the_tokens_of_the_last_look():
    overlay, plan = Overlay(TWO), np.zeros((4, 7), np.float32)
    shown = []
    for step in (
        ActionStep(ACTION, kept=np.array([1]), plan=plan, left=1),
        ActionStep(ACTION),
        ActionStep(ACTION, flags={"reuse": True}),
        ActionStep(ACTION, kept=np.array([2]), plan=plan),
        ActionStep(ACTION, plan=plan, left=1),  # compression was switched off
    ):
        colour = overlay.add(step).colour
        shown.append((None if overlay.kept is None else overlay.kept.tolist(), colour))
    expected = [([1], COMPUTED), ([1], CONTINUED), ([1], REUSED), ([2], COMPUTED), (None, COMPUTED)]
    assert shown == expected


def test_a_new_episode_shows_nothing_of_the_last():
    overlay = Overlay(TWO)
    overlay.add(ActionStep(ACTION, kept=np.array([1]), merged=np.array([[0, 1]]), left=3))
    overlay.clear()
    assert overlay.add(ActionStep(ACTION)).colour == COMPUTED
    assert overlay.kept is overlay.merged is None


@pytest.mark.parametrize(("layout", "tokens"), [(TWO, 12), (None, 0)])
def test_tokens_that_the_layout_has_not_are_an_error_with_both_numbers(layout, tokens):
    with pytest.raises(PolicyError, match=f"kept has tokens 3 to 12: the policy's layout has {tokens}"):
        Overlay(layout).add(ActionStep(ACTION, kept=np.array([3, 12])))


def test_after_tokens_that_were_refused_the_older_ones_are_not_shown():
    overlay = Overlay(TWO)
    overlay.add(ActionStep(ACTION, kept=np.array([1])))
    with pytest.raises(PolicyError):
        overlay.add(ActionStep(ACTION, kept=np.array([12])))
    overlay.add(ActionStep(ACTION, flags={"reuse": True}))
    assert overlay.kept is None
