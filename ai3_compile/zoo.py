"""Models by name, for the command line: `torchvision:resnet18`, or `package.module:callable` of the user's own."""

from __future__ import annotations

import importlib
import importlib.util

import torch

from .errors import ModelNameError

_torchvision_schemas: torch.library.Library | None = None


def torchvision_models() -> object:
    """`torchvision.models`, also where torchvision was built for CUDA and torch was not."""
    global _torchvision_schemas
    if importlib.util.find_spec("torchvision") is None:
        raise ModelNameError(name="torchvision", message="torchvision is not installed: pip install torchvision")
    try:
        return importlib.import_module("torchvision.models")
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
        # Its compiled operators did not load, and it insists on two of their schemas; classifiers run neither.
        _torchvision_schemas = torch.library.Library("torchvision", "DEF")
        _torchvision_schemas.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _torchvision_schemas.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        return importlib.import_module("torchvision.models")


def load_model(name: str) -> torch.nn.Module:
    """The model of this name, in eval mode: a torchvision model with random weights, or what the callable returns.

    Raises ModelNameError where the name has another form, or names nothing that makes a module.
    """
    package, colon, attribute = name.partition(":")
    if not colon or not attribute:
        raise ModelNameError(name=name, message="expected torchvision:<model> or package.module:callable")
    if package == "torchvision":
        get_model, names = (getattr(torchvision_models(), part) for part in ("get_model", "list_models"))
        if attribute not in names():
            near = ", ".join(n for n in names() if n.startswith(attribute[:4]))
            raise ModelNameError(name=name, message=f"torchvision has no such model (close: {near or 'none'})")
        return _with_weights(get_model, attribute)
    try:
        make = getattr(importlib.import_module(package), attribute)
    except (ImportError, AttributeError) as error:
        raise ModelNameError(name=name, message=str(error)) from error
    try:
        model = make() if callable(make) and not isinstance(make, torch.nn.Module) else make
    except Exception as error:  # the user's own code: whatever it raises is shown as what it is
        raise ModelNameError(name=name, message=f"calling it failed: {type(error).__name__}: {error}") from error
    if not isinstance(model, torch.nn.Module):
        raise ModelNameError(name=name, message=f"it gave a {type(model).__name__}, not a torch.nn.Module")
    return model.eval()


def _with_weights(get_model: object, name: str) -> torch.nn.Module:
    assert callable(get_model)
    torch.manual_seed(0)
    extra = {"init_weights": True} if name in ("googlenet", "inception_v3") else {}
    model = get_model(name, weights=None, **extra)
    assert isinstance(model, torch.nn.Module)
    return model.eval()


def default_shape(name: str) -> tuple[int, ...]:
    """The input a model is usually measured with."""
    side = 299 if name.endswith("inception_v3") else 224
    return (1, 3, side, side)
