"""How fast this machine trains and samples the default network, beside its matrix-product rate.

    python benchmarks/speed.py
    python benchmarks/speed.py --image-size 64    without ONNX Runtime: no such file is included

Everything is measured in one run, in turn, and the medians are printed.  Times are those of one
machine and day; their fractions of the matrix-product rate vary less.  One image costs 6 floating
point operations per multiply-accumulate (MAC) in training and 2 in an evaluation; a guided step
takes two evaluations.  bfloat16 is compared with the float32 product, too.
"""

import argparse
import statistics
import sys
import time
from functools import partial
from pathlib import Path

import torch
from torch.optim.swa_utils import AveragedModel
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import ddim
import infer_onnx
from common import IMAGE_SIZES, UNet
from runs import Muon, autocast, power_ema

BATCH = 64
DEPTHS = (1, 1, 1, 3)  # of ddim.py, for the most resolutions; fewer have the last of these
WARM_UP = 3  # rounds before the ROUNDS that are counted
ROUNDS = 15
PRODUCT = "2048^3 float32 product"
SIZES = 1, 16, 200  # of the batches that are evaluated; 200 is one of 100 guided images


def default_network(image_size):
    """The network that ddim.py trains on grey images of this size."""
    widths = ddim.WIDTHS[image_size]
    return UNet(widths=widths, depths=DEPTHS[-len(widths) :])


def measured_functions(image_size):
    """{name: (function, images, operations for an image)}, and the network that they use."""
    torch.manual_seed(0)
    torch.set_flush_denormal(True)
    matrix, result = torch.randn(2, 2048, 2048)
    model = default_network(image_size).to(memory_format=torch.channels_last)
    optimizer = Muon(model.named_parameters(), 5e-3, 0.01, fused=True)
    ema_model = AveragedModel(model, multi_avg_fn=power_ema(0.08)).eval()
    count = max(SIZES)
    x = torch.randn(count, 1, image_size, image_size)
    t = torch.randint(0, 1000, (count,))
    y = torch.randint(0, 10, (count,))
    if image_size == 32:
        shipped = Path(infer_onnx.__file__).parent / "pretrained/ddim.onnx"  # of this network, too
        session = infer_onnx.load_model(shipped, "cpu").session
        feed = {"x_t": x.numpy(), "t": t.numpy(), "y": y.numpy()}

    def product():
        """Four products of 2048 x 2048 float32 matrices, 2 * 2048^3 operations each."""
        for _ in range(4):
            torch.mm(matrix, matrix, out=result)  # without allocating memory

    def training_step(bf16):
        """Forward, loss, backward, clipping, optimiser and EMA, as in ddim.py's train loop."""
        with autocast(x.device, bf16):
            output = model(x[:BATCH], t[:BATCH], y[:BATCH])
        loss = ddim.image_losses(output.float(), x[:BATCH], "l2").mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        ema_model.update_parameters(model)

    def torch_evaluation(size):
        with torch.no_grad():
            model(x[:size], t[:size], y[:size])

    def onnx_evaluation(size):
        session.run(None, {name: array[:size] for name, array in feed.items()})

    macs = macs_of(model, image_size)
    work = {
        PRODUCT: (product, 1, 4 * 2 * 2048**3),
        "training, float32": (partial(training_step, False), BATCH, 6 * macs),
    }
    with autocast(x.device, None):
        if torch.is_autocast_enabled("cpu"):  # elsewhere it is emulated, and slower by far
            work["training, bfloat16"] = partial(training_step, True), BATCH, 6 * macs
    for size in SIZES:
        work[f"evaluation of {size}, torch"] = partial(torch_evaluation, size), size, 2 * macs
        if image_size == 32:
            onnx = partial(onnx_evaluation, size)
            work[f"evaluation of {size}, onnxruntime"] = onnx, size, 2 * macs
    return work, model


def macs_of(model, image_size):
    """Multiply-accumulates of the network for an image."""
    image, index = torch.zeros(1, 1, image_size, image_size), torch.zeros(1, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter:
        model(image, index, index)
    return counter.get_total_flops() / 2


def main():
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="speed.py", description=__doc__, formatter_class=raw)
    text = "height and width of the images in pixels (32)"
    parser.add_argument("--image-size", type=int, choices=IMAGE_SIZES, default=32, help=text)
    image_size = parser.parse_args().image_size
    work, model = measured_functions(image_size)
    seconds = {name: [] for name in work}
    for i in range(ROUNDS + WARM_UP):
        for name, (function, *_) in work.items():
            start = time.perf_counter()
            function()
            if i >= WARM_UP:
                seconds[name].append(time.perf_counter() - start)
    machine = f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
    print(f"{machine}, torch {torch.__version__}")
    parameters = sum(p.numel() for p in model.parameters())
    millions = macs_of(model, image_size) / 1e6
    print(f"default network: {parameters:,} parameters, {millions:.1f} MMAC for an image")
    median = {name: statistics.median(times) for name, times in seconds.items()}
    base = work[PRODUCT][2] / median[PRODUCT]
    for name, (_, size, operations) in work.items():
        images = size / median[name]
        rate = images * operations
        each = ""
        if name != PRODUCT:
            each = f"{1e3 / images:7.2f} ms an image, {images:6.0f} images/s,"
        fraction = f"{rate / base:4.0%} of the product's rate"
        print(f"{name:30s} {each:37s} {rate / 1e9:5.0f} GFLOP/s, {fraction}")


if __name__ == "__main__":
    sys.exit(main())
