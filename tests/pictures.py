"""Real pictures laid out as data sets of the field are."""

import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

CAMVID_AS_CITYSCAPES = np.array([23, 11, 17, 7, 8, 21, 20, 13, 26, 24, 33, 0], dtype=np.uint8)
"""Label id of Cityscapes for each id of CamVid, the last of which is unlabelled."""


def write_camvid(data_dir: Path, folder: Path, **counts: int) -> Path:
    """Write frames of CamVid's validation part as PART/images and PART/masks, `counts` of them for each part."""
    with tarfile.open(data_dir / "camvid" / "val.tar.gz") as tar:
        members = {member.name: member for member in tar if member.isfile()}
        frames = sorted(name for name in members if name.startswith("images/"))
        for part, count in counts.items():
            taken, frames = frames[:count], frames[count:]
            for image in taken:
                for name in (image, f"masks/{Path(image).stem}.png"):
                    file = folder / part / name
                    file.parent.mkdir(parents=True, exist_ok=True)
                    file.write_bytes(tar.extractfile(members[name]).read())
    return folder


def write_cityscapes(camvid: Path, folder: Path) -> Path:
    """Write what `write_camvid` wrote under the names of folders and files, and by the label ids, of Cityscapes."""
    for part in ("train", "val"):
        for index, image in enumerate(sorted((camvid / part / "images").iterdir())):
            name = f"cambridge/cambridge_{index:06d}_000019"
            photograph = folder / "leftImg8bit" / part / f"{name}_leftImg8bit.png"
            labels = folder / "gtFine" / part / f"{name}_gtFine_labelIds.png"
            for file in (photograph, labels):
                file.parent.mkdir(parents=True, exist_ok=True)
            Image.open(image).save(photograph)
            mask = np.asarray(Image.open(camvid / part / "masks" / f"{image.stem}.png"))
            Image.fromarray(CAMVID_AS_CITYSCAPES[mask]).save(labels)
    return folder
