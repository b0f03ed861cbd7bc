"""Time of a network evaluation and of whole images at several batch sizes, without torch.

    python benchmarks/latency.py --model gan
    python benchmarks/latency.py --model ddim --steps 10 --solver dpm++ --provider cpu

Prints the median of ten evaluations after two that warm up, and the rate at which images are
sampled with the given flags.
"""

import statistics
import sys
import time
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import infer_onnx


def seconds(function):
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def measure(args):
    path = infer_onnx.find_model(args.model)
    model = infer_onnx.load_model(path, args.provider, args.threads, args.tf32)
    card = model.card
    if card["kind"] == "sampler":
        raise infer_onnx.InputError(f"{path} is a sampler as one graph: name the model itself")
    options = infer_onnx.sampling_options(args, card)
    shapes = {given.name: given.shape[1:] for given in model.session.get_inputs()}
    print(f"running on {model.where}")
    print(
        "batch  ms per evaluation  ms per evaluation and image  images/s "
        f"({infer_onnx.evaluations(card, **options)} evaluations each)"
    )
    for batch in (1, 4, 16, 64):
        inputs = infer_onnx.part_inputs(shapes, card["probe"], len(card["class_names"]), batch)
        labels = [card["probe"]["y"]] * batch
        evaluate = partial(infer_onnx.run_session, model.session, **inputs)
        sample = partial(infer_onnx.sample, model, labels, batch_size=batch, **options)
        ms = 1e3 * statistics.median([seconds(evaluate) for _ in range(12)][2:])
        rate = batch / statistics.median([seconds(sample) for _ in range(4)][1:])
        print(f"{batch:5d}  {ms:17.2f}  {ms / batch:27.2f}  {rate:8.1f}")


def build_parser():
    parser = infer_onnx.Parser(prog="latency.py", description=__doc__)
    infer_onnx.add_model_flags(parser)
    return parser


def main(argv=None):
    return infer_onnx.run_command(build_parser(), measure, argv)


if __name__ == "__main__":
    sys.exit(main())
