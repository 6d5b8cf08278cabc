"""`timm-deconv calibrate`."""

from pathlib import Path

__all__ = ["calibrate"]


def calibrate(model: str, data: str, output: Path, /, *, images: int = 1024, image_size: int | None = None) -> None:
    """Estimate a network's whitening by images, and keep its function.

    Fine-tuning then starts from that function. For weights that were trained
    with batch norm, and for folded ones.

        timm-deconv calibrate tf_efficientnet_lite0_deconv photographs lite0
        timm-deconv calibrate runs/folded pictures.tar mine --images 2048

    Args:
        model: name of a network with weights, folder of a run, or repository of the Hub (hf-hub:ORG/NAME).
        data: folder or tar of images (of its training part, where it has parts), or 'digits'.
        output: a new folder, which `timm-deconv train RECIPE pretrained_path=OUTPUT/model.safetensors` starts from.
        images: at most.
        image_size: their height and width, where the network is to be trained at others than its own.
    """
    from timm_deconv.convert import calibrate as whiten
    from timm_deconv.data.evaluation import picture_loader
    from timm_deconv.models.loading import load_network
    from timm_deconv.models.weights import check_new_folder, save_network

    check_new_folder(output)
    network = load_network(model)
    whiten(network, picture_loader(network, data, images=images, image_size=image_size))
    save_network(network, output)
    print(f"{output}: load it by timm.create_model('local-dir:{output}', pretrained=True)")
