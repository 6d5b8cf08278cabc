"""Real pictures laid out as data sets of the field are."""

import io
import json
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


def read_photographs(data_dir: Path, count: int) -> list[tuple[str, bytes]]:
    """Read the first photographs of the ImageNet sample, each of another class: the class's name, and the file."""
    found: list[tuple[str, bytes]] = []
    with tarfile.open(data_dir / "imagenet-sample" / "images.tar.gz") as tar:
        for member in tar:
            if member.isfile():
                found.append((Path(member.name).parent.name, tar.extractfile(member).read()))
            if len(found) == count:
                break
    return found


def write_folders(photographs: list[tuple[str, bytes]], folder: Path) -> None:
    """Write photographs as CLASS/INDEX.jpg."""
    for index, (name, content) in enumerate(photographs):
        file = folder / name / f"{index:04d}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)


def write_shards(photographs: list[tuple[str, bytes]], folder: Path, split: str, shards: int) -> None:
    """Write photographs as shards of WebDataset, with classes numbered in their order, and what timm reads of them."""
    folder.mkdir(parents=True, exist_ok=True)
    numbers = {name: str(number) for number, name in enumerate(sorted({name for name, _ in photographs}))}
    names, lengths = [], []
    for shard in range(shards):
        names.append(f"{split}-{shard:04d}.tar")
        own = range(shard, len(photographs), shards)
        lengths.append(len(own))
        with tarfile.open(folder / names[-1], "w") as tar:
            for index in own:
                name, content = photographs[index]
                for ending, part in (("jpg", content), ("cls", numbers[name].encode())):
                    member = tarfile.TarInfo(f"{index:04d}.{ending}")
                    member.size = len(part)
                    tar.addfile(member, io.BytesIO(part))
    file = folder / "_info.json"
    info = json.loads(file.read_text()) if file.exists() else {"splits": {}}
    told = {"name": split, "num_samples": len(photographs), "filenames": names, "shard_lengths": lengths}
    file.write_text(json.dumps({"splits": {**info["splits"], split: told}}))


def write_parquet(photographs: list[tuple[str, bytes]], folder: Path, split: str) -> None:
    """Write photographs as a local data set of the Hub's form."""
    import datasets

    names = sorted({name for name, _ in photographs})
    columns = {
        "image": [{"bytes": content, "path": None} for _, content in photographs],
        "label": [names.index(name) for name, _ in photographs],
    }
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
    folder.mkdir(parents=True, exist_ok=True)
    datasets.disable_progress_bars()
    datasets.Dataset.from_dict(columns, features=features).to_parquet(folder / f"{split}-00000-of-00001.parquet")


def read_cifar(data_dir: Path, count: int) -> list[tuple[str, bytes]]:
    """Read the first test images of each class of CIFAR-10: the class's name, and the file."""
    found: dict[str, list[bytes]] = {}
    with tarfile.open(data_dir / "cifar10" / "jpeg75" / "test.tar.gz") as tar:
        for member in tar:
            if member.isfile() and len(own := found.setdefault(Path(member.name).parent.name, [])) < count:
                own.append(tar.extractfile(member).read())
    return [(name, content) for name, contents in sorted(found.items()) for content in contents]
