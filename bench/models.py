"""Whole networks: ai3 against eager, eager channels_last and Inductor, batch 1, in one process."""

from __future__ import annotations

import torch

from ai3_compile import zoo
from ai3_compile.demo import medians

MODELS = ("alexnet", "vgg16", "resnet18", "resnet50", "squeezenet1_1", "mobilenet_v3_large", "googlenet")


def run(rounds: int) -> list[dict[str, object]]:
    """Prints and returns median milliseconds of each side, and ai3's time over the best of the others."""
    rows: list[dict[str, object]] = []
    print(f"{'model':22}{'eager':>9}{'cl':>9}{'inductor':>10}{'ai3':>9}{'ai3/best':>10}")
    for name in MODELS:
        torch._dynamo.reset()
        model, image = zoo.load_model(f"torchvision:{name}"), torch.randn(zoo.default_shape(name))
        other = zoo.load_model(f"torchvision:{name}").to(memory_format=torch.channels_last)
        last = image.to(memory_format=torch.channels_last)
        with torch.inference_mode():
            ai3, inductor = torch.compile(model, backend="ai3"), torch.compile(model)
            with torch._inductor.config.patch(freezing=True):
                inductor(image)
            times = medians(
                {
                    "eager": lambda: model(image),
                    "channels_last": lambda: other(last),
                    "inductor": lambda: inductor(image),
                    "ai3": lambda: ai3(image),
                },
                rounds,
            )
        ratio = times["ai3"] / min(t for side, t in times.items() if side != "ai3")
        print(
            f"{name:22}"
            + "".join(f"{t * 1e3:{w}.1f}" for t, w in zip(times.values(), (9, 9, 10, 9)))
            + f"{ratio:10.2f}"
        )
        rows.append({"model": name, "milliseconds": {k: t * 1e3 for k, t in times.items()}, "ratio to best": ratio})
    return rows
