"""Every convolution algorithm on the layers of ResNet-18 against torch, both in inference with the weights packed."""

from __future__ import annotations

import torch

from ai3_compile import core, registry
from ai3_compile.demo import medians

# batch, channels, side, filters, kernel, stride: the distinct convolutions of ResNet-18 at batch 1.
LAYERS = (
    (1, 3, 224, 64, 7, 2),
    (1, 64, 56, 64, 3, 1),
    (1, 64, 56, 128, 3, 2),
    (1, 64, 56, 128, 1, 2),
    (1, 128, 28, 128, 3, 1),
    (1, 128, 28, 256, 3, 2),
    (1, 256, 14, 256, 3, 1),
    (1, 256, 14, 512, 3, 2),
    (1, 512, 7, 512, 3, 1),
)


def run(rounds: int) -> list[dict[str, object]]:
    """Prints and returns, for each layer, each algorithm's time over torch's (its better layout) and GFLOP/s."""
    core.load()
    algorithms = [a for a in registry.of_operation("conv2d") if a.platform == "cpp"]
    registry.prepare(["conv2d"])
    rows: list[dict[str, object]] = []
    print(f"{'layer':28}{'torch ms':>9}{'(cl)':>8}  time over torch's contiguous / channels_last")
    for batch, channels, side, filters, kernel, stride in LAYERS:
        weight = torch.randn(filters, channels, kernel, kernel)
        image = torch.randn(batch, channels, side, side)
        pad = kernel // 2
        last, weight_last = (t.contiguous(memory_format=torch.channels_last) for t in (image, weight))
        functions = {
            "torch": lambda: torch.conv2d(image, weight, None, stride, pad),
            "torch channels_last": lambda: torch.conv2d(last, weight_last, None, stride, pad),
        }
        for algorithm in algorithms:
            if algorithm.name == "winograd" and (kernel, stride) != (3, 1):
                continue
            window = (stride, stride, pad, pad, pad, pad, 1, 1, 1, algorithm.id)
            nhwc = registry.platforms()["cpp"].prefers_channels_last(algorithm)
            source = last if nhwc else image
            functions[algorithm.qualified] = lambda s=source, w=window, n=nhwc: torch.ops.ai3.conv2d(
                s, weight, None, *w, channels_last=n, static_weight=True
            )
        with torch.inference_mode():
            times = medians(functions, rounds)
        layer = f"{batch}x{channels}x{side}x{side} {kernel}x{kernel}s{stride} {filters}"
        base, base_last = times["torch"], times["torch channels_last"]
        flops = 2 * batch * filters * channels * kernel * kernel * (side // stride) ** 2
        ratios = {
            name: (t / base, t / base_last) for name, t in times.items() if name in {a.qualified for a in algorithms}
        }
        cells = "  ".join(f"{name.split('@')[0]} {a:.2f}/{b:.2f}" for name, (a, b) in ratios.items())
        print(f"{layer:28}{base * 1e3:9.3f}{base_last * 1e3:8.3f}  {cells}")
        gflops = {name: flops / t / 1e9 for name, t in times.items()}
        rows.append({"layer": layer, "milliseconds": {n: t * 1e3 for n, t in times.items()}, "gflops": gflops})
    return rows
