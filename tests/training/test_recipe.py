"""Recipes: the published settings, and errors that help."""

import pytest

from timm_deconv.errors import InputError
from timm_deconv.resources import recipe_files
from timm_deconv.training import Recipe, load_recipe


@pytest.mark.parametrize("name", sorted(recipe_files()))
def test_every_recipe_of_the_package_loads_and_survives_a_round_trip(name, tmp_path):
    recipe = load_recipe(name)
    (tmp_path / f"{name}.yaml").write_text(recipe.yaml())
    assert load_recipe(str(tmp_path / f"{name}.yaml")) == recipe


@pytest.mark.parametrize("epochs", [1, 20, 100])
@pytest.mark.parametrize(
    ("dataset", "classes", "mean", "std"),
    [
        ("cifar10", 10, (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
        ("cifar100", 100, (0.5071, 0.4865, 0.4409), (0.2009, 0.1984, 0.2023)),
    ],
)
def test_cifar_recipes_are_the_published_ones(dataset, classes, mean, std, epochs):
    recipe = load_recipe(f"{dataset}_e{epochs}")
    assert (recipe.epochs, recipe.num_classes, recipe.mean, recipe.std) == (epochs, classes, mean, std)
    assert (recipe.opt, recipe.lr, recipe.momentum, recipe.weight_decay) == ("momentum", 0.1, 0.9, 1e-3)
    assert (recipe.sched, recipe.min_lr, recipe.warmup_epochs, recipe.batch_size) == ("cosine", 0, 0, 128)
    assert (recipe.augmentation, recipe.crop_padding, recipe.hflip) == ("pad_crop", 4, 0.5)
    assert not recipe.filter_bias_and_bn and recipe.smoothing == 0 and not recipe.model_ema


def test_imagenet_recipe_is_the_published_one():
    recipe = load_recipe("imagenet_e90")
    assert (recipe.batch_size, recipe.epochs, recipe.lr, recipe.weight_decay) == (256, 90, 0.1, 1e-4)
    assert (recipe.input_size, recipe.augmentation, recipe.crop_pct) == ((3, 224, 224), "rrc", 0.875)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["epochz=3"], r"no recipe key 'epochz'; nearest: epochs"),
        (["opt=sgdd"], r"no optimiser \(opt\) 'sgdd'; nearest: sgd"),
        (["epochs=0"], r"epochs=0: .* greater than 0"),
        (["epochs=2.5"], r"epochs=2.5: .* fractional part"),
        (["batch_size=-4"], r"batch_size=-4: "),
        (["lr=0"], r"lr=0: "),
        (["lr=.nan"], r"lr=nan: .* finite"),
        (["weight_decay=-1"], r"weight_decay=-1: "),
        (["sched=cosin"], r"sched='cosin': .*'cosine'"),
        (["std=[1.0, 0.0, 1.0]"], r"std=.*positive"),
        (["mean=[0.5]"], r"mean and std need 3 values"),
        (["epochs=2", "warmup_epochs=2"], r"warmup_epochs=2 leaves nothing of epochs=2"),
        (["lr"], r"'lr' is not key=value"),
        (["lr=[1"], r"lr=\[1: not YAML"),
        (["lr.x=1"], r"lr holds one value"),
        (["model_kwargs.deconv=fast", "model_kwargs.deconv.block=8"], r"model_kwargs.deconv holds one value"),
        (["model_kwargs={a: 1, a: 2}"], r"not YAML: .*duplicate key"),
        (["mean[7]=1"], r"mean\[7\]=1: not YAML: .*out of range"),
    ],
)
def test_a_setting_that_makes_no_sense_is_named_in_one_line(settings, message):
    with pytest.raises(InputError, match=message) as raised:
        load_recipe("digits", settings)
    assert "\n" not in str(raised.value)


def test_an_unknown_recipe_is_answered_with_the_nearest_names():
    with pytest.raises(InputError, match=r"no recipe 'cifar10_e02'; nearest: .*cifar10_e20"):
        load_recipe("cifar10_e02")
    with pytest.raises(InputError, match=r"no recipe file missing\.yaml"):
        load_recipe("missing.yaml")


def test_a_missing_key_is_named(tmp_path):
    (tmp_path / "bare.yaml").write_text("model: test_resnet\n")
    with pytest.raises(InputError, match="recipe key 'dataset' is missing"):
        load_recipe(str(tmp_path / "bare.yaml"))


def test_a_file_that_is_no_mapping_is_refused(tmp_path):
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(InputError, match="not a mapping"):
        load_recipe(str(tmp_path / "list.yaml"))


def test_settings_from_the_command_line_are_yaml():
    recipe = load_recipe(
        "digits", ["lr=1e-3", "model_ema=true", "model_kwargs.deconv.eps=1e-2", "model_kwargs.width=2"]
    )
    assert (recipe.lr, recipe.model_ema) == (1e-3, True)
    assert recipe.model_kwargs["deconv"] == {"eps": 1e-2} and recipe.model_kwargs["width"] == 2
    recipe = load_recipe("digits", ["mean[1]=0.5", "channels_last=no", "clip_grad=null", "model_kwargs={deconv: fast}"])
    assert recipe.mean == (0.3057, 0.5, 0.3057) and (recipe.channels_last, recipe.clip_grad) == (False, None)
    assert recipe.model_kwargs == {"deconv": "fast"}, "a value replaces what the key held"


def test_a_recipe_cannot_be_changed_in_place():
    with pytest.raises(ValueError, match="frozen"):
        load_recipe("digits").lr = 1.0


def test_the_hash_tells_settings_apart_and_not_models_seeds_or_machines():
    recipe = load_recipe("cifar10_e1")
    elsewhere = recipe.merged({"model": "resnet18_cifar", "seed": 3, "data_dir": "/data", "workers": 7, "name": "mine"})
    assert elsewhere.hash() == recipe.hash()
    assert len({recipe.hash(), recipe.merged({"lr": 0.2}).hash(), load_recipe("cifar10_e20").hash()}) == 3


def test_the_hash_is_the_same_in_every_version():
    assert load_recipe("cifar10_e1").hash() == "dcf175cb"


def test_all_settings_are_explained():
    missing = [key for key in Recipe.model_fields if key not in Recipe.__doc__]
    assert not missing
