"""The demo: ResNet-18 on a photograph, eager and through ai3, with what was chosen, the difference and the times."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

from . import zoo
from .errors import MissingPackageError
from .report import last_report

MODEL = "torchvision:resnet18"


def photograph() -> torch.Tensor:
    """A photograph that scikit-learn ships, [1, 3, 224, 224], normalised as torchvision's models are trained."""
    try:
        from sklearn.datasets import load_sample_image
    except ImportError:
        raise MissingPackageError(purpose="the demo's photograph", package="scikit-learn") from None

    image = torch.from_numpy(load_sample_image("china.jpg").copy()).permute(2, 0, 1)[None].float() / 255
    image = torch.nn.functional.interpolate(image, size=(224, 224), mode="bilinear", antialias=True)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    return (image - mean[:, None, None]) / std[:, None, None]


def medians(functions: dict[str, Callable[[], object]], rounds: int = 30) -> dict[str, float]:
    """Median seconds of each function, called in turn so that a drift of the machine meets them all."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for function in functions.values():
        for _ in range(3):
            function()
    for _ in range(rounds):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def run() -> None:
    image, model = photograph(), zoo.load_model(MODEL)
    print(f"{MODEL} on a photograph {tuple(image.shape)}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    with torch.inference_mode():
        compiled = torch.compile(model, backend="ai3")
        start = time.perf_counter()
        result = compiled(image)
        print(f"first call, with building what was not built yet: {time.perf_counter() - start:.1f} s\n")
        expected = model(image)
        times = medians({"eager": lambda: model(image), "ai3": lambda: compiled(image)})
    print(last_report())
    difference = (result - expected).abs().max().item()
    print(f"\nlargest difference from eager: {difference:.1e} of outputs up to {expected.abs().max().item():.1f}")
    print(f"median time: eager {times['eager'] * 1e3:.1f} ms, ai3 {times['ai3'] * 1e3:.1f} ms", end="")
    print(f" ({times['eager'] / times['ai3']:.2f}x as fast)")
