"""`timm-deconv bench`."""

from dataclasses import asdict

from .output import print_json, print_table, status

__all__ = ["bench"]


def bench(
    model: str,
    /,
    *,
    batch_size: int = 32,
    image_size: int | None = None,
    rounds: int = 7,
    cpu: bool = False,
    json: bool = False,
) -> None:
    """Measure what whitening costs here: images a second beside batch norm.

    Training steps are forward and backward pass on random images, in
    float32; inference is timed with whitening and with it folded away. What
    is compared takes turns, so that a busy machine slows all of it alike.
    The studies behind the documentation are part of a checkout of the
    project: scripts/benchmark.py.

        timm-deconv bench resnet18_cifar_deconv
        timm-deconv bench resnet50_deconv --batch-size 8 --image-size 160

    Args:
        model: a deconvolution network of `timm-deconv list`.
        batch_size: images a step.
        image_size: their height and width; default the network's own.
        rounds: measurements of each, of which the median is shown.
        cpu: stay on the processor where there is a GPU.
        json: print a list of JSON.
    """
    import torch

    from timm_deconv.models.speed import measure_speed

    device = "cuda" if torch.cuda.is_available() and not cpu else "cpu"
    with status(f"timing {model}") as say:
        speeds = measure_speed(
            model, batch_size=batch_size, image_size=image_size, rounds=rounds, device=device, progress=say
        )
    if json:
        print_json(list(map(asdict, speeds)))
    else:
        where = torch.cuda.get_device_name() if device == "cuda" else f"cpu, {torch.get_num_threads()} threads"
        print_table(list(map(asdict, speeds)), f"{model}, {batch_size} images a step, {where}")
