"""Any classifier of transformers that takes pixels: its own logits, a painted game, exact sums."""

import json
import os
import subprocess
import sys
from inspect import signature
from pathlib import Path
from threading import Thread

import pytest
import torch
import transformers
from datasets import ClassLabel, Dataset, DatasetDict, Features
from datasets import Image as ImageFeature
from PIL import Image
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    AutoModelForImageClassification,
    BertConfig,
    TimmWrapperConfig,
    ViTImageProcessorPil,
    pipeline,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES as NAMES
from transformers.utils import is_torchvision_available

from hf_shapley import (
    AutoShapleyForImageClassification,
    ShapleyForImageClassification,
    ShapleyViTForImageClassification,
    coalitions_to_ids,
    export_program,
    sample_coalitions,
)
from hf_shapley.jobs import training_job

LABELS = 5
VIT = dict(
    hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=16, patch_size=4
)
SWIN = dict(image_size=32, patch_size=4, embed_dim=8, depths=[1, 1], num_heads=[1, 2], window_size=2)
TOWER = dict(VIT, projection_dim=8)
PYRAMID = dict(image_size=64, hidden_sizes=[4, 8, 8, 16], depths=[1, 1, 1, 1], num_attention_heads=[1, 1, 1, 2])
CELLS = dict(hidden_sizes=[8, 16], depths=[1, 1], num_stages=2)
# The stock configuration of a small model, and the size of its images in pixels, height and width.
SMALL = {
    "BeitForImageClassification": (VIT, (16, 16)),
    "BitForImageClassification": (
        dict(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], num_groups=2), (32, 48)
    ),
    "CLIPForImageClassification": (dict(vision_config=TOWER), (16, 16)),
    "ConvNextForImageClassification": (CELLS, (32, 48)),
    "ConvNextV2ForImageClassification": (CELLS, (32, 48)),
    "CvtForImageClassification": (
        dict(embed_dim=[8, 16], depth=[1, 2], num_heads=[1, 2], patch_sizes=[7, 3], patch_stride=[4, 2],
             patch_padding=[2, 1], mlp_ratio=[2.0, 2.0], attention_drop_rate=[0.0, 0.0], drop_rate=[0.0, 0.0],
             drop_path_rate=[0.0, 0.0], qkv_bias=[True, True], cls_token=[False, True],
             qkv_projection_method=["dw_bn", "dw_bn"], kernel_qkv=[3, 3], padding_kv=[1, 1], stride_kv=[2, 2],
             padding_q=[1, 1], stride_q=[1, 1]), (32, 48),
    ),
    "Data2VecVisionForImageClassification": (VIT, (16, 16)),
    "DeiTForImageClassification": (VIT, (16, 16)),
    "DeiTForImageClassificationWithTeacher": (VIT, (16, 16)),
    "Dinov2ForImageClassification": (dict(VIT, mlp_ratio=2), (16, 24)),
    "Dinov2WithRegistersForImageClassification": (dict(VIT, mlp_ratio=2, num_register_tokens=4), (8, 8)),
    "DonutSwinForImageClassification": (SWIN, (32, 32)),
    "EfficientNetForImageClassification": (
        dict(image_size=64, width_coefficient=0.1, depth_coefficient=0.1, hidden_dim=128, dropout_rate=0.0,
             drop_connect_rate=0.0), (64, 64),
    ),
    "FocalNetForImageClassification": (
        dict(image_size=32, patch_size=4, embed_dim=8, hidden_sizes=[8, 16], depths=[1, 1], focal_levels=[1, 1],
             focal_windows=[3, 3]), (32, 32),
    ),
    "HGNetV2ForImageClassification": (
        dict(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], stem_channels=[3, 4, 8],
             stage_in_channels=[8, 8], stage_mid_channels=[4, 4], stage_out_channels=[8, 16], stage_num_blocks=[1, 1],
             stage_downsample=[False, True], stage_light_block=[False, False], stage_kernel_size=[3, 3],
             stage_numb_of_layers=[1, 1]), (32, 48),
    ),
    "HieraForImageClassification": (
        dict(embed_dim=8, image_size=[32, 32], depths=[1, 1], num_heads=[1, 2], query_stride=[2, 2],
             masked_unit_size=[2, 2], patch_size=[3, 3], patch_stride=[4, 4], patch_padding=[1, 1],
             masked_unit_attention=[True, False], num_query_pool=1, mlp_ratio=2.0), (32, 32),
    ),
    "IJepaForImageClassification": (VIT, (16, 16)),
    "LevitForImageClassification": (
        dict(image_size=64, hidden_sizes=[16, 16, 16], num_attention_heads=[1, 2, 2], depths=[1, 1, 1],
             key_dim=[4, 4, 4]), (64, 64),
    ),
    "MetaClip2ForImageClassification": (dict(vision_config=TOWER), (16, 16)),
    "MobileNetV1ForImageClassification": (dict(image_size=64, depth_multiplier=0.25, min_depth=8), (64, 96)),
    "MobileNetV2ForImageClassification": (dict(image_size=64, depth_multiplier=0.25), (64, 96)),
    "MobileViTForImageClassification": (
        dict(image_size=64, hidden_sizes=[8, 8, 8], neck_hidden_sizes=[4, 4, 8, 8, 8, 8, 16], num_attention_heads=2),
        (64, 64),
    ),
    "MobileViTV2ForImageClassification": (
        dict(image_size=64, width_multiplier=0.125, n_attn_blocks=[1, 1, 1], base_attn_unit_dims=[64, 64, 64]),
        (64, 64),
    ),
    "PPLCNetForImageClassification": (dict(scale=0.25, class_expand=16), (64, 96)),
    "PoolFormerForImageClassification": (
        dict(hidden_sizes=[4, 8, 8, 16], depths=[1, 1, 1, 1], mlp_ratio=2.0), (64, 96)
    ),
    "PvtForImageClassification": (PYRAMID, (64, 64)),
    "PvtV2ForImageClassification": (PYRAMID, (64, 64)),
    "RegNetForImageClassification": (
        dict(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], groups_width=4), (32, 48)
    ),
    "ResNetForImageClassification": (dict(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1]), (32, 48)),
    "SegformerForImageClassification": (PYRAMID, (64, 64)),
    "SiglipForImageClassification": (dict(vision_config=VIT), (16, 16)),
    "SwiftFormerForImageClassification": (
        dict(image_size=64, depths=[1, 1, 1, 1], embed_dims=[8, 8, 8, 16], mlp_ratio=2), (64, 64)
    ),
    "SwinForImageClassification": (SWIN, (32, 48)),
    "Swinv2ForImageClassification": (dict(SWIN, window_size=4), (32, 32)),
    "TextNetForImageClassification": (
        dict(image_size=[64, 64], stem_out_channels=8, hidden_sizes=[8, 8, 8, 8, 16],
             conv_layer_kernel_sizes=[[[3, 3]], [[3, 3]], [[3, 3]], [[3, 3]]],
             conv_layer_strides=[[1], [2], [2], [2]]), (64, 64),
    ),
    "ViTForImageClassification": (VIT, (16, 24)),
    "ViTMSNForImageClassification": (VIT, (16, 24)),
}  # fmt: skip
SMALL["LevitForImageClassificationWithTeacher"] = SMALL["LevitForImageClassification"]
PERCEIVER = dict(
    num_latents=16, d_latents=16, num_blocks=1, num_self_attends_per_block=1, num_self_attention_heads=1,
    num_cross_attention_heads=1, image_size=16,
)  # fmt: skip
TEXT = dict(
    hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, head_dim=8,
    intermediate_size=16, vocab_size=64,
)  # fmt: skip
# The reason, and what a small model is made of; None: this machine lacks what it needs.
CANNOT = {
    "DinatForImageClassification": ("needs natten", None),
    "ImageGPTForImageClassification": ("takes ids of colours", dict(n_embd=16, n_layer=1, n_head=2)),
    "PerceiverForImageClassificationLearned": ("its last features are latents", PERCEIVER),
    "PerceiverForImageClassificationFourier": ("its last features are latents", PERCEIVER),
    "PerceiverForImageClassificationConvProcessing": ("its last features are latents", PERCEIVER),
    "ShieldGemma2ForImageClassification": ("asks a language model", dict(vision_config=VIT, text_config=TEXT)),
    "Siglip2ForImageClassification": ("takes patches of any number", dict(vision_config=VIT)),
    "TimmWrapperForImageClassification": ("needs timm, which needs torchvision", None),
}
CLASSES = {name: kind for kind, names in NAMES.items() for name in ([names] if isinstance(names, str) else names)}


def plain_model(name):
    """A small stock model in evaluation mode, with weights and statistics that let every part matter."""
    options, size = SMALL[name]
    torch.manual_seed(0)
    model = getattr(transformers, name)(CONFIG_MAPPING[CLASSES[name]](**options, num_labels=LABELS))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d | nn.BatchNorm1d):
                module.momentum = None  # statistics of all images so far
        model.train()(draw_images(size, 4), **telling(model))
    return model.eval(), size


def telling(model):
    """What a stock forward is told of images that are not of its configuration's size."""
    return (
        {"interpolate_pos_encoding": True} if "interpolate_pos_encoding" in signature(model.forward).parameters else {}
    )


def draw_images(size, batch=2):
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(1))


def draw_coalitions(model, batch=2, structures=1):
    players = model.grid[0] * model.grid[1]
    return sample_coalitions(batch, structures, num_players=players, generator=torch.Generator().manual_seed(2))


def test_every_registered_classifier_is_here():
    """One that is new to transformers is to be tried, or listed with the reason why it cannot be explained."""
    assert set(SMALL) | set(CANNOT) >= set(CLASSES)


@pytest.mark.parametrize("name", SMALL)
def test_any_classifier_explains_itself(name, tmp_path):
    """From its plain checkpoint: its own logits, exact sums, no leak, a step of training, the same when reloaded."""
    if name not in CLASSES:
        pytest.skip("this transformers does not have it")
    plain, size = plain_model(name)
    plain.save_pretrained(tmp_path / "plain")
    model = ShapleyForImageClassification.from_pretrained(tmp_path / "plain", image_size=size).eval()
    nn.init.normal_(model.attribution_head.correction.weight)
    images = draw_images(size)

    with torch.no_grad():
        output = model(images)
        assert torch.equal(output.logits, plain(images, **model._stock_options)[0])
    assert output.attributions.shape == (2, model.grid[0] * model.grid[1], LABELS)
    torch.testing.assert_close(output.attributions.sum(1), output.logits - output.base_values, atol=1e-5, rtol=1e-5)

    coalitions = draw_coalitions(model)[:, 0]
    values = model.coalition_values(images, coalitions.unsqueeze(1))
    shown = coalitions.view(-1, 1, *model.grid)
    step = size[0] // model.grid[0], size[1] // model.grid[1]
    shown = shown.repeat_interleave(step[0], 2).repeat_interleave(step[1], 3)
    changed = model.coalition_values(torch.where(shown, images, 7.0), coalitions.unsqueeze(1))
    assert torch.equal(values, changed)
    changed = model.coalition_values(torch.where(shown, 7.0, images), coalitions.unsqueeze(1))
    assert not torch.equal(values, changed)
    with torch.no_grad():
        painted = plain(torch.where(shown, images, 0.0), **model._stock_options)[0]
    torch.testing.assert_close(values[:, 0], painted, atol=1e-5, rtol=1e-4)

    model.save_pretrained(tmp_path / "ours")
    again = AutoModelForImageClassification.from_pretrained(tmp_path / "ours").eval()
    with torch.no_grad():
        assert torch.equal(again(images).attributions, output.attributions)

    ids = coalitions_to_ids(coalitions.unsqueeze(1))
    model.train()
    played = model(images, coalition_ids=ids, labels=torch.tensor([0, 1]), sums_only=True, num_with_gradient=1)
    (played.loss + played.readout_errors.square().mean() + played.coalition_gains.square().mean()).backward()
    assert model.attribution_head.correction.weight.grad.abs().max() > 0
    assert any(weight.grad is not None and weight.grad.abs().max() > 0 for weight in model.stock.parameters())


@pytest.mark.parametrize("name", CANNOT)
def test_what_cannot_be_explained_says_why(name):
    """One clear error, before any weight is there."""
    reason, options = CANNOT[name]
    if options is None or name not in CLASSES:
        pytest.skip(f"{name} {reason}")
    config = CONFIG_MAPPING[CLASSES[name]](**options, architectures=[name])
    with pytest.raises(ValueError, match=f"`{name}` cannot be explained"):
        ShapleyForImageClassification(config)


@pytest.fixture
def resnet(tmp_path):
    """A small ResNet's plain checkpoint, with names of labels and an image processor."""
    plain, (height, width) = plain_model("ResNetForImageClassification")
    plain.config.id2label = dict(enumerate("abcde"))
    plain.config.label2id = {name: label for label, name in plain.config.id2label.items()}
    plain.save_pretrained(tmp_path / "resnet")
    ViTImageProcessorPil(size={"height": height, "width": width}).save_pretrained(tmp_path / "resnet")
    return str(tmp_path / "resnet")


def painted(folder, **options):
    """Our model of the small ResNet, its head as if it had learned."""
    model = AutoShapleyForImageClassification.from_pretrained(folder, **{"image_size": (32, 48), **options}).eval()
    nn.init.normal_(model.attribution_head.correction.weight, generator=torch.Generator().manual_seed(0))
    return model


def test_auto_prefers_the_native_class(resnet, tmp_path):
    """Where patches can be dropped they are; an architecture without such a class is painted; both say which."""
    plain_model("ViTForImageClassification")[0].save_pretrained(tmp_path / "vit")
    native = AutoShapleyForImageClassification.from_pretrained(tmp_path / "vit")
    assert type(native) is ShapleyViTForImageClassification and native.game_name.endswith("absent patches dropped")
    model = painted(resnet)
    assert type(model) is ShapleyForImageClassification
    assert model.game_name == "the classifier's own, absent patches painted"
    BertConfig().save_pretrained(tmp_path / "bert")
    with pytest.raises(ValueError, match="image classifier that transformers has"):
        AutoShapleyForImageClassification.from_pretrained(tmp_path / "bert")


def test_players_can_be_larger_but_not_smaller(resnet):
    """The features' cells are 8 x 8 pixels."""
    assert painted(resnet).grid == (4, 6)
    model = painted(resnet, player_size=16)
    output = model(draw_images((32, 48)))
    assert model.grid == (2, 3) and output.attributions.shape == (2, 6, LABELS)
    torch.testing.assert_close(output.attributions.sum(1), output.logits - output.base_values, atol=1e-5, rtol=1e-5)
    assert painted(resnet, player_size=(32, 8)).grid == (1, 6)
    with pytest.raises(ValueError, match="at least the cells of the features"):
        painted(resnet, player_size=4)
    with pytest.raises(ValueError, match="multiples of the player size"):
        painted(resnet, player_size=20)


def test_cells_that_do_not_tile_make_way(resnet):
    """Features of 5 x 7 cells on 36 x 50 pixels: the finest grid that tiles the image has 4 x 5."""
    model = painted(resnet, image_size=(36, 50))
    assert model.places.features.grid == (5, 7) and model.grid == (4, 5)
    assert model.explain(draw_images((36, 50)), upsample=True).shape == (2, LABELS, 36, 50)


def test_images_of_another_size_are_refused(resnet):
    """Base values are those of one size, so that a model has one; the error says how to choose another."""
    with pytest.raises(ValueError, match=r"must be of \(32, 48\) pixels .* got \(64, 64\): .*`image_size`"):
        painted(resnet)(draw_images((64, 64)))


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("vote_readout", "patches"),
        ("coalition_adapter_size", 8),
        ("influence_own_layers", 1),
        ("influence_block", "backbone"),
    ],
)
def test_what_needs_a_look_inside_is_refused(option, value, resnet):
    """Layers of a stock model can be neither copied nor followed by adapters, nor read patch by patch."""
    with pytest.raises(ValueError, match=f"`{option}` must be"):
        painted(resnet, **{option: value})


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ({"size": {"height": 32, "width": 48}}, (32, 48)),
        ({"size": {"shortest_edge": 64}, "crop_size": {"height": 32, "width": 32}}, (32, 32)),
        ({"size": {"shortest_edge": 64}}, (64, 64)),
        ({"size": 64}, (64, 64)),
        ({}, (224, 224)),
    ],
)
def test_images_are_as_large_as_the_processors(sizes, expected, resnet):
    """A convolutional network takes any size, so that its configuration says none."""
    Path(resnet, "preprocessor_config.json").write_text(json.dumps({"image_processor_type": "Any", **sizes}))
    assert AutoShapleyForImageClassification.from_pretrained(resnet).config.size == expected


def test_the_paint_is_an_option(resnet):
    """Base values are the stock model's answer to an image of that colour."""
    model = painted(resnet, paint=0.5)
    with torch.no_grad():
        expected = model.stock(torch.full((1, 3, 32, 48), 0.5)).logits[0]
    assert torch.equal(model.base_values, expected)
    torch.testing.assert_close(model(draw_images((32, 48))).base_values, expected)


def test_structures_play_the_game_of_coalitions(resnet):
    """What no player, all players, and three coalitions of one structure are worth, whichever way it is asked."""
    model, images = painted(resnet, player_size=16), draw_images((32, 48))
    every = torch.stack([torch.zeros(6), torch.ones(6)]).bool().expand(2, 2, 6)
    values = model.coalition_values(images, every)
    assert torch.equal(values[:, 0], model.base_values.expand(2, -1))
    torch.testing.assert_close(values[:, 1], model(images).logits, atol=1e-5, rtol=1e-5)
    ids = torch.tensor([0, 0, 1, 1, 2, 2]).expand(2, 1, 6)
    gains = model(images, coalition_ids=ids, sums_only=True).coalition_gains[:, 0]
    alone = model.coalition_values(images, torch.stack([ids[0, 0] == place for place in range(3)]).expand(2, 3, 6))
    torch.testing.assert_close(gains, alone - model.base_values, atol=1e-5, rtol=1e-5)


def test_a_step_runs_what_it_must(resnet):
    """One forward of the images, one of the paint, and the coalitions' with gradient for the first image alone."""
    model = painted(resnet).train()
    ids = coalitions_to_ids(draw_coalitions(model, structures=2))
    seen = []
    model.stock.register_forward_hook(lambda _, inputs, output: seen.append((len(inputs[0]), output[0].requires_grad)))
    output = model(draw_images((32, 48)), coalition_ids=ids, sums_only=True, num_with_gradient=1)
    assert sorted(seen) == [(1, True), (2, True), (4, False), (4, True)]
    output.coalition_gains.sum().backward()


def test_training_leaves_the_statistics_alone(resnet):
    """Batch normalisation would else let painted images change what the classifier says of whole ones."""
    model, images = painted(resnet), draw_images((32, 48))
    with torch.no_grad():
        expected = model(images).logits
        assert torch.equal(model.train()(images).logits, expected)
        assert torch.equal(model.eval()(images).logits, expected)


def test_threads_do_not_hear_each_other(resnet):
    """Another thread explains other images while one is inside of the stock model."""
    model, (first, second) = painted(resnet), draw_images((32, 48)).split(1)
    expected, waiting = [model.explain(images) for images in (first, second)], [True]

    def interrupt(*_):
        if waiting:
            waiting.clear()
            thread = Thread(target=lambda: heard.append(model.explain(second)))
            thread.start()
            thread.join()

    heard = []
    model.stock.resnet.encoder.stages[1].register_forward_pre_hook(interrupt)
    torch.testing.assert_close([model.explain(first), *heard], expected)


def test_half_precision_leaks_nothing(resnet):
    """Changed pixels of absent players change no bit in bfloat16 either, and sums stay exact."""
    model, images = painted(resnet, dtype=torch.bfloat16), draw_images((32, 48))
    coalitions = draw_coalitions(model)
    shown = coalitions.view(2, 1, 4, 6).repeat_interleave(8, 2).repeat_interleave(8, 3)
    hidden = torch.where(shown, images, 7.0)
    assert model.dtype == torch.bfloat16 and torch.equal(
        *map(model.coalition_values, (images, hidden), 2 * [coalitions])
    )
    output = model(images)
    torch.testing.assert_close(output.attributions.sum(1), output.logits - output.base_values, atol=1e-5, rtol=1e-5)


def test_a_program_takes_any_batch_size(resnet):
    """An exported program holds the stock model, what is listened to in it, and the painted image."""
    model, images = painted(resnet), draw_images((32, 48), 5)
    logits, maps = export_program(model).module()(images)
    torch.testing.assert_close(logits, model(images).logits)
    torch.testing.assert_close(maps, model.explain(images))


def test_the_command_line_trains_any_checkpoint(resnet, tmp_path):
    """With a new classifier for other labels; what it writes explains itself in the pipeline, the card says how."""
    pictures = [Image.new("RGB", (48, 32), (40 * shade, 99, 200)) for shade in range(6)]
    rows = Dataset.from_dict({"image": pictures, "label": [0, 1] * 3})
    rows = rows.cast(Features({"image": ImageFeature(), "label": ClassLabel(names=["cat", "dog"])}))
    DatasetDict(train=rows, test=rows).save_to_disk(tmp_path / "rows")
    out = tmp_path / "out"
    arguments = ["--model", resnet, "--dataset", str(tmp_path / "rows"), "--output_dir", str(out)]
    arguments += ["--ignore_mismatched_sizes", "--do_train", "--max_steps", "2", "--per_device_train_batch_size", "2"]
    training_job.main([*arguments, "--use_cpu", "--report_to", "none", "--disable_tqdm", "true"])
    (entry,) = pipeline("shapley-image-classification", model=str(out), device="cpu")(pictures[0], top_k=1)
    assert entry["label"] in ("cat", "dog") and entry["attributions"].shape == (4, 6)
    card = (out / "README.md").read_text()
    assert "absent patches painted" in card


ALONE = """
import sys
sys.modules["hf_shapley"] = None
import torch
from PIL import Image
from transformers import AutoModelForImageClassification, pipeline
folder = sys.argv[1]
model = AutoModelForImageClassification.from_pretrained(folder, trust_remote_code=True).eval()
images = torch.linspace(-1, 1, 3 * 32 * 48).view(1, 3, 32, 48)
print(model(images).logits[0].tolist(), model.explain(images).sum().item())
explain = pipeline("shapley-image-classification", model=folder, trust_remote_code=True, device="cpu")
print(explain(Image.new("RGB", (48, 32), (40, 99, 200)), top_k=1)[0]["attributions"].shape)
model.save_pretrained(folder + " again")
"""


def test_a_copy_runs_without_the_library(resnet, tmp_path):
    """The files beside the weights are all that a user needs who trusts them; saved again, they still are."""
    model, folder = painted(resnet), tmp_path / "ours"
    model.save_pretrained(folder)
    ViTImageProcessorPil.from_pretrained(resnet).save_pretrained(folder)
    images = torch.linspace(-1, 1, 3 * 32 * 48).view(1, 3, 32, 48)
    with torch.no_grad():
        expected = model(images).logits[0].tolist()
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", ALONE, str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [f"{expected} {model.explain(images).sum().item()}", "(4, 6)"]
    assert (tmp_path / "ours again" / "stock_places.py").exists()


def test_timm_models_are_painted(tmp_path):
    """timm's models come through transformers' wrapper, whose configuration is timm's own."""
    pytest.importorskip("timm")
    if not is_torchvision_available():
        pytest.skip("timm needs torchvision")
    config = TimmWrapperConfig(architecture="resnet18", num_labels=LABELS, pretrained_cfg={"input_size": [3, 64, 64]})
    plain = transformers.TimmWrapperForImageClassification(config).eval()
    plain.save_pretrained(tmp_path / "plain")
    model = AutoShapleyForImageClassification.from_pretrained(tmp_path / "plain").eval()
    images = draw_images((64, 64))
    with torch.no_grad():
        assert model.grid == (2, 2) and torch.equal(model(images).logits, plain(images).logits)
    model.save_pretrained(tmp_path / "ours")
    again = AutoShapleyForImageClassification.from_pretrained(tmp_path / "ours").eval()
    assert torch.equal(again.explain(images), model.explain(images))
