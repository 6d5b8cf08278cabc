"""Fine-tunes a network on a folder of images, in the order of timm's train.py, and knows nothing of this package.

Prints the loss of the first batch and the accuracy (%) of the network and of its average after the last epoch.
"""

import argparse

import torch
from timm.data import create_dataset, create_loader, resolve_data_config
from timm.models import create_model, model_parameters
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV3, ParseKwargs, dispatch_clip_grad, random_seed

parser = argparse.ArgumentParser()
parser.add_argument("data_dir")
parser.add_argument("--model")
parser.add_argument("--pretrained", action="store_true")
parser.add_argument("--num-classes", type=int)
parser.add_argument("--img-size", type=int)
parser.add_argument("--batch-size", type=int, default=50)
parser.add_argument("--epochs", type=int, default=1)
parser.add_argument("--lr", type=float, default=0.01)
parser.add_argument("--clip-grad", type=float, default=0.03)
parser.add_argument("--model-kwargs", nargs="*", default={}, action=ParseKwargs)
args = parser.parse_args()

random_seed(42)
model = create_model(args.model, pretrained=args.pretrained, num_classes=args.num_classes, **args.model_kwargs)
config = resolve_data_config(vars(args), model=model)
optimizer = create_optimizer_v2(model, opt="sgd", lr=args.lr, momentum=0.9)
average = ModelEmaV3(model, decay=0.9)


def loader(split: str) -> torch.utils.data.DataLoader:
    training = split == "train"
    return create_loader(
        create_dataset("", root=args.data_dir, split=split),
        input_size=config["input_size"],
        mean=config["mean"],
        std=config["std"],
        interpolation=config["interpolation"],
        batch_size=args.batch_size,
        is_training=training,
        no_aug=True,
        use_prefetcher=False,
        num_workers=0,
    )


def accuracy(network: torch.nn.Module) -> float:
    network.eval()
    with torch.no_grad():
        right = [(network(images).argmax(1) == target).float() for images, target in loader("test")]
    return 100 * float(torch.cat(right).mean())


first = None
for _ in range(args.epochs):
    model.train()
    for images, target in loader("train"):
        loss = torch.nn.functional.cross_entropy(model(images), target)
        first = loss.item() if first is None else first
        optimizer.zero_grad()
        loss.backward()
        dispatch_clip_grad(model_parameters(model, exclude_head=True), args.clip_grad, "agc")
        optimizer.step()
        average.update(model)
print(first, accuracy(model), accuracy(average.module))
