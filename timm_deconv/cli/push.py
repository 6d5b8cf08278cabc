"""`timm-deconv push`: publishes a trained network on the Hub."""

from pathlib import Path
from typing import Any

from .output import print_json, print_table

__all__ = ["push"]


def push(
    run_dir: Path,
    /,
    *,
    org: str,
    dry_run: bool = False,
    output: Path | None = None,
    private: bool = False,
    revision: str | None = None,
    tag: str | None = None,
    no_eval: bool = False,
    data_dir: Path | None = None,
    json: bool = False,
) -> None:
    """Publish a trained network on the Hub, as ORG/ARCHITECTURE.TAG.

    The weights are evaluated again first. All files go up in one commit or
    none, and an upload that was interrupted is completed by the same command.
    The token is that of `hf auth login`, or of the variable HF_TOKEN.

        timm-deconv push runs/mine --org me --dry-run
        timm-deconv push runs/mine --org me --private --tag nd_e3_digits

    Args:
        run_dir: output folder of a finished run, its best/, or a folder of carried-over weights.
        org: organisation or user.
        dry_run: write the files that would go up, and send nothing.
        output: new folder for --dry-run; published/NAME where it is not given.
        private: make the repository a private one.
        revision: branch to commit to, made where it is missing; main where it is not given.
        tag: name of the weights, such as nd_e20_cifar10; made from recipe and data set where it is not given.
        no_eval: publish without an evaluation, which the card says.
        data_dir: folder of the images of the evaluation, where it is not the recipe's.
        json: print JSON.
    """
    from timm_deconv.errors import InputError
    from timm_deconv.hub import publish

    if output is not None and not dry_run:
        raise InputError("--output is the folder of --dry-run; add that, or leave it out")
    options: dict[str, Any] = {"tag": tag, "evaluate": not no_eval, "data_dir": data_dir}
    if dry_run:
        if private or revision is not None:
            raise InputError("--private and --revision are of an upload; leave --dry-run out, or them")
        tree = publish.dry_run(run_dir, org, output, **options)
        found = {"repository": tree.repository, "folder": str(tree.folder), "files": tree.sizes()}
        done = f"{tree.folder}: what would go up as {tree.repository}; nothing was sent"
    else:
        published = publish.push(run_dir, org, private=private, revision=revision, **options)
        found = {name: getattr(published, name) for name in ("repository", "commit", "url")}
        found["files"] = published.sizes
        done = f"published: timm.create_model('hf-hub:{published.repository}@{published.commit}', pretrained=True)"
    if json:
        print_json(found)
        return
    print_table([{"file": name, "bytes": size} for name, size in found["files"].items()])
    print(done)
