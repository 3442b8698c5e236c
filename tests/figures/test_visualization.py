"""Maps lie where the model looked, in colours that say sign and size; figures share one scale."""

import gc
import io
import sys
import weakref

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import ConvNextImageProcessorPil, ViTImageProcessorPil
from transformers.dynamic_module_utils import get_imports
from transformers.utils import is_torchvision_available

from hf_shapley.figures import panel_titles
from hf_shapley.figures.attribution_figures import attribution_figure, attribution_grid
from hf_shapley.models import overlay as overlay_module
from hf_shapley.models.overlay import (
    BLUE_WHITE_RED,
    map_colours,
    overlay,
    place_map,
    processor_geometry,
    symmetric_scale,
)

BLUE, LIGHT_BLUE, WHITE, LIGHT_RED, RED = BLUE_WHITE_RED


def pixels(image):
    return np.asarray(image)


# ---- colours


def test_colours_run_from_blue_over_white_to_red():
    """The colours run from blue at minus the scale over white at zero to red at the scale."""
    colours = map_colours([[-2.0, -1.0, 0.0, 1.0, 2.0]], scale=2.0)
    assert [tuple(colour) for colour in colours[0].tolist()] == [BLUE, LIGHT_BLUE, WHITE, LIGHT_RED, RED]


def test_colours_between_two_anchors_are_their_mean():
    colour = map_colours([[0.25]], scale=1.0)[0, 0].tolist()
    np.testing.assert_allclose(colour, (np.array(WHITE) + LIGHT_RED) / 2, atol=0.5)


def test_beyond_the_scale_the_colour_stays_full():
    assert map_colours([[-7.0, 7.0]], scale=1.0).tolist() == [[list(BLUE), list(RED)]]


def test_white_stays_at_zero_for_one_sign():
    """White stays at zero even if all attributions have one sign."""
    colours = map_colours([[-3.0, -1.5, 0.0]])
    assert colours[0].tolist() == [list(BLUE), list(LIGHT_BLUE), list(WHITE)]


def test_a_map_of_zeros_is_white():
    assert (map_colours(torch.zeros(3, 2)) == 255).all()


def test_other_colours_can_be_given():
    black_grey_white = [(0, 0, 0), (128, 128, 128), (255, 255, 255)]
    assert map_colours([[-1.0, 0.0, 1.0]], cmap=black_grey_white)[0, :, 0].tolist() == [0, 128, 255]


@pytest.mark.parametrize("cmap", [[], [WHITE], [BLUE, RED], [BLUE, WHITE, RED, RED]])
def test_a_colour_map_without_a_middle_is_refused(cmap):
    with pytest.raises(ValueError, match="odd number of colours"):
        map_colours([[1.0]], cmap=cmap)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_floats_are_coloured_despite_recorded_gradients(dtype):
    """Any float type is coloured, also while gradients are recorded."""
    attribution_map = torch.tensor([[1.0, -1.0]], dtype=dtype, requires_grad=True)
    assert map_colours(attribution_map).tolist() == [[list(RED), list(BLUE)]]


# ---- scale


def test_the_largest_absolute_attribution_sets_the_scale():
    """The scale is the largest absolute attribution of all maps."""
    assert symmetric_scale(torch.tensor([[[1.0, -5.0]], [[2.0, 3.0]]])) == 5.0


def test_maps_of_different_grids_share_a_scale():
    assert symmetric_scale([torch.ones(2, 3), np.full((7, 7), -4.0)]) == 4.0


def test_the_scale_of_zeros_can_be_divided_by():
    assert symmetric_scale(np.zeros((2, 2))) == 1.0


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan"), float("inf")])
def test_a_scale_that_is_not_positive_is_refused(scale):
    with pytest.raises(ValueError, match="`scale` must be a finite number of logits above 0"):
        map_colours([[1.0]], scale=scale)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_infinity_are_refused(bad):
    with pytest.raises(ValueError, match="got 1 NaN or infinite values of 4"):
        overlay(Image.new("RGB", (4, 4)), [[0.0, 1.0], [bad, 0.0]])


@pytest.mark.parametrize("shape", [(4,), (1, 2, 2)])
def test_maps_that_are_no_grid_are_refused(shape):
    """A map that is not a grid is refused."""
    with pytest.raises(ValueError, match=r"of shape \(h, w\)"):
        overlay(Image.new("RGB", (4, 4)), torch.ones(shape))


def test_an_empty_map_is_refused():
    with pytest.raises(ValueError, match="must not be empty"):
        overlay(Image.new("RGB", (4, 4)), torch.ones(0, 3))


# ---- placing


def test_patches_lie_row_by_row():
    attribution_map = torch.arange(6.0).reshape(2, 3)  # 2 rows, 3 columns
    placed = place_map(attribution_map, (6, 2))
    assert placed.tolist() == [[0, 0, 1, 1, 2, 2], [3, 3, 4, 4, 5, 5]]


def test_every_pixel_takes_the_patch_under_its_centre():
    placed = place_map([[1.0, 2.0, 3.0]], (7, 1))  # a patch is 7 / 3 pixels wide: borders at 2.33 and 4.67
    assert placed.tolist() == [[1, 1, 2, 2, 2, 3, 3]]


def test_unseen_pixels_have_no_attribution():
    """Pixels that the model does not see have no attribution: they are NaN in a placed map."""
    placed = place_map([[1.0, 2.0]], (6, 3), box=(1, 1, 5, 2))
    nan = float("nan")
    expected = torch.full((3, 6), nan, dtype=torch.double)
    expected[1] = torch.tensor([nan, 1, 1, 2, 2, nan])
    torch.testing.assert_close(placed, expected, equal_nan=True)


def test_padding_outside_of_the_picture_is_cut_off():
    assert place_map([[1.0, 2.0, 3.0, 4.0]], (2, 1), box=(-1, 0, 3, 1)).tolist() == [[2, 3]]


def test_a_box_beside_the_picture_leaves_it_unchanged():
    image = Image.new("RGB", (4, 4), (9, 9, 9))
    assert overlay(image, [[1.0]], box=(10, 10, 20, 20)).tobytes() == image.tobytes()


@pytest.mark.parametrize("box", [(0, 0, 0, 4), (3, 0, 1, 4), (0, 4, 4, 0), (0, 0, float("nan"), 4)])
def test_a_box_without_area_is_refused(box):
    with pytest.raises(ValueError, match="left < right and top < bottom"):
        overlay(Image.new("RGB", (4, 4)), [[1.0]], box=box)


# ---- overlays


def test_known_colours_at_known_places():
    blended = overlay(Image.new("RGB", (4, 2)), [[1.0, -1.0], [0.0, 0.5]], alpha=1.0)
    first, second = pixels(blended)
    assert [tuple(p) for p in first] == [RED, RED, BLUE, BLUE]
    assert [tuple(p) for p in second] == [WHITE, WHITE, LIGHT_RED, LIGHT_RED]


def test_alpha_is_the_share_of_the_colours():
    image = Image.new("RGB", (1, 1), (100, 100, 100))
    blended = pixels(overlay(image, [[3.0]], alpha=0.25))[0, 0]
    np.testing.assert_allclose(blended, 0.75 * 100 + 0.25 * np.array(RED), atol=1)


def test_overlays_drop_the_hues_of_the_picture():
    """The hues of the picture cannot be taken for attributions: an overlay shows it in grey."""
    green, red = (Image.new("RGB", (1, 1), colour) for colour in ((0, 130, 0), (255, 0, 0)))
    for image in (green, red):  # of nearly equal luminance: 76
        np.testing.assert_allclose(pixels(overlay(image, [[1.0]], alpha=0.5)), np.add(RED, 76)[None, None] / 2, atol=1)


def test_the_picture_keeps_colours_outside_the_box():
    """The picture keeps its colours outside of the box that the model sees."""
    blended = pixels(overlay(Image.new("RGB", (4, 4), (7, 8, 9)), [[1.0]], alpha=1.0, box=(1, 1, 3, 3)))
    seen = np.zeros((4, 4), bool)
    seen[1:3, 1:3] = True
    assert (blended[seen] == RED).all()
    assert (blended[~seen] == (7, 8, 9)).all()


def test_the_given_picture_is_not_painted_on():
    image = Image.new("RGB", (2, 2))
    overlay(image, [[1.0]], alpha=1.0)
    assert image.tobytes() == bytes(12)


@pytest.mark.parametrize("mode", ["L", "RGBA", "I;16", "P"])
def test_pictures_of_other_modes_get_overlays(mode):
    assert overlay(Image.new(mode, (4, 4)), [[1.0]]).mode == "RGB"


@pytest.mark.parametrize("alpha", [-0.1, 1.1, float("nan")])
def test_an_alpha_beyond_0_and_1_is_refused(alpha):
    """An alpha outside of 0 and 1 is refused."""
    with pytest.raises(ValueError, match="`alpha` must be between 0 and 1"):
        overlay(Image.new("RGB", (4, 4)), [[1.0]], alpha=alpha)


# ---- what the real image processors show

PROCESSORS = {
    "ViT": ViTImageProcessorPil(size={"height": 64, "width": 64}),
    "ViT, not square": ViTImageProcessorPil(size={"height": 32, "width": 96}),
    "ConvNeXt, cropped": ConvNextImageProcessorPil(size={"shortest_edge": 64}),
    "ConvNeXt, warped": ConvNextImageProcessorPil(size={"shortest_edge": 384}),
    "shortest edge": ViTImageProcessorPil(size={"shortest_edge": 64}),
    "resize and crop": ViTImageProcessorPil(
        size={"shortest_edge": 72}, do_center_crop=True, crop_size={"height": 64, "width": 64}
    ),
    "crop only": ViTImageProcessorPil(do_resize=False, do_center_crop=True, crop_size={"height": 50, "width": 61}),
    "crop that pads": ViTImageProcessorPil(
        size={"shortest_edge": 48}, do_center_crop=True, crop_size={"height": 64, "width": 75}
    ),
    "neither": ViTImageProcessorPil(do_resize=False),
}
if is_torchvision_available():
    # What AutoImageProcessor gives then. Their geometry is the same, which is for the tests to say.
    from transformers import ConvNextImageProcessor, ViTImageProcessor

    TWINS = {ViTImageProcessorPil: ViTImageProcessor, ConvNextImageProcessorPil: ConvNextImageProcessor}
    PROCESSORS |= {
        f"{name}, torchvision": TWINS[type(processor)](**processor.to_dict()) for name, processor in PROCESSORS.items()
    }


@pytest.mark.parametrize("processor", PROCESSORS.values(), ids=PROCESSORS)
@pytest.mark.parametrize("size", [(100, 100), (160, 90), (90, 161), (301, 200)])
def test_the_box_is_what_the_real_processor_shows(processor, size):
    """Encode each pixel's own position in its colour: the processor's output then says where it came from."""
    width, height = size
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    position = np.stack([x / width * 255, y / height * 255, np.full_like(x, 255)], axis=-1).round().astype(np.uint8)
    seen = np.asarray(processor(Image.fromarray(position), return_tensors="pt", do_normalize=False)["pixel_values"][0])
    inside = seen[2] > 0.99  # (H, W): not padding
    left, top, right, bottom = processor_geometry(processor, size)
    rows, columns = inside.shape
    expected_x = left + (np.arange(columns) + 0.5) / columns * (right - left)
    expected_y = top + (np.arange(rows) + 0.5) / rows * (bottom - top)
    margin = slice(3, -3)  # interpolation bends the ramp at its very ends
    found_x = np.where(inside, seen[0], np.nan)[rows // 2] * width + 0.5
    found_y = np.where(inside, seen[1], np.nan)[:, columns // 2] * height + 0.5
    for found, expected, length in ((found_x, expected_x, width), (found_y, expected_y, height)):
        valid = ~np.isnan(found)
        # A 256-level ramp over `length` pixels and a resize are exact to about 1 % of the picture.
        np.testing.assert_allclose(found[valid][margin], expected[valid][margin], atol=0.5 + length / 200)


@pytest.mark.parametrize(
    "name", [name for name in PROCESSORS if name.startswith(("ViT", "ConvNeXt, cropped", "resize and crop"))]
)
def test_marked_patches_are_found_on_the_original(name):
    """Mark a spot, let the real processor look at it, attribute the patch that lit up: the overlay must cover it."""
    image = Image.new("RGB", (200, 120))
    image.paste((255, 255, 255), (110, 60, 118, 68))
    pixel_values = PROCESSORS[name](image, return_tensors="pt", do_normalize=False)["pixel_values"]
    lit = torch.nn.functional.avg_pool2d(pixel_values.mean(1), 16)[0]  # (4, 4)
    attribution_map = (lit == lit.max()).double()
    placed = place_map(attribution_map, image.size, box=processor_geometry(PROCESSORS[name], image.size))
    assert attribution_map.sum() == 1
    assert placed[64, 114] == 1


def test_convnext_at_224_sees_the_centre_seven_eighths():
    processor = ConvNextImageProcessorPil(size={"shortest_edge": 224})  # resize to 256, crop 224
    assert processor_geometry(processor, (512, 256)) == (144, 16, 368, 240)


def test_a_processor_size_without_a_rule_is_refused():
    processor = ViTImageProcessorPil(size={"shortest_edge": 64, "longest_edge": 90})
    with pytest.raises(ValueError, match="use height and width"):
        processor_geometry(processor, (100, 100))
    processor.size = {"max_height": 10, "max_width": 10}
    with pytest.raises(ValueError, match="height and width, or shortest_edge"):
        processor_geometry(processor, (100, 100))


@pytest.mark.parametrize("size", [(0, 5), (5, -1)])
def test_a_picture_without_pixels_has_no_geometry(size):
    with pytest.raises(ValueError, match="at least one pixel"):
        processor_geometry(PROCESSORS["ViT"], size)


# ---- figures


@pytest.fixture
def draws():
    return torch.randn(3, 2, 4, 5, generator=torch.Generator().manual_seed(0), dtype=torch.double)


def titles_of(figure):
    return [axes.get_title() for axes in figure.axes if axes.get_title()]


def test_figures_show_every_label_and_the_unit(draws):
    """A figure has a panel per label, with the sum of its attributions, and says the unit."""
    figure = attribution_figure(Image.new("RGB", (50, 40)), draws[0], ["cat", "dog"], title="cat.png")
    sums = draws[0].sum((1, 2))
    assert titles_of(figure) == ["cat.png", f"cat\nsum {sums[0]:+.2f}", f"dog\nsum {sums[1]:+.2f}"]
    assert "logits" in figure.axes[-1].get_ylabel()


def test_a_figure_shows_the_overlays_on_one_scale(draws):
    image = Image.new("RGB", (50, 40), (90, 90, 90))
    figure = attribution_figure(image, draws[0], ["cat", "dog"])
    scale = draws[0].abs().max().item()
    for axes, attribution_map in zip(figure.axes[1:3], draws[0], strict=True):
        np.testing.assert_array_equal(axes.images[0].get_array(), pixels(overlay(image, attribution_map, scale=scale)))
    np.testing.assert_allclose(figure.axes[-1].get_ylim(), (-scale, scale))


def test_grids_hold_pictures_with_labels_in_order(draws):
    """A grid holds every picture with its labels in order."""
    images = [Image.new("RGB", (50, 40), (shade, 0, 0)) for shade in (10, 20, 30)]
    figure = attribution_grid(images, draws, [["a", "b"], ["c", "d"], ["e", "f"]], titles=["x", "y", "z"])
    assert [title.split("\n")[0] for title in titles_of(figure)] == ["x", "a", "b", "y", "c", "d", "z", "e", "f"]
    shown = [axes for axes in figure.axes if axes.images]
    assert [pixels(shown[i].images[0].get_array())[0, 0, 0] for i in (0, 3, 6)] == [10, 20, 30]
    # Two blocks of three panels in the first row, one in the second.
    assert [axes.get_subplotspec().rowspan.start for axes in shown] == [0] * 6 + [1] * 3


def test_large_photographs_are_shrunk_together_with_their_box(draws):
    image = Image.new("RGB", (2048, 1024))
    figure = attribution_figure(image, draws[0], ["a", "b"], box=(1024, 0, 2048, 1024), alpha=1.0, scale=1e-9)
    shown = pixels(figure.axes[1].images[0].get_array())
    assert shown.shape == (256, 512, 3)
    assert (shown[:, :256] == 0).all()
    assert (shown[:, 256:].max(-1) > 0).all()


def test_a_figure_can_be_saved(tmp_path, draws):
    figure = attribution_figure(Image.new("RGB", (50, 40)), draws[0], ["cat", "a $ label \\frac{"])
    figure.savefig(tmp_path / "figure.png")
    with Image.open(tmp_path / "figure.png") as saved:
        assert saved.size[0] > saved.size[1] > 100


def test_figures_are_freed_when_nobody_holds_them(draws):
    figures = [weakref.ref(attribution_figure(Image.new("RGB", (8, 8)), draws[0], ["a", "b"])) for _ in range(3)]
    gc.collect()
    assert [figure() for figure in figures] == [None] * 3


def test_figures_refuse_maps_without_label_dimension(draws):
    """A figure refuses maps of one label without its dimension."""
    with pytest.raises(ValueError, match=r"of shape \(labels, h, w\), got \(4, 5\)"):
        attribution_figure(Image.new("RGB", (8, 8)), draws[0, 0], ["a"])


@pytest.mark.parametrize("labels", [["a"], ["a", "b", "c"]])
def test_a_figure_refuses_a_wrong_number_of_labels(draws, labels):
    with pytest.raises(ValueError, match="must name the 2 maps"):
        attribution_figure(Image.new("RGB", (8, 8)), draws[0], labels)


@pytest.mark.parametrize("name", ["images", "labels", "titles", "boxes"])
def test_a_grid_refuses_lists_of_the_wrong_length(draws, name):
    given = {"images": [Image.new("RGB", (8, 8))] * 3, "labels": [["a", "b"]] * 3, "titles": ["t"] * 3}
    given = {**given, "boxes": [None] * 3, name: []}
    with pytest.raises(ValueError, match=rf"`{name}` must have one entry per image of `maps` \(3\), got 0"):
        attribution_grid(given.pop("images"), draws, given.pop("labels"), **given)


def test_a_grid_refuses_maps_of_the_wrong_shape(draws):
    with pytest.raises(ValueError, match=r"of shape \(images, labels, h, w\)"):
        attribution_grid([Image.new("RGB", (8, 8))], draws[0], [["a", "b"]])


def test_a_grid_refuses_rows_without_blocks(draws):
    with pytest.raises(ValueError, match="`blocks_per_row` must be at least 1"):
        attribution_grid([Image.new("RGB", (8, 8))] * 3, draws, [["a", "b"]] * 3, blocks_per_row=0)


def test_without_matplotlib_the_message_names_the_extra(monkeypatch, draws):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for name in ("cm", "colors", "figure"):
        monkeypatch.setitem(sys.modules, f"matplotlib.{name}", None)
    with pytest.raises(ImportError, match=r"pip install hf_shapley\[plot\]"):
        attribution_figure(Image.new("RGB", (8, 8)), draws[0], ["a", "b"])
    assert overlay(Image.new("RGB", (8, 8)), draws[0, 0]).size == (8, 8)


def test_the_hub_does_not_ask_for_matplotlib():
    assert "matplotlib" not in get_imports(overlay_module.__file__)


# ---- titles


@pytest.mark.parametrize("size", [(60, 40), (20, 60)])
@pytest.mark.parametrize("columns", [1, 9])
def test_long_names_do_not_overlap(size, columns):
    """Titles of neighbours, of the figure's edge and of the colour bar have room between them."""
    names = [("W" * 100, "great white shark, man-eater, Carcharodon carcharias")[i % 2] for i in range(columns)]
    figure = attribution_figure(Image.new("RGB", size), np.ones((columns, 2, 3)), names, title="file name " * 9)
    figure.savefig(io.BytesIO(), format="png")
    boxes = [panel.title.get_window_extent() for panel in figure.axes[:-1]]
    starts = [*(box.x0 for box in boxes[1:]), figure.axes[-1].get_tightbbox().x0]
    assert boxes[0].x0 >= 0
    assert all(box.x1 < start for box, start in zip(boxes, starts, strict=True))


def test_a_long_name_keeps_its_start_and_end():
    name = "great white shark, white shark, man-eater, man-eating shark, Carcharodon, Carcharodon carcharias (97.1%)"
    figure = attribution_figure(Image.new("RGB", (60, 40)), np.ones((1, 2, 3)), [name])
    (title,) = titles_of(figure)
    first, second, third, total = title.split("\n")
    assert name.startswith(f"{first} {second}")
    assert third[0] == "\N{HORIZONTAL ELLIPSIS}" and name.endswith(third[1:]) and third.endswith("carcharias (97.1%)")
    assert total == "sum +6.00"


def test_letters_without_a_font_become_escapes(monkeypatch):
    """In place of boxes, which are all alike; matplotlib's warning about them would fail this test."""
    monkeypatch.setattr(panel_titles, "_installed_families", lambda: ["DejaVu Sans"])
    figure = attribution_figure(Image.new("RGB", (60, 40)), np.ones((1, 2, 3)), ["cat \U000f0000\U00030000\u3000dog"])
    for format in ("png", "svg", "pdf"):
        figure.savefig(io.BytesIO(), format=format)
    assert titles_of(figure) == ["cat \N{REPLACEMENT CHARACTER}\\U00030000 dog\nsum +6.00"]


def test_letters_are_drawn_in_an_installed_font(tmp_path):
    """A font made for this test has a letter that hardly any other font has."""
    font_manager = pytest.importorskip("matplotlib.font_manager")
    builder = pytest.importorskip("fontTools.fontBuilder").FontBuilder(1000)
    glyphs = [".notdef", "letter"]
    builder.setupGlyphOrder(glyphs)
    builder.setupCharacterMap({0x30000: "letter"})
    pen = pytest.importorskip("fontTools.pens.ttGlyphPen").TTGlyphPen(None)
    pen.moveTo((0, 0))
    pen.lineTo((0, 700))
    pen.lineTo((500, 0))
    pen.closePath()
    builder.setupGlyf(dict.fromkeys(glyphs, pen.glyph()))
    builder.setupHorizontalMetrics(dict.fromkeys(glyphs, (600, 0)))
    builder.setupHorizontalHeader(ascent=800, descent=-200)
    builder.setupNameTable({"familyName": "A One Letter", "styleName": "Regular"})
    builder.setupOS2(usWeightClass=400)
    builder.setupPost()
    builder.save(tmp_path / "font.ttf")
    installed = font_manager.fontManager.ttflist
    before = list(installed)
    try:
        font_manager.fontManager.addfont(tmp_path / "font.ttf")
        figure = attribution_figure(Image.new("RGB", (60, 40)), np.ones((1, 2, 3)), ["\U00030000"])
        figure.savefig(io.BytesIO(), format="png")
    finally:
        installed[:] = before
    assert titles_of(figure) == ["\U00030000\nsum +6.00"]
    assert figure.axes[1].title.get_fontfamily()[-1] == "A One Letter"
