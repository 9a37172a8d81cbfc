"""``weights=`` of the builders: torchvision's enums and names, files, mappings, and what is refused."""

from __future__ import annotations

import pickle
import sys
from collections import OrderedDict
from enum import Enum
from pathlib import Path

import pytest
import torch
import torchvision
from torchvision.models import ResNet18_Weights, ResNet50_Weights

from fused_resnet import models
from fused_resnet.models import weights as weights_module
from fused_resnet.models.resnet import FIXED_BY_ARCHITECTURE


@pytest.fixture(scope="module")
def trained():
    """A state_dict of resnet18 with 1000 classes that no seed of the tests gives."""
    torch.manual_seed(77)
    return models.resnet18().state_dict()


@pytest.fixture(scope="module")
def hub(trained, tmp_path_factory):
    """A torch hub folder in which the download of ResNet18_Weights.IMAGENET1K_V1 already lies."""
    folder = tmp_path_factory.mktemp("torch_home")
    (folder / "hub" / "checkpoints").mkdir(parents=True)
    torch.save(trained, folder / "hub" / "checkpoints" / Path(ResNet18_Weights.IMAGENET1K_V1.url).name)
    return folder


@pytest.fixture
def downloaded(hub, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(hub))
    monkeypatch.setattr(torch.hub, "_hub_dir", None)


def forbid_network(*args, **kwargs):
    raise AssertionError("this test must not download")


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    monkeypatch.setattr(torch.hub, "download_url_to_file", forbid_network)


def assert_holds(model, state_dict):
    state = model.state_dict()
    assert list(state) == list(state_dict)
    for name, tensor in state_dict.items():
        assert torch.equal(state[name], tensor), name


@pytest.mark.parametrize(
    "weights",
    [
        ResNet18_Weights.IMAGENET1K_V1,
        ResNet18_Weights.DEFAULT,
        "IMAGENET1K_V1",
        "DEFAULT",
        "ResNet18_Weights.IMAGENET1K_V1",
        "ResNet18_Weights.DEFAULT",
    ],
)
def test_torchvision_weights(weights, downloaded, trained):
    assert_holds(models.resnet18(weights=weights, progress=False), trained)


def test_torchvision_weights_are_read_without_running_pickled_code(hub, monkeypatch, tmp_path):
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    (folder / Path(ResNet18_Weights.IMAGENET1K_V1.url).name).write_bytes(
        pickle.dumps(ForbiddenOnUnpickling(), protocol=2)
    )
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    with pytest.raises(pickle.UnpicklingError):
        models.resnet18(weights="DEFAULT")


def test_progress_and_hash_check_reach_torchvision(monkeypatch, trained):
    seen = {}

    def get_state_dict(self, **kwargs):
        seen.update(kwargs)
        return trained

    monkeypatch.setattr(ResNet18_Weights, "get_state_dict", get_state_dict)
    models.resnet18(weights="DEFAULT", progress=False)
    assert seen == {"progress": False, "check_hash": True, "map_location": "cpu", "weights_only": True}


def test_num_classes_of_torchvision_weights(downloaded):
    assert models.resnet18(weights="DEFAULT", num_classes=1000).fc.out_features == 1000
    with pytest.raises(ValueError, match=r"num_classes must be 1000 .*ResNet18_Weights.IMAGENET1K_V1.*got 10"):
        models.resnet18(weights="DEFAULT", num_classes=10)


@pytest.mark.parametrize("as_path", [str, Path])
def test_path(as_path, tmp_path, trained):
    torch.save(trained, tmp_path / "checkpoint.pth")
    assert_holds(models.resnet18(weights=as_path(tmp_path / "checkpoint.pth")), trained)


def test_path_is_read_without_running_pickled_code(tmp_path):
    (tmp_path / "checkpoint.pth").write_bytes(pickle.dumps({"fc.bias": ForbiddenOnUnpickling()}, protocol=2))
    with pytest.raises(pickle.UnpicklingError):
        models.resnet18(weights=tmp_path / "checkpoint.pth")


def test_file_with_the_name_of_torchvision_weights_needs_a_path(tmp_path, monkeypatch, trained):
    monkeypatch.chdir(tmp_path)
    torch.save(trained, "MINE")
    assert_holds(models.resnet18(weights=Path("MINE")), trained)
    assert_holds(models.resnet18(weights="./MINE"), trained)
    with pytest.raises(ValueError, match="one of IMAGENET1K_V1, DEFAULT; got 'MINE'"):
        models.resnet18(weights="MINE")


def test_state_dict_is_copied_and_left_alone(trained):
    before = {name: tensor.clone() for name, tensor in trained.items()}
    model = models.resnet18(weights=trained)
    assert_holds(model, trained)
    with torch.no_grad():
        model.conv1.weight.zero_()
    assert list(trained) == list(before)
    assert all(torch.equal(trained[name], before[name]) for name in before)


@pytest.mark.parametrize(
    ("key", "prefix"),
    [
        ("state_dict", "module."),
        ("model", ""),
        ("model", "_orig_mod."),
        ("model_state_dict", "module._orig_mod."),
        (None, "_orig_mod.module."),
    ],
)
def test_checkpoints_as_training_scripts_save_them(key, prefix, tmp_path, trained):
    state_dict = {prefix + name: tensor for name, tensor in trained.items()}
    checkpoint = {key: state_dict, "epoch": 90, "best": 76.1} if key else state_dict
    torch.save(checkpoint, tmp_path / "checkpoint.pth")
    assert_holds(models.resnet18(weights=tmp_path / "checkpoint.pth"), trained)
    assert_holds(models.resnet18(weights=checkpoint), trained)
    assert list(state_dict) == [prefix + name for name in trained]


def test_version_numbers_survive_the_prefix(trained):
    """BatchNorm2d wants num_batches_tracked from version 2 on: without its version the loss would pass unseen."""
    wrapper = torch.nn.DataParallel(models.resnet18(), device_ids=[])
    state_dict = wrapper.state_dict()
    versions = dict(state_dict._metadata)
    del state_dict["module.bn1.num_batches_tracked"]
    with pytest.raises(RuntimeError, match="Missing key.*bn1.num_batches_tracked"):
        models.resnet18(weights=state_dict)
    assert dict(state_dict._metadata) == versions
    old = OrderedDict(item for item in trained.items() if not item[0].endswith("num_batches_tracked"))
    assert torch.equal(models.resnet18(weights=old).conv1.weight, trained["conv1.weight"])


def test_num_classes_of_a_state_dict_is_the_callers(trained):
    ten = {name: tensor[:10] if name.startswith("fc.") else tensor for name, tensor in trained.items()}
    assert_holds(models.resnet18(weights=ten, num_classes=10), ten)
    with pytest.raises(RuntimeError, match="size mismatch for fc.weight"):
        models.resnet18(weights=ten)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("layer1.0.conv1.weight"), r"Missing key\(s\).*layer1.0.conv1.weight"),
        (lambda state: state.update(extra=torch.zeros(1)), r"Unexpected key\(s\).*extra"),
        (lambda state: state.update({"bn1.bias": torch.zeros(3)}), "size mismatch for bn1.bias"),
        (lambda state: state.update({"module.bn1.bias": state.pop("bn1.bias")}), "module.bn1.bias"),
    ],
)
def test_mismatched_state_dict_is_load_state_dicts_own_error(change, message, trained):
    state_dict = dict(trained)
    change(state_dict)
    with pytest.raises(RuntimeError, match="(?s)Error.* in loading state_dict for ResNet.*" + message):
        models.resnet18(weights=state_dict)


@pytest.mark.parametrize("weights", [ResNet50_Weights.IMAGENET1K_V2, "ResNet50_Weights.IMAGENET1K_V2"])
def test_weights_of_another_architecture(weights):
    with pytest.raises(ValueError, match="resnet18 must be a member of ResNet18_Weights; got .*ResNet50_Weights"):
        models.resnet18(weights=weights)


def test_enum_that_is_not_torchvisions():
    class Mine(Enum):
        BEST = 1

    with pytest.raises(ValueError, match="resnet50 must be a member of ResNet50_Weights; got <Mine.BEST"):
        models.resnet50(weights=Mine.BEST)


def test_unknown_name_lists_the_known_ones():
    with pytest.raises(ValueError, match="IMAGENET1K_V1, IMAGENET1K_V2, DEFAULT; got 'IMAGENET1K_V9'"):
        models.resnet50(weights="IMAGENET1K_V9")
    with pytest.raises(ValueError, match="must be one of IMAGENET1K_V1, DEFAULT; got 'IMAGENET1K_V2'"):
        models.resnet18(weights="IMAGENET1K_V2")


@pytest.mark.parametrize("weights", ["no/such/file.pth", Path("no/such/file.pth"), "imagenet", ""])
def test_missing_file(weights):
    with pytest.raises(FileNotFoundError, match=f"'{weights}' is neither a file nor the name"):
        models.resnet18(weights=weights)


def test_folder_is_not_a_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="is neither a file"):
        models.resnet18(weights=tmp_path)


@pytest.mark.parametrize("weights", [True, 3, b"checkpoint.pth", [1]])
def test_wrong_type(weights):
    with pytest.raises(TypeError, match=f"weights must be .*; got {type(weights).__name__}"):
        models.resnet18(weights=weights)


def test_file_without_a_state_dict(tmp_path):
    torch.save(torch.zeros(3), tmp_path / "tensor.pth")
    with pytest.raises(TypeError, match="must hold a state_dict; it holds a Tensor"):
        models.resnet18(weights=tmp_path / "tensor.pth")


@pytest.mark.parametrize("broken", ["missing", "operators do not fit"])
def test_without_torchvision(broken, monkeypatch, trained, tmp_path):
    """None, paths and state_dicts need no torchvision; its own weights say what to install."""
    if broken == "missing":
        monkeypatch.setitem(sys.modules, "torchvision.models", None)
    else:
        monkeypatch.delitem(sys.modules, "torchvision.models")
        monkeypatch.setattr(sys, "meta_path", [BrokenTorchvision(), *sys.meta_path])
    with pytest.raises(ImportError, match="resnet18 come through torchvision, which cannot be imported") as caught:
        models.resnet18(weights="DEFAULT")
    assert caught.value.__cause__ is not None
    torch.save(trained, tmp_path / "checkpoint.pth")
    assert_holds(models.resnet18(weights=tmp_path / "checkpoint.pth"), trained)


def test_mistakes_surface_before_the_model_is_built(monkeypatch):
    def no_model(*args, **kwargs):
        raise AssertionError("built a model first")

    monkeypatch.setattr(models.resnet, "ResNet", no_model)
    with pytest.raises(FileNotFoundError):
        models.resnet18(weights="absent.pth")


def test_resolve_gives_none_for_none():
    assert weights_module.resolve_weights("resnet18", None) is None
    assert weights_module.with_num_classes(None, {"num_classes": 3}) == {"num_classes": 3}


class ForbiddenOnUnpickling:
    def __reduce__(self):
        return (pytest.fail, ("pickled code ran",))


class BrokenTorchvision:
    """An import hook that fails as torchvision does when its operators do not fit this torch."""

    def find_spec(self, name, path=None, target=None):
        if name == "torchvision.models":
            raise RuntimeError("operator torchvision::nms does not exist")
        return None


def test_torchvision_finds_the_weights_of_a_builder():
    for name in FIXED_BY_ARCHITECTURE.keys() | {"resnet18", "resnet152"}:
        builder = getattr(models, name)
        assert torchvision.models.get_model_weights(builder) is torchvision.models.get_model_weights(name)


def test_older_arguments_are_taken_and_warned_of():
    for make in (
        lambda: models.resnet18(None, False, num_classes=3),
        lambda: models.resnet18(False, num_classes=3),
        lambda: models.resnet18(pretrained=False, num_classes=3),
    ):
        with pytest.warns(FutureWarning, match="resnet18"):
            assert make().fc.out_features == 3
    for wrong in (
        lambda: models.resnet18(None, weights=None),
        lambda: models.resnet18(None, True, 3),
        lambda: models.resnet18(weights=None, pretrained=True),
    ):
        with pytest.raises(TypeError, match="weights and progress, each once"):
            wrong()
