"""timm-deconv demo: a local page to show pictures to."""

import webbrowser
from contextlib import suppress
from typing import Annotated

from cyclopts import Parameter

__all__ = ["demo"]


def demo(
    *,
    model: str = "resnet18_025_cifar_deconv",
    twin: str | None = None,
    port: int = 7860,
    open_page: Annotated[bool, Parameter(name="--open")] = False,
) -> None:
    """Serve a page that shows what batch norm and deconvolution see in a picture.

    The page is at http://127.0.0.1:PORT/, for this computer alone, until
    Ctrl-C ends it.

        timm-deconv demo --open
        timm-deconv demo --model tf_efficientnet_lite0_deconv
        timm-deconv demo --model runs/cifar10_e20 --twin runs/cifar10_e20_twin

    Args:
        model: the network with deconvolution: a name with weights, the folder of a run, or ORG/NAME of the Hub. The
            default knows the classes of CIFAR-10; tf_efficientnet_lite0_deconv knows ImageNet's.
        twin: the network with batch norm beside it; by default the one that it is made from.
        port: where the page is; 0 takes any free one.
        open_page: open the page in the browser.
    """
    from timm_deconv.demo import DemoServer, load_pair

    with DemoServer(port) as server:
        server.pair = load_pair(model, twin)
        print(f"{' beside '.join(server.pair.names)}: {server.url} (Ctrl-C ends it)", flush=True)
        if open_page:
            webbrowser.open(server.url)
        with suppress(KeyboardInterrupt):
            server.serve_forever()
