"""Which runtimes read the exported files, and how far their outputs are from those at the export.

    python benchmarks/clients.py --python A/bin/python --python B/bin/python --node C

Each A, B is a virtual environment with onnxruntime, openvino or tract, C a folder with
onnxruntime-node and onnxruntime-web.  This environment adds the checker and the reference
implementation of onnx.  Writes results/clients.md.  The files are those in pretrained/, and
*_sampler.onnx in this folder, which export.py --sampler makes.  Each is compared with a copy whose
weights are stored as float32: its outputs, the time to load it and the time of a run.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import onnx

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import infer_onnx
from benchmarks.report import as_table, write_text

ROOT = Path(infer_onnx.__file__).resolve().parent

# Each client reads {"paths", "kind", "rounds", "inputs": {name: [type, shape, numbers]}}, loads and
# runs the files in turns, and prints {"name", and for each file "outputs": numbers, and "seconds":
# medians of the times to load it and to run it}.
PYTHON = """
import json, statistics, sys, time
import numpy as np
request = json.load(sys.stdin)
feed = {k: np.array(v, t).reshape(s) for k, (t, s, v) in request["inputs"].items()}

def opened(path):
    if request["kind"] == "reference":
        import onnx.reference
        session = onnx.reference.ReferenceEvaluator(path)
        return lambda: session.run(None, feed)[0], f"onnx.reference {onnx.__version__}"
    if request["kind"] == "checker":
        import onnx
        onnx.checker.check_model(path, full_check=True)
        return lambda: None, f"onnx.checker {onnx.__version__}"
    try:
        import onnxruntime as ort
        session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
        return lambda: session.run(None, feed)[0], f"onnxruntime {ort.__version__}"
    except ImportError:
        pass
    try:
        import openvino
        exact = {"INFERENCE_PRECISION_HINT": "f32"}  # else bfloat16 where the CPU has it
        network = openvino.Core().compile_model(path, "CPU", exact)
        name = f"OpenVINO {openvino.__version__.split('-')[0]} in float32"
        return lambda: network(feed)[0], name
    except ImportError:
        import tract
        network = tract.onnx().load(path)
        inputs = [feed[network.input_name(i)] for i in range(network.input_count())]
        runnable = network.into_model().into_runnable()
        return lambda: runnable.run(inputs)[0].to_numpy(), f"tract {tract.version()}"

def timed(function):
    start = time.perf_counter()
    result = function()
    return time.perf_counter() - start, result

def medians(functions, rounds):
    turns = [[timed(function)[0] for function in functions] for _ in range(rounds)]
    return [statistics.median(times) for times in zip(*turns)]

runs, names = zip(*map(opened, request["paths"]))  # the first time of each is not timed
outputs = [run() for run in runs]
loads = medians([lambda path=path: opened(path) for path in request["paths"]], 3)
seconds = [*zip(loads, medians(runs, request["rounds"]))]
outputs = [None if x is None else np.asarray(x).ravel().tolist() for x in outputs]
print(json.dumps({"name": names[0], "outputs": outputs, "seconds": seconds}))
"""
NODE = """
import { readFileSync } from "node:fs";
import * as ort from "PACKAGE";
const { paths, rounds, inputs } = JSON.parse(readFileSync(0, "utf8"));
if (ort.env.wasm) ort.env.wasm.numThreads = 1;
const feed = {};
for (const [name, [type, shape, values]] of Object.entries(inputs)) {
  const data = type === "int64" ? BigInt64Array.from(values, BigInt)
    : type === "bool" ? Uint8Array.from(values) : Float32Array.from(values);
  feed[name] = new ort.Tensor(type, data, shape);
}
async function medians(functions, rounds) {
  const times = functions.map(() => []);
  for (let i = 0; i < rounds; i++) {
    for (const [j, call] of functions.entries()) {
      const start = performance.now();
      await call();
      times[j].push((performance.now() - start) / 1000);
    }
  }
  return times.map((values) => values.sort((a, b) => a - b)[Math.floor(rounds / 2)]);
}
const files = paths.map((path) => readFileSync(path));
const open = (file) => ort.InferenceSession.create(file, { logSeverityLevel: 4 });
const sessions = [await open(files[0]), await open(files[1])]; // the first time is not timed
const outputs = [];
for (const session of sessions) {
  const results = await session.run(feed);
  outputs.push([...results[session.outputNames[0]].data]);
}
const loads = await medians(files.map((file) => () => open(file)), 3);
const runs = await medians(sessions.map((session) => () => session.run(feed)), rounds);
const seconds = loads.map((load, j) => [load, runs[j]]);
console.log(JSON.stringify({ name: `VERSION`, outputs, seconds }));
"""
ROUNDS = 31  # runs of each file that are timed


def store_as_float32(path, folder):
    """A copy of a file whose weights are stored as float32: export.store_as_float16 undone."""
    model = onnx.load(path)
    casts = {node.input[0]: node for node in model.graph.node if node.op_type == "Cast"}
    for tensor in model.graph.initializer:
        value = onnx.numpy_helper.to_array(tensor)
        if value.dtype == np.float16:
            cast = casts[tensor.name]
            wide = value.astype(np.float32)
            tensor.CopyFrom(onnx.numpy_helper.from_array(wide, cast.output[0]))
            model.graph.node.remove(cast)
    copy = Path(folder, path.name)
    onnx.save(model, copy)
    return copy


def probes(path):
    """What a file is probed with, from its card or that of the model it is a part of.

    Returns (inputs {name: array}, expected output).
    """
    stem, _, part = path.stem.partition("_")
    if part == "sampler":
        stem, part = path.stem, ""
    model = infer_onnx.load_model(path.with_name(f"{stem}.onnx"), "cpu")
    card = model.card
    session = model.parts[part] if part else model.session
    probe = card["parts"][part] if part else card["probe"]
    if card["kind"] == "sampler":
        shape = card.get("latent_shape") or card["image_shape"]
        inputs = {
            "noise": infer_onnx.next_noise(infer_onnx.noise_streams(0, [0]), shape),
            "labels": np.array([probe["y"]], np.int64),
            "steps": np.array(card["steps"], np.int64),
            "guidance": np.array(card["guidance"], np.float32),
            "guidance_interval": np.array(card["guidance_interval"], np.float32),
            "second_order": np.array(card.get("solver") == "dpm++"),
        }  # fmt: skip
        given = {given.name for given in session.get_inputs()}  # a student's: the first two
        inputs = {name: array for name, array in inputs.items() if name in given}
    else:
        shapes = {given.name: given.shape[1:] for given in session.get_inputs()}
        inputs = infer_onnx.part_inputs(shapes, card["probe"], len(card["class_names"]))
    return inputs, np.array(probe["output"], np.float32)


def ask(command, request, folder):
    """The client's answer, or {"error": its last line}."""
    env = {**os.environ, "ORT_DISABLE_TELEMETRY": "1"}
    done = subprocess.run(
        command, input=json.dumps(request), cwd=folder, env=env, capture_output=True, text=True
    )
    if done.returncode:
        return {"error": (done.stderr.strip() or "no output").splitlines()[-1]}
    return json.loads(done.stdout.splitlines()[-1])


def clients_of(args):
    """[(command, kind, folder)] of all clients."""
    this = [sys.executable, "-c", PYTHON]
    clients = [(this, "checker", None), (this, "reference", None)]
    clients += [([python, "-c", PYTHON], "", None) for python in args.python]
    for folder in args.node:
        for package in ("onnxruntime-node", "onnxruntime-web"):
            file = folder / "node_modules" / package / "package.json"
            if not file.is_file():
                raise infer_onnx.InputError(f"--node {folder}: {file} is missing")
            about = json.loads(file.read_text())
            entry = package if package.endswith("node") else f"{package}/wasm"
            code = NODE.replace("PACKAGE", entry).replace(
                "VERSION", f"{package} {about['version']}"
            )
            clients.append((["node", "--input-type=module", "-e", code], "", folder))
    return clients


def largest_difference(a, b):
    return np.abs(np.array(a, np.float64) - np.array(b, np.float64)).max()


def cells(answer, expected, unit):
    """What the two tables say of an answer; unit: of the difference, which is whole with one."""
    if "error" in answer:
        return "fails", "fails"
    (small, wide), seconds = answer["outputs"], answer["seconds"]
    if small is None:
        return "valid", "valid"
    difference = largest_difference(small[: len(expected)], expected)
    found = f"{difference:.0f} {unit}{'s' * (difference != 1)}" if unit else f"{difference:.0e}"
    load, run = (ours / theirs for ours, theirs in zip(*seconds, strict=True))
    difference = largest_difference(small, wide)
    return found, f"{difference:.0e} ({load:.2f}, {run:.2f})".replace("0e+00", "0")


def build_parser():
    parser = infer_onnx.Parser(prog="clients.py", description=__doc__)
    add = parser.add_argument
    # fmt: off
    add("--python", action="append", default=[], metavar="FILE",
        help="the Python of an environment with onnxruntime or openvino; may be repeated (none)")
    add("--node", action="append", default=[], type=infer_onnx.file_path, metavar="FOLDER",
        help="a folder whose node_modules has onnxruntime-node and onnxruntime-web (none)")
    # fmt: on
    return parser


def run(args):
    """Ask all clients for the outputs of all files, and write the table."""
    if not args.python or not args.node:
        raise infer_onnx.InputError("name at least one --python and one --node to compare")
    clients = clients_of(args)
    files = sorted((ROOT / "pretrained").glob("*.onnx"))
    files = [path for path in files if not path.stem.startswith("extractor")]
    files += [path.resolve() for path in sorted(Path().glob("*_sampler.onnx"))]
    tables = [[[""] for _ in clients] for _ in range(2)]  # each client's name, then its cells
    with tempfile.TemporaryDirectory() as scratch:
        for path in files:
            inputs, expected = probes(path)
            listed = {
                key: [value.dtype.name, value.shape, value.ravel().tolist()]
                for key, value in inputs.items()
            }
            paths = [str(path), str(store_as_float32(path, scratch))]
            unit = "grey level" if "noise" in inputs else ""
            for i, (command, kind, folder) in enumerate(clients):
                rounds = 1 if kind or unit else ROUNDS
                request = {"paths": paths, "kind": kind, "rounds": rounds, "inputs": listed}
                answer = ask(command, request, folder)
                if "error" in answer:
                    print(f"{path.name}: client {i}: {answer['error']}", file=sys.stderr)
                for rows, text in zip(tables, cells(answer, expected, unit), strict=True):
                    rows[i][0] = answer.get("name", rows[i][0])
                    rows[i].append(text)
    head = ["client", *(f"`{path.name}`" for path in files)]
    first, second = (as_table(head, rows).strip() for rows in tables)
    text = f"# Clients\n\n{NOTE}\n\n{first}\n\n## Weights as float16\n\n{HALF}\n\n{second}\n"
    write_text(text, ROOT / "results" / "clients.md")
    print(text)


NOTE = """Made by `python benchmarks/clients.py --python ... --node ...`: the largest difference of
each runtime's outputs from those of torch at the export, for the inputs of the file's probe; for a
sampler as one graph, that of the pixels of an image. valid: the checker finds no fault, shapes and
types included."""
HALF = """The files store their weights as float16. Beside a copy that stores the same weights as
float32: the largest difference of the outputs and, in brackets, the time to load the file and that
of a run over those of the copy, in turns in one process (medians of 3 loads and 31 runs; a
sampler and the reference run once)."""


def main(argv=None):
    return infer_onnx.run_command(build_parser(), run, argv)


if __name__ == "__main__":
    sys.exit(main())
