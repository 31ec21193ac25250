import hashlib
import io
from functools import cache

import numpy as np
import pytest
from PIL import Image, ImageFilter

from benchmarks.scene_score import Score, read_single, score_single
from stages.sources.synthetic.scenes import (
    BACKGROUNDS,
    COLORS,
    POSITIONS,
    SIZES,
    VOCABULARY,
    Scene,
    Split,
    encode_image,
    is_held_out,
    render,
    scene,
)
from stages.sources.synthetic.shapes import SHAPES, encode_png, shape_mask


@cache
def scenes(num=2000, split: Split = "all") -> list[Scene]:
    return [scene(0, i, split) for i in range(num)]


@cache
def singles(num=200) -> list[Scene]:
    return [s for s in scenes() if len(s.objects) == 1][:num]


def pairs(num=300) -> list[Scene]:
    return [s for s in scenes() if len(s.objects) == 2][:num]


def colored(s: Scene, color: str, size_px=160) -> np.ndarray:
    return (render(s, size_px) == COLORS[color]).all(axis=-1)


# --- content


def test_scenes_are_the_same_for_ever():
    assert [scene(0, i).captions for i in range(6)] == [
        ("a small green triangle to the left of a small blue square on a beige background",),
        ("a large red circle above a large yellow circle",),
        ("a large purple circle to the right of a small yellow star",),
        ("a small green triangle at the bottom", "at the bottom there is a small green triangle"),
        ("a small green cross at the top on a pink background",),
        ("a large purple star to the left of a large blue cross",),
    ]
    distant = [scene(0, 0), scene(7, 10**9, "train"), scene(123456789, 5, "held_out")]
    whole = "\n".join(map(repr, distant))
    assert (
        hashlib.sha256(whole.encode()).hexdigest()
        == "917b85e6820628841cfe25a9b9279ddae4625ec618432938726d9ca59df86329"
    )


def test_other_seeds_give_other_scenes():
    same = sum(scene(0, i).captions == scene(1, i).captions for i in range(500))
    assert same < 10


def test_same_caption_gives_different_images():
    by_caption: dict[str, list[Scene]] = {}
    for s in singles(1000):
        by_caption.setdefault(s.captions[0], []).append(s)
    repeated = [group for group in by_caption.values() if len(group) > 1]
    assert len(repeated) > 50
    assert all((render(a) != render(b)).any() for a, b, *_ in repeated[:100])


def test_vocabulary_is_exactly_the_words_of_the_captions():
    words = {word for s in scenes() for caption in s.captions for word in caption.split()}
    assert tuple(sorted(words)) == VOCABULARY


def test_captions_are_short_lower_case_and_name_every_object():
    for s in scenes():
        for caption in s.captions:
            assert 7 <= len(caption.split()) <= 16
            assert caption == caption.lower()
            assert all(f"a {o.size} {o.color} {o.shape}" in caption for o in s.objects)
            assert (f"{s.background} background" in caption) == (s.background != "white")


def test_every_fourth_scene_has_a_paraphrase():
    for i, s in enumerate(scenes()):
        assert len(set(s.captions)) == (2 if i % 4 == 3 else 1)


def test_mix_of_scenes():
    num = len(scenes())
    assert 0.45 < len(pairs(num)) / num < 0.55
    shares = {
        size: sum((s.width_px, s.height_px) == size for s in scenes()) / num
        for size in [(320, 320), (400, 300), (300, 400)]
    }
    assert sum(shares.values()) == pytest.approx(1)
    assert shares[320, 320] > 0.65
    assert min(shares.values()) > 0.1
    for attribute, values in {"shape": SHAPES, "color": COLORS, "size": SIZES, "position": POSITIONS}.items():
        counts = [sum(getattr(s.objects[0], attribute) == v for s in singles(num)) for v in values]
        assert min(counts) > 0.7 * max(counts)


# --- split


def test_splits_share_no_caption():
    train, held_out = ({c for s in scenes(split=split) for c in s.captions} for split in ("train", "held_out"))
    assert train.isdisjoint(held_out)


def test_split_depends_on_the_arrangement_only():
    held_out = {s.captions[0]: is_held_out(s) for s in scenes()}
    for seed in (1, 2):
        for i in range(500):
            s = scene(seed, i)
            assert held_out.get(s.captions[0], is_held_out(s)) == is_held_out(s)
    # A pair named the other way round is the same arrangement.
    for s in pairs():
        assert is_held_out(Scene(s.objects[::-1], "grey", (), 320, 320)) == is_held_out(s)


def test_about_a_tenth_is_held_out_and_training_shows_every_word():
    assert 0.07 < sum(map(is_held_out, scenes())) / len(scenes()) < 0.13
    assert all(is_held_out(s) for s in scenes(200, "held_out"))
    assert not any(is_held_out(s) for s in scenes(200, "train"))
    for split in ("train", "held_out"):
        words = {w for s in scenes(split=split) for c in s.captions for w in c.split()}
        assert words == set(VOCABULARY)


def test_unknown_split_is_refused():
    with pytest.raises(ValueError, match="'test'"):
        scene(0, 0, "test")  # type: ignore[arg-type]


# --- drawing


def test_colors_and_backgrounds_are_far_apart():
    palette = np.array([*COLORS.values(), *BACKGROUNDS.values()], float)
    distances = np.linalg.norm(palette[:, None] - palette, axis=-1)
    is_color = np.arange(len(palette)) < len(COLORS)
    relevant = (is_color[:, None] | is_color) & ~np.eye(len(palette), dtype=bool)
    assert distances[relevant].min() > 80


def test_known_points_have_the_right_color():
    for s in scenes()[:200]:
        pixels = render(s)
        assert pixels.shape == (320, 320, 3)
        assert pixels.dtype == np.uint8
        for o in s.objects:
            middle = pixels[int(o.center_y * 320), int(o.center_x * 320)]
            assert tuple(middle) == (BACKGROUNDS[s.background] if o.shape == "ring" else COLORS[o.color])
        for corner in (pixels[0, 0], pixels[0, -1], pixels[-1, 0], pixels[-1, -1]):
            assert tuple(corner) == BACKGROUNDS[s.background]


def test_objects_stay_inside_the_centre_square():
    for s in scenes()[:100]:
        pixels = np.asarray(Image.open(io.BytesIO(encode_image(s))))
        assert pixels.shape == (s.height_px, s.width_px, 3)
        side = min(s.width_px, s.height_px)
        top, left = (s.height_px - side) // 2, (s.width_px - side) // 2
        square = pixels[top : top + side, left : left + side]
        np.testing.assert_array_equal(square, render(s, side))
        outside = pixels.copy()
        outside[top + 1 : top + side - 1, left + 1 : left + side - 1] = BACKGROUNDS[s.background]
        assert (outside == BACKGROUNDS[s.background]).all()


def test_relation_of_a_pair_holds_in_the_pixels():
    seen = set()
    for s in pairs():
        (ax, ay), (bx, by) = (np.argwhere(colored(s, o.color)).mean(axis=0)[::-1] for o in s.objects)
        relation = s.captions[0].split(f" {s.objects[0].shape} ")[1].split(" a ")[0]
        dx, dy = bx - ax, by - ay
        main = {"to the left of": dx, "to the right of": -dx, "above": dy, "below": -dy}[relation]
        assert main > 0.3 * 160
        assert main >= max(abs(dx), abs(dy))
        assert relation == s.relation
        seen.add(relation)
    assert len(seen) == 4


def test_objects_of_a_pair_do_not_touch():
    for s in pairs(100):
        first, second = (colored(s, o.color) for o in s.objects)
        axis = 0 if s.relation in ("to the left of", "to the right of") else 1
        assert not (first.any(axis=axis) & second.any(axis=axis)).any()


@pytest.mark.parametrize(
    ("shape", "area"),
    [
        ("square", 1),
        ("circle", np.pi / 4),
        ("triangle", 0.5),
        ("cross", 0.5644),
        ("ring", np.pi * (0.25 - 0.27**2)),
    ],
)
def test_shapes_cover_the_right_area(shape, area):
    mask, corner = shape_mask(shape, 70.3, 61.8, 100.0)
    assert corner == (20, 11)
    assert np.asarray(mask).sum() / 255 == pytest.approx(area * 100**2, rel=0.02)


def test_png_keeps_every_pixel():
    pixels = np.random.default_rng(0).integers(0, 256, (31, 17, 3), np.uint8)
    decoded = Image.open(io.BytesIO(encode_png(Image.fromarray(pixels))))
    assert decoded.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(decoded), pixels)
    assert encode_image(scene(3, 4)) == encode_image(scene(3, 4))


# --- scoring


@cache
def resized(s: Scene, size_px: int) -> Image.Image:
    return Image.fromarray(render(s)).resize((size_px, size_px), Image.Resampling.BICUBIC)


def image(s: Scene, size_px: int, blur_px=0.0, noise=0.0) -> np.ndarray:
    pixels = np.asarray(resized(s, size_px).filter(ImageFilter.GaussianBlur(blur_px)), float)
    # Same noise for a scene in every run.
    pixels += np.random.default_rng(int(s.objects[0].extent * 1e9)).normal(0, noise or 1e-9, pixels.shape)
    return pixels.round().clip(0, 255).astype(np.uint8)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size_px", "blur_px", "noise", "least"),
    [
        (64, 0, 0, 0.99),
        pytest.param(*(64, 0, 10, 0.99), marks=pytest.mark.slow),
        pytest.param(*(64, 1.5, 0, 0.99), marks=pytest.mark.slow),
        pytest.param(*(64, 1.5, 10, 0.98), marks=pytest.mark.slow),
        pytest.param(*(32, 0, 0, 0.99), marks=pytest.mark.slow),
        pytest.param(*(32, 1, 10, 0.93), marks=pytest.mark.slow),
        pytest.param(*(16, 0, 0, 0.97), marks=pytest.mark.slow),
        pytest.param(*(16, 0, 10, 0.97), marks=pytest.mark.slow),
        (16, 0.5, 10, 0.95),
    ],
)
def test_score_is_right_on_true_images(size_px, blur_px, noise, least):
    scores = [score_single(image(s, size_px, blur_px, noise), s) for s in singles()]
    assert len(scores) == 200
    assert np.mean([score == Score(True, True, True) for score in scores]) >= least


def test_size_is_read_from_the_pixels():
    readings = [(read_single(image(s, 64)), s.objects[0].size) for s in singles()]
    assert np.mean([reading is not None and reading.size == size for reading, size in readings]) >= 0.99


@pytest.mark.slow
def test_score_of_shuffled_captions_is_near_chance():
    others = np.roll(np.arange(200), 37)
    scores = [score_single(image(s, 64), singles()[i]) for s, i in zip(singles(), others, strict=True)]
    for name, chance in (("color_ok", 1 / 8), ("shape_ok", 1 / 6), ("position_ok", 1 / 5)):
        assert abs(np.mean([getattr(score, name) for score in scores]) - chance) < 0.08
    assert sum(score == Score(True, True, True) for score in scores) < 10


def test_one_wrong_part_fails_that_part_only():
    red = Scene((singles()[0].objects[0],), "white", (), 320, 320)
    o = red.objects[0]
    pixels = image(red, 64)
    for name, values in {"color": COLORS, "shape": SHAPES, "position": POSITIONS}.items():
        for value in values:
            fields = {f: getattr(o, f) for f in o.__slots__} | {name: value}
            score = score_single(pixels, Scene((type(o)(**fields),), "white", (), 320, 320))
            right = value == getattr(o, name)
            assert score == Score(*(right or name != part for part in ("color", "shape", "position")))


def test_images_without_an_object_have_nothing_right():
    s = singles()[0]
    for level in (0, 128, 255):
        flat = np.full((64, 64, 3), level, np.uint8)
        assert read_single(flat) is None
        assert score_single(flat, s) == Score(False, False, False)
    static = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    assert not score_single(static, s).shape_ok


def test_the_scene_score_refuses_images_and_scenes_it_cannot_read():
    with pytest.raises(ValueError, match="one object"):
        score_single(render(pairs()[0], 64), pairs()[0])
    with pytest.raises(ValueError, match="64, 32"):
        read_single(np.zeros((64, 32, 3), np.uint8))
