"""Our default network beside small class-conditional UNets of two libraries, in paired runs.

    pip install diffusers denoising-diffusion-pytorch
    python benchmarks/libraries.py          speed
    python benchmarks/libraries.py train    quality after equal time: takes hours

Speed, memory and start-up are measured, each time in a fresh process: it imports what it needs,
builds the network, takes training steps in float32 (forward, mean squared error, backward,
clipping, AdamW) and evaluates the network, on the same 32x32 images of 10 classes.  The three take
turns.  Printed are the medians over the rounds and, in brackets, the medians of the ratios to ours
within a round.  The libraries' networks are the smallest sensible ones; they are larger than ours,
which was designed for two cores.

`train` trains each library's network and that of ddim.py at once, scores samples of both, and
writes results/libraries/; benchmarks/peers.py says how.  A stopped run resumes, and what is in
results/libraries/ is not done again: another setting, as in `train --lr 3e-4`, adds rows.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
SUBJECTS = OURS, *LIBRARIES = ("this repository", "diffusers", "denoising-diffusion-pytorch")
BATCH, SECONDS = 64, 6.0
UNIT = 2**20 if sys.platform == "darwin" else 2**10  # of ru_maxrss: bytes or KiB, in MiB
FIGURES = {  # name: (heading, format)
    "training": ("training, images/s", ".0f"), "one": ("evaluation of 1 image, ms", ".1f"),
    "many": (f"evaluation of {BATCH}, images/s", ".0f"), "memory": ("peak memory, MiB", ".0f"),
    "start": ("import and build, s", ".2f"), "mmac": ("MMAC an image", ".0f"),
    "parameters": ("parameters", ",.0f"),
}  # fmt: skip


def build(subject, width=32):
    """predict(x_t, t, y) and the network behind it; width: channels of a library's first level."""
    import torch

    if subject == "diffusers":
        from diffusers import UNet2DModel

        network = UNet2DModel(
            32, 1, 1, block_out_channels=(width, 2 * width, 2 * width), layers_per_block=1,
            norm_num_groups=8, num_class_embeds=11,
            down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
        )  # fmt: skip
        return lambda x_t, t, y: network(x_t, t, class_labels=y).sample, network
    if subject == "denoising-diffusion-pytorch":
        from denoising_diffusion_pytorch.classifier_free_guidance import Unet

        network = Unet(width, num_classes=10, dim_mults=(1, 2, 2), channels=1, cond_drop_prob=0.1)
        network.to(memory_format=torch.channels_last)  # faster, as that of diffusers is not
        return lambda x_t, t, y: network(x_t, t, y), network
    from common import UNet

    network = UNet().to(memory_format=torch.channels_last)
    return network, network


def seconds(function):
    """Median seconds of a call, without the first two, which warm up."""
    times = []
    end = time.perf_counter() + SECONDS
    while len(times) < 5 or time.perf_counter() < end:
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return statistics.median(times[2:])


def measure(subject):
    """The figures of one subject, measured in this process."""
    start = time.perf_counter()
    predict, network = build(subject)
    figures = {"start": time.perf_counter() - start}
    figures["parameters"] = sum(p.numel() for p in network.parameters())
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    torch.manual_seed(0)
    x_t, target = torch.randn(2, BATCH, 1, 32, 32)
    t, y = torch.randint(0, 1000, (BATCH,)), torch.randint(0, 10, (BATCH,))
    optimizer = torch.optim.AdamW(network.parameters(), fused=True)

    def step():
        optimizer.zero_grad(set_to_none=True)
        (predict(x_t, t, y) - target).square().mean().backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()

    figures["training"] = BATCH / seconds(step)
    network.eval()
    with torch.no_grad():
        figures["many"] = BATCH / seconds(lambda: predict(x_t, t, y))
        figures["one"] = 1e3 * seconds(lambda: predict(x_t[:1], t[:1], y[:1]))
        with FlopCounterMode(display=False) as counter:
            predict(x_t[:1], t[:1], y[:1])
    figures["mmac"] = counter.get_total_flops() / 2e6
    figures["memory"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / UNIT
    return figures


def why(stderr):
    """The last line of what a failed process said, and what to install if a package is missing."""
    last = " ".join(stderr.strip().splitlines()[-1:])
    if last.startswith("ModuleNotFoundError"):
        last += ": pip install diffusers denoising-diffusion-pytorch"
    return last


def compare_speed(rounds):
    """Print the medians over rounds in which the subjects take turns."""
    turns = []
    for i in range(rounds):
        turn = {}
        for subject in (*SUBJECTS[i % 3 :], *SUBJECTS[: i % 3]):
            command = [sys.executable, __file__, "--subject", subject]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                print(f"libraries.py: error: {subject}: {why(done.stderr)}", file=sys.stderr)
                sys.exit(2)
            turn[subject] = json.loads(done.stdout.splitlines()[-1])
        turns.append(turn)
    import torch

    machine = f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
    print(f"medians of {rounds} rounds, in brackets over ours; ", end="")
    print(f"{machine}, torch {torch.__version__}")
    for name, (heading, digits) in FIGURES.items():
        line = f"{heading:28s}"
        for subject in SUBJECTS:
            value = statistics.median(turn[subject][name] for turn in turns)
            ratios = [turn[subject][name] / turn[OURS][name] for turn in turns]
            ratio = f" ({statistics.median(ratios):.2f})" if subject != OURS else ""
            line += f"{subject}: {value:{digits}}{ratio}   "
        print(line)


def folder(text):
    """An argparse type like infer_onnx.path_text, whose import would count in what is timed."""
    if not text:
        raise argparse.ArgumentTypeError("the name is empty")
    return os.path.abspath(os.path.expanduser(text))  # noqa: PTH100, PTH111  as in path_text


def build_parser():
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="libraries.py", description=__doc__, formatter_class=raw, allow_abbrev=False
    )
    # fmt: off
    add = parser.add_argument
    add("what", nargs="?", choices=("speed", "train"), default="speed",
        help="what is compared: speed, or quality after equal time (speed)")
    add("--rounds", type=int, default=3,
        help="of speed: number of rounds of the three, 1 or more (3)")
    add("--subject", choices=SUBJECTS, help="only measure this one, and print JSON")
    add("--job", type=json.loads, help=argparse.SUPPRESS)  # of train, in a process of its own
    add = parser.add_argument_group("train").add_argument
    add("--library", choices=LIBRARIES, help="only this one (both)")
    add("--minutes", type=float, default=20.0, help="minutes that each network trains (20)")
    add("--num-samples", type=int, default=10_000, help="samples of each, 100 or more (10000)")
    add("--width", type=int, help="channels of the library's network at its first level (32)")
    add("--batch-size", type=int, help="images in a step of the library (64)")
    add("--lr", type=float, help="the library's learning rate after the warm-up (1e-3)")
    add("--steps", type=int, help="steps of the library's sampler (15, 20)")
    add("--output", type=folder, default=ROOT / "results/libraries",
        help="folder of libraries.json and libraries.md (results/libraries)")
    add("--data-dir", type=folder, metavar="FOLDER",
        help="folder of Fashion-MNIST (data/, else Debian's folder)")
    add("--table", action="store_true", help="only write the table of libraries.json (off)")
    # fmt: on
    return parser


def main(argv=None):
    parser = build_parser()
    args = parser.parse_args(argv)
    of_speed = {"rounds", "subject"}
    of_train = vars(args).keys() - of_speed - {"what", "job"}
    for key in sorted(of_speed if args.what == "train" else of_train):
        if getattr(args, key) != parser.get_default(key):
            flag = "--" + key.replace("_", "-")
            said = f"{flag} has no meaning for {args.what} (see --help)"
            parser.exit(2, f"{parser.prog}: error: {said}\n")
    if args.subject and args.rounds != parser.get_default("rounds"):
        parser.exit(2, f"{parser.prog}: error: --subject is measured once: leave out --rounds\n")
    if args.rounds < 1:
        parser.exit(2, f"{parser.prog}: error: --rounds {args.rounds}: right is 1 or more\n")
    if args.subject:
        print(json.dumps(measure(args.subject)))
    elif args.job:
        from benchmarks import peers

        peers.work(*args.job)
    elif args.what == "speed":
        compare_speed(args.rounds)
    else:
        from benchmarks import peers

        stopped = "stopped; the same command resumes"
        return peers.infer_onnx.run_command(parser, peers.train_all, argv, stopped)
    return 0


if __name__ == "__main__":
    sys.exit(main())
