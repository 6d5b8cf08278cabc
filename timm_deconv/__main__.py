"""python -m timm_deconv SCRIPT.py [arguments]: run a script that knows nothing of this package with its networks.

So timm's own train.py, validate.py, inference.py and benchmark.py take --model resnet18_cifar_deconv.
"""

import runpy
import sys
from pathlib import Path

import timm_deconv  # noqa: F401 (registers the networks with timm)

USAGE = """\
usage: python -m timm_deconv SCRIPT.py [arguments]

Runs the script as `python SCRIPT.py [arguments]` would, with the deconvolution networks registered with timm."""


def main() -> None:
    """Run the script that the command line names."""
    if len(sys.argv) < 2:
        raise SystemExit(USAGE)
    if sys.argv[1] in ("-h", "--help"):
        print(USAGE)
        return
    script = Path(sys.argv[1])
    if not script.is_file():
        raise SystemExit(f"no script {str(script)!r}\n\n{USAGE}")
    sys.argv = sys.argv[1:]
    if not sys.flags.safe_path:
        sys.path[0] = str(script.resolve().parent)
    runpy.run_path(str(script), run_name="__main__")


if __name__ == "__main__":
    main()
