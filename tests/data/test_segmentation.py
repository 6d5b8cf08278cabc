"""Images with masks: what is read, how both are transformed together, and what is wrong with them said in a line."""

import shutil
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from tests.pictures import CAMVID_AS_CITYSCAPES, write_camvid, write_cityscapes
from timm_deconv.data import IGNORED, PaddedBatch, create_joint_transform, create_segmentation
from timm_deconv.errors import InputError

SIZE = (3, 45, 60)
CLASSES = 11


@pytest.fixture(scope="module")
def camvid(data_dir, tmp_path_factory):
    return write_camvid(data_dir, tmp_path_factory.mktemp("camvid"), train=4, val=4)


@pytest.fixture
def broken(camvid, tmp_path):
    """A copy to be spoiled, and its first mask."""
    shutil.copytree(camvid, tmp_path / "camvid")
    return tmp_path / "camvid", sorted((tmp_path / "camvid" / "train" / "masks").iterdir())[0]


def original(camvid, part, index):
    file = sorted((camvid / part / "masks").iterdir())[index]
    return np.asarray(Image.open(file))


def test_frames_and_masks_belong_together_and_unlabelled_pixels_are_ignored(camvid):
    dataset = create_segmentation("camvid", str(camvid), "train", CLASSES)
    image, mask = dataset[2]
    assert len(dataset) == 4 and image.mode == "RGB" and image.size == mask.size == (480, 360)
    numbers = original(camvid, "train", 2)
    assert (np.asarray(mask) == np.where(numbers == 11, IGNORED, numbers)).all()
    brightness = [np.asarray(image)[np.asarray(mask) == kind].mean() for kind in (0, 3)]
    assert brightness[0] > brightness[1], "the sky is brighter than the road"


def test_tars_and_folders_give_the_same_pairs(camvid, tmp_path):
    with tarfile.open(tmp_path / "val.tar", "w") as tar:
        tar.add(camvid / "val", ".")
    tars, folders = (create_segmentation("camvid", str(root), "validation", CLASSES) for root in (tmp_path, camvid))
    assert len(tars) == len(folders) == 4
    for index in (0, 3):
        assert all(a.tobytes() == b.tobytes() for a, b in zip(tars[index], folders[index], strict=True))


def test_label_ids_of_cityscapes_become_its_nineteen_train_ids_and_void_is_ignored(camvid, tmp_path):
    dataset = create_segmentation("cityscapes", str(write_cityscapes(camvid, tmp_path)), "validation", 19)
    train_ids = np.array([10, 2, 5, 0, 1, 8, 7, 4, 13, 11, 18, IGNORED], dtype=np.uint8)  # of CamVid's classes
    assert dataset.labels.names[13] == "car" and len(dataset.labels.names) == len(dataset.labels.colours) == 19
    for index in range(4):
        assert (np.asarray(dataset[index][1]) == train_ids[original(camvid, "val", index)]).all()
    assert CAMVID_AS_CITYSCAPES.max() == 33


def test_any_folder_of_images_and_masks_is_read_whatever_their_endings(tmp_path):
    for kind, ending in (("images", "jpg"), ("masks", "png")):
        (tmp_path / "train" / kind / "street").mkdir(parents=True)
        for name in "ab":
            mode = "RGB" if kind == "images" else "L"
            Image.new(mode, (8, 6), 0).save(tmp_path / "train" / kind / "street" / f"{name}.{ending}")
    dataset = create_segmentation("masks", str(tmp_path), "train", 3, channels=1)
    dataset.check()
    assert len(dataset) == 2 and dataset[0][0].mode == "L"
    assert dataset.filename(1).endswith("images/street/b.jpg with mask masks/street/b.png")


def test_image_and_mask_are_scaled_cut_and_mirrored_together(camvid):
    """A mask that is the image's own red channel stays that, but for the smoothing of the image's."""
    _, mask = create_segmentation("camvid", str(camvid), "train", CLASSES)[0]
    picture = Image.merge("RGB", [mask] * 3)
    settings = {"augmentation": "scale_crop", "scale": (0.5, 2.0), "hflip": 0.5, "crop_pct": 0.75, "mean": (1, 1, 1)}
    transform = create_joint_transform(SIZE, training=True, **settings)
    shares = []
    for _ in range(20):
        image, classes = transform(picture, mask)
        assert image.shape == SIZE and classes.shape == SIZE[1:] and image.dtype == classes.dtype == torch.uint8
        assert type(image) is type(classes) is torch.Tensor
        alike = (image[0].int() - classes.int()).abs() < 40  # of 255 for what is ignored or padding
        assert alike.float().mean() > 0.8
        shares.append((classes == IGNORED).float().mean().item())
    assert max(shares) - min(shares) > 0.1, "windows of small images have a border that is ignored"


def test_evaluation_keeps_the_whole_image_or_resizes_it_to_the_inputs_size(camvid):
    image, mask = create_segmentation("camvid", str(camvid), "train", CLASSES)[0]
    whole = create_joint_transform(SIZE, training=False, augmentation="scale_crop", crop_pct=0.5)
    resized = create_joint_transform(SIZE, training=False)
    for transform, size in ((whole, (90, 120)), (resized, (45, 60))):
        pixels, classes = transform(image, mask)
        assert pixels.shape == (3, *size) and classes.shape == size
        assert set(classes.unique().tolist()) <= {*range(CLASSES), IGNORED}


def test_a_batch_of_several_sizes_is_padded_with_what_is_ignored():
    ones = (torch.ones(size, dtype=torch.uint8) for size in ((2, 5), (4, 3)))
    samples = [(9 * mask.expand(3, -1, -1), mask) for mask in ones]
    images, masks = PaddedBatch((0.2, 0.4, 0.6))(samples)
    assert images.shape == (2, 3, 4, 5) and masks.shape == (2, 4, 5)
    assert (masks == 1).sum() == 22 and (masks == IGNORED).sum() == 18
    assert (images[0, :, :2] == 9).all() and images[0, :, 3, 0].tolist() == [51, 102, 153]


def test_an_image_without_a_mask_is_named(broken):
    root, mask = broken
    mask.unlink()
    with pytest.raises(InputError, match=rf"1 of 4 images in .* have no mask, images/{mask.stem}.jpg among them"):
        create_segmentation("camvid", str(root), "train", CLASSES)


def test_a_mask_of_cityscapes_that_is_not_there_is_named(camvid, tmp_path):
    write_cityscapes(camvid, tmp_path)
    next((tmp_path / "gtFine" / "val" / "cambridge").iterdir()).unlink()
    with pytest.raises(InputError, match=r"1 of 4 images have no mask, e.g. no .*_gtFine_labelIds.png"):
        create_segmentation("cityscapes", str(tmp_path), "validation", 19)
    with pytest.raises(InputError, match=r"no train part of Cityscapes in .*; it needs leftImg8bit/train and gtFine"):
        create_segmentation("cityscapes", str(tmp_path / "gtFine"), "train", 19)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda mask: mask.resize((48, 36), 0), r"is 48x36 and its image 480x360; both need one size"),
        (lambda mask: Image.eval(mask, lambda x: 57 if x == 3 else x), r"has pixels of 57, .*are 0 to 10, and 255"),
        (lambda mask: mask.convert("RGB"), r"is a picture of colours; it needs one number a pixel"),
        (lambda mask: Image.fromarray(np.full((360, 480), 700, np.uint16)), r"has pixels of 700, which is no class"),
    ],
)
def test_a_mask_that_makes_no_sense_is_named_before_training(broken, spoil, message):
    root, file = broken
    with Image.open(file) as mask:
        spoilt = spoil(mask)
    spoilt.save(file)
    dataset = create_segmentation("camvid", str(root), "train", CLASSES)
    for look in (dataset.check, lambda: dataset[0]):
        with pytest.raises(InputError, match=rf"mask .*{file.name} {message}") as raised:
            look()
        assert "\n" not in str(raised.value)


def test_a_file_that_is_no_picture_is_named(broken):
    root, file = broken
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(OSError, match=rf"unreadable image .* with mask .*{file.name} \(index 0\): .*; repl"):
        create_segmentation("camvid", str(root), "train", CLASSES).check()


@pytest.mark.parametrize(
    ("name", "classes", "message"),
    [
        ("cityscapes", 20, "num_classes=20, but masks of cityscapes tell 19 classes apart"),
        ("camvid", 12, "num_classes=12, but masks of camvid tell 11 classes apart"),
        ("masks", 256, "num_classes=256, but masks of masks tell 255 classes apart"),
        ("masks", 3, r"no train folder or tar of images/ and masks/ in"),
    ],
)
def test_what_cannot_be_had_is_answered_in_one_line(tmp_path, name, classes, message):
    with pytest.raises(InputError, match=message):
        create_segmentation(name, str(tmp_path), "train", classes)
    with pytest.raises(InputError, match=r"no data folder .*; give --data-dir"):
        create_segmentation(name, None, "train", classes)


def test_a_compressed_or_cut_tar_is_named(camvid, tmp_path):
    (tmp_path / "train.tar").write_bytes(b"no tar at all")
    with pytest.raises(InputError, match=r"train.tar cannot be read as a tar"):
        create_segmentation("camvid", str(tmp_path), "train", CLASSES)
