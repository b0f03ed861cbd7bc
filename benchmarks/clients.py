"""Which runtimes read the exported files, and how far their outputs are from those at the export.

    python benchmarks/clients.py --python A/bin/python --python B/bin/python --node C

Each A, B is a virtual environment with onnxruntime or openvino, C a folder with onnxruntime-node
and onnxruntime-web.  This environment adds the checker and the reference implementation of onnx.
Writes results/clients.md.  The files are those in pretrained/, and *_sampler.onnx in this folder,
which export.py --sampler makes.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import infer_onnx
from benchmarks.report import as_table, write_text

ROOT = Path(infer_onnx.__file__).resolve().parent

# Each client reads {"path", "inputs": {name: [type, shape, numbers]}} from stdin and prints
# {"name", "output": numbers}.
PYTHON = """
import json, sys
import numpy as np
request = json.load(sys.stdin)
feed = {k: np.array(v, t).reshape(s) for k, (t, s, v) in request["inputs"].items()}
kind = request["kind"]
if kind == "reference":
    import onnx.reference
    output = onnx.reference.ReferenceEvaluator(request["path"]).run(None, feed)[0]
    name = f"onnx.reference {onnx.__version__}"
elif kind == "checker":
    import onnx
    onnx.checker.check_model(request["path"], full_check=True)
    output, name = None, f"onnx.checker {onnx.__version__}"
else:
    try:
        import onnxruntime
        session = onnxruntime.InferenceSession(request["path"], providers=["CPUExecutionProvider"])
        output, name = session.run(None, feed)[0], f"onnxruntime {onnxruntime.__version__}"
    except ImportError:
        import openvino
        exact = {"INFERENCE_PRECISION_HINT": "f32"}  # else bfloat16 where the CPU has it
        network = openvino.Core().compile_model(request["path"], "CPU", exact)
        output, name = network(feed)[0], f"OpenVINO {openvino.__version__.split('-')[0]} in float32"
output = None if output is None else np.asarray(output).ravel().tolist()
print(json.dumps({"name": name, "output": output}))
"""
NODE = """
import { readFileSync } from "node:fs";
import * as ort from "PACKAGE";
const { path, inputs } = JSON.parse(readFileSync(0, "utf8"));
if (ort.env.wasm) ort.env.wasm.numThreads = 1;
const feed = {};
for (const [name, [type, shape, values]] of Object.entries(inputs)) {
  const data = type === "int64" ? BigInt64Array.from(values, BigInt)
    : type === "bool" ? Uint8Array.from(values) : Float32Array.from(values);
  feed[name] = new ort.Tensor(type, data, shape);
}
const session = await ort.InferenceSession.create(readFileSync(path), { logSeverityLevel: 4 });
const results = await session.run(feed);
const output = [...results[session.outputNames[0]].data];
console.log(JSON.stringify({ name: `VERSION`, output }));
"""


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


def cell(answer, expected, unit):
    """What the table says of an answer; unit: of the difference, which is whole with one."""
    if "error" in answer:
        return "fails"
    if answer["output"] is None:
        return "valid"
    found = np.array(answer["output"], np.float64)[: len(expected)]
    difference = np.abs(found - expected).max()
    return f"{difference:.0f} {unit}" if unit else f"{difference:.0e}"


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
    rows = [[""] for _ in clients]  # the name of each, then a cell for each file
    for path in files:
        inputs, expected = probes(path)
        listed = {
            key: [value.dtype.name, value.shape, value.ravel().tolist()]
            for key, value in inputs.items()
        }
        for i, (command, kind, folder) in enumerate(clients):
            request = {"path": str(path), "kind": kind, "inputs": listed}
            answer = ask(command, request, folder)
            if "error" in answer:
                print(f"{path.name}: client {i}: {answer['error']}", file=sys.stderr)
            rows[i][0] = answer.get("name", rows[i][0])
            unit = "grey levels" if "noise" in inputs else ""
            rows[i].append(cell(answer, expected, unit))
    head = ["client", *(f"`{path.name}`" for path in files)]
    table = as_table(head, rows)
    text = f"# Clients\n\n{NOTE}\n\n{table.strip()}\n"
    write_text(text, ROOT / "results" / "clients.md")
    print(text)


NOTE = """Made by `python benchmarks/clients.py --python ... --node ...`: the largest difference of
each runtime's outputs from those of torch at the export, for the inputs of the file's probe; for a
sampler as one graph, that of the pixels of an image. valid: the checker finds no fault, shapes and
types included."""


def main(argv=None):
    return infer_onnx.run_command(build_parser(), run, argv)


if __name__ == "__main__":
    sys.exit(main())
