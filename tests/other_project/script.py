"""A script as others write them: it knows timm and a module beside it, and has never heard of this package."""

import argparse
import sys

import neighbour_of_the_script
import timm

parser = argparse.ArgumentParser()
parser.add_argument("--model")
parser.add_argument("--width", type=float, default=1.0)
args = parser.parse_args()
model = timm.create_model(args.model, num_classes=7, width=args.width)
print(sys.argv[0], __name__, type(model).__name__, model.get_classifier().out_features, neighbour_of_the_script.NAME)
