"""What a network says of a picture, and how it is drawn."""

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from tests.pictures import read_photographs, write_camvid
from timm_deconv.data.drawing import palette
from timm_deconv.data.pictures import read_picture
from timm_deconv.data.segmentation import CAMVID
from timm_deconv.errors import InputError
from timm_deconv.models.labels import class_names
from timm_deconv.prediction import Predictor


@pytest.fixture
def photograph(data_dir):
    return read_picture(read_photographs(data_dir, 1)[0][1])


def whitened(classes=10):
    """A small network whose running values are those of a batch."""
    model = timm.create_model("resnet18_cifar_deconv", width=0.125, num_classes=classes)
    model.train()(torch.randn(64, 3, 32, 32))
    return model.eval()


def test_probabilities_are_those_of_the_network_in_evaluation(photograph):
    model = whitened()
    transform = timm.data.create_transform(**timm.data.resolve_data_config(model=model))
    with torch.no_grad():
        expected = model(transform(photograph)[None])[0].softmax(0)
    found = Predictor(model)(photograph)
    torch.testing.assert_close(found.shares, expected, rtol=1e-4, atol=1e-6)
    index = int(expected.argmax())
    assert found.top(3)[0][0] == f"class_{index}" and len(found.top(3)) == 3 and len(found.top(99)) == 10
    assert model.training is False and hasattr(model.conv1, "running_deconv"), "the network itself is unchanged"


def test_classes_have_the_names_of_the_run_or_of_imagenet():
    model = whitened()
    model.pretrained_cfg["label_names"] = [f"n{index}" for index in range(10)]
    assert class_names(model)[9] == "n9"
    model.pretrained_cfg["label_descriptions"] = {"n9": "truck"}
    assert class_names(model)[8:] == ["n8", "truck"]
    model.pretrained_cfg["label_names"] = ["cat", "dog"]  # of another number of classes
    assert class_names(model)[:2] == ["class_0", "class_1"]
    names = class_names(timm.create_model("test_resnet"))
    assert len(names) == 1000 and names[0] == "tench, Tinca tinca" and names[281] == "tabby, tabby cat"


def test_a_network_for_masks_says_the_shares_of_the_pixels_and_keeps_the_whole_picture(data_dir, tmp_path):
    file = next((write_camvid(data_dir, tmp_path, val=1) / "val" / "images").iterdir())
    picture = read_picture(file.read_bytes())
    cfg = {"input_size": (3, 48, 64), "crop_pct": 1.0, "label_names": list(CAMVID)}
    model = timm.create_model("segmenter", base="test_resnet", num_classes=11, pretrained_cfg_overlay=cfg)
    predictor = Predictor(model)
    assert predictor(picture).mask.shape == (48, 64)
    predictor.model = torch.nn.Conv2d(3, 11, 1)  # whose classes depend on the colour, as those of no new network
    found = predictor(picture)
    assert found.mask.shape == (48, 64) and float(found.shares.sum()) == pytest.approx(1)
    top = found.top(11)
    assert {name for name, _ in top} == {list(CAMVID)[index] for index in found.mask.unique()}
    assert len(top) > 1 and all(share > 0 for _, share in top)
    drawn = found.drawn(2)
    assert drawn.width >= 192 and drawn.height > drawn.width * 48 / 64 + 2 * 12
    below = np.asarray(drawn)[-40:, :12].reshape(-1, 3)
    assert tuple(CAMVID[top[0][0]]) in map(tuple, below.tolist()), "the class's colour stands before its name"


def test_a_drawn_picture_has_a_line_for_each_class(photograph):
    found = Predictor(whitened())(photograph)
    one, five = found.drawn(1), found.drawn(5)
    assert five.height - one.height == 4 * 16 and max(one.size) <= 512 + 40
    above = np.asarray(five)[: one.height - 24]
    assert (above == np.asarray(one)[: one.height - 24]).all() and above.std() > 20


def test_colours_are_the_data_sets_or_all_different():
    assert palette(list(CAMVID)) == list(CAMVID.values())
    assert len(set(palette([str(index) for index in range(30)]))) == 30


def test_a_network_without_classes_is_refused():
    with pytest.raises(InputError, match="has no classifier"):
        Predictor(timm.create_model("test_resnet", num_classes=0))


def test_grey_networks_take_grey_pictures(photograph):
    model = timm.create_model("resnet18_cifar", in_chans=1, width=0.125)
    predictor = Predictor(model)
    assert predictor.channels == 1 and len(predictor(photograph.convert("L")).shares) == 10
    assert isinstance(predictor(photograph.convert("L")).drawn(1), Image.Image)
