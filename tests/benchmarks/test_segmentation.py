"""Fine-tuning to CamVid: frames with their masks, intersection over union, the same function in both forms."""

import shutil
import tarfile
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from benchmarks.segmentation import CLASSES, IGNORED, CamVid, Segmentation
from benchmarks.study import variant
from timm_deconv.convert.module_types import batch_norms
from timm_deconv.errors import InputError
from timm_deconv.layers import Deconv2d
from timm_deconv.training import Recipe, load_recipe
from timm_deconv.training.loop import train

SIZE = (45, 60)


@pytest.fixture(scope="module")
def frames(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the first 36 frames of the validation part, as train and val."""
    folder = tmp_path_factory.mktemp("camvid")
    with tarfile.open(data_dir / "camvid" / "val.tar.gz") as whole:
        members = {member.name: member for member in whole if member.isfile()}
        names = sorted(Path(name).stem for name in members if name.startswith("images/"))[:36]
        with tarfile.open(folder / "val.tar", "w") as part:
            for name in (f"{kind}/{stem}" for stem in names for kind in ("images", "masks")):
                found = next(key for key in members if key.rpartition(".")[0] == name)
                part.addfile(members[found], whole.extractfile(members[found]))
    shutil.copy(folder / "val.tar", folder / "train.tar")
    return folder


@pytest.fixture
def recipe(frames: Path, tmp_path: Path) -> Recipe:
    model = timm.create_model("mobilenetv2_100", num_classes=0)
    save_file(model.state_dict(), tmp_path / "start.safetensors")
    settings = {"pretrained": False, "pretrained_path": str(tmp_path / "start.safetensors"), "model_kwargs": {}}
    settings |= {"dataset": "camvid", "data_dir": str(frames), "num_classes": CLASSES, "input_size": (3, *SIZE)}
    return load_recipe("finetune").merged(settings | {"batch_size": 4, "calibration_images": 36, "workers": 0})


def test_frames_and_masks_belong_together(frames: Path) -> None:
    data = CamVid(frames / "val.tar", SIZE, mirrored=False)
    assert len(data) == 36
    image, mask = data[0]
    assert image.shape == (3, *SIZE) and mask.shape == SIZE and image.dtype == mask.dtype == torch.uint8
    assert set(mask.unique().tolist()) <= {*range(CLASSES), IGNORED}
    brightness = [image[:, mask == kind].float().mean() for kind in (0, 3)]
    assert brightness[0] > brightness[1], "the sky is brighter than the road"
    mirrored = CamVid(frames / "val.tar", SIZE, mirrored=True)
    pairs = [mirrored[0] for _ in range(20)]
    assert any(torch.equal(x, image.flip(2)) and torch.equal(y, mask.flip(1)) for x, y in pairs)
    assert any(torch.equal(x, image) and torch.equal(y, mask) for x, y in pairs)


def test_intersection_over_union_counts_labelled_pixels_over_all_images(recipe: Recipe) -> None:
    logits = torch.randn(3, CLASSES, 6, 7)
    masks = torch.randint(CLASSES + 1, (3, 6, 7))
    masks = torch.where(masks == CLASSES, IGNORED, masks).to(torch.uint8)

    class Fixed(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return logits

    task = Segmentation(recipe, torch.device("cpu"))
    loss, figures = task.loss(Fixed(), (torch.zeros(3, 3, 6, 7, dtype=torch.uint8), masks))
    named, kept = logits.argmax(1)[masks != IGNORED], masks[masks != IGNORED]
    shares = [((named == k) & (kept == k)).sum() / ((named == k) | (kept == k)).sum() for k in range(CLASSES)]
    summary = task.summarise(figures.sum(0), 3)
    assert summary["miou"] == pytest.approx(100 * torch.stack(shares).mean().item(), rel=1e-5)
    assert summary["loss"] == pytest.approx(loss.item(), rel=1e-5)


def test_encoders_of_both_forms_start_as_the_same_function(recipe: Recipe) -> None:
    maps = {}
    for text in ("twin", "fast", "fast calibration_images=0"):
        chosen = variant(text, "mobilenetv2_100", recipe)
        assert chosen.task is Segmentation
        torch.manual_seed(0)
        task = Segmentation(chosen.recipe, torch.device("cpu"))
        model = task.create_model()
        task.calibrate(model)
        x, _ = next(iter(task.create_loaders()[1]))
        model.eval()
        with torch.no_grad():
            maps[text] = model.encoder(task.normalise(x))[-1]
        assert bool(batch_norms(model)) == (text == "twin")
        assert any(isinstance(layer, Deconv2d) for layer in model.modules()) == (text != "twin")
    for text in ("fast", "fast calibration_images=0"):
        assert (maps[text] - maps["twin"]).abs().max() < 1e-3 * maps["twin"].abs().max()


def test_a_run_learns_and_reports_the_mean_intersection(recipe: Recipe, tmp_path: Path) -> None:
    chosen = variant("fast epochs=1 lr=0.1", "mobilenetv2_100", recipe)
    row = train(chosen.recipe, tmp_path / "run", cpu=True, task=chosen.task)
    assert 1 < row["miou"] <= 100
    assert row["train_loss"] < torch.tensor(CLASSES).log().item(), "better than equal scores"


def test_missing_tars_and_masks_are_refused(frames: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="CamVid is read from tars"):
        CamVid(tmp_path / "none.tar", SIZE, mirrored=False)
    with tarfile.open(frames / "val.tar") as whole, tarfile.open(tmp_path / "bare.tar", "w") as bare:
        for member in whole:
            if member.name.startswith("images/"):
                bare.addfile(member, whole.extractfile(member))
    with pytest.raises(InputError, match="no images/0016E5"):
        CamVid(tmp_path / "bare.tar", SIZE, mirrored=False)
