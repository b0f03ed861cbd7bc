// The sampler of web/README.md, "The sampler in words", written from that text alone; only the
// noise is that of web/sampler.js.  tests/test_web.py compares its pixels with infer_onnx.py's.
// node words.mjs FILE.onnx SOLVER SEED CLASS ...: uint8 pixels, image after image, on stdout.
import { readFileSync } from "node:fs";
import * as ort from "../web/node_modules/onnxruntime-web/dist/ort.wasm.bundle.min.mjs";
import { NoiseStream, nextNoise } from "../web/sampler.js";

ort.env.wasm.numThreads = 1;
const [path, solver, seed, ...labels] = process.argv.slice(2);
const file = readFileSync(path);
const session = await ort.InferenceSession.create(file);
const card = readCard(file);
const pixels = [];
for (const [image, label] of labels.entries()) {
  const stream = new NoiseStream(BigInt(seed), image);
  for (const value of await draw(stream, Number(label))) {
    pixels.push(Math.round((Math.min(Math.max(value, -1), 1) + 1) * 127.5));
  }
}
process.stdout.write(Uint8Array.from(pixels));

function readCard(bytes) {
  let at = bytes.indexOf("model_card") + "model_card".length + 1;
  let length = 0;
  for (let shift = 0; ; shift += 7) {
    const byte = bytes[at++];
    length += (byte & 0x7f) * 2 ** shift;
    if (byte < 0x80) break;
  }
  return JSON.parse(bytes.subarray(at, at + length).toString());
}

async function run(network, inputs) {
  return Object.values(await network.run(inputs))[0].data;
}

function tensor(values, shape) {
  return new ort.Tensor("float32", values, [1, ...shape]);
}

function whole(value) {
  return new ort.Tensor("int64", BigInt64Array.of(BigInt(value)), [1]);
}

async function draw(stream, label) {
  const { alpha_bars: alphaBars, steps, guidance } = card;
  const [low, high] = card.guidance_interval ?? [0, card.guidance_limit];
  if (card.model === "gan") {
    const classes = card.class_names.map((_, y) => Number(y === label));
    const z = tensor(nextNoise([stream], card.latent_dim), [card.latent_dim]);
    return run(session, { z, classes: tensor(Float32Array.from(classes), [classes.length]) });
  }
  const count = alphaBars.length;
  const above = alphaBars.filter((value) => value > 3e-5).length;
  const length = card.prediction === "v" ? count : above;
  const time = (i) => {
    if (i === 0) return -1;
    if (solver === "ddim") return Math.max(Math.floor(length * (i / steps) ** 1.3 + 0.5), i) - 1;
    const p = 3 * i ** 2;
    const q = (steps - i) ** 2;
    const end = Math.floor((length * p) / (p + q) + 0.5);
    return Math.max(Math.min(end, length - steps + i), i) - 1;
  };
  const isLatent = card.model === "ldm";
  const shape = isLatent ? card.latent_shape : card.image_shape;
  const half = (value) => Math.log(value / (1 - value)) / 2;
  let last;
  let x = nextNoise([stream], shape.reduce((a, b) => a * b));

  for (let i = steps; i > 0; i--) {
    const t = time(i);
    const a = alphaBars[t];
    const b = i > 1 ? alphaBars[time(i - 1)] : 1;
    const network = (y) => run(session, { x_t: tensor(x, shape), t: whole(t), y: whole(y) });
    const isOutside = guidance > 1 && !(low * count <= t && t < high * count);
    let o;
    if (guidance === 0) o = await network(card.null_label);
    else if (guidance === 1 || isOutside) o = await network(label);
    else {
      const withClass = await network(label);
      const without = await network(card.null_label);
      o = without.map((value, k) => value + guidance * (withClass[k] - value));
    }
    const signal = Math.sqrt(a);
    const noise = Math.sqrt(1 - a);
    const now = new Float32Array(x.length);
    const extrapolate = solver === "dpm++" && i < steps && i > 1;
    const step = extrapolate ? (half(b) - half(a)) / (half(a) - half(last.a)) / 2 : 0;
    x = x.map((value, k) => {
      let x0 = signal * value - noise * o[k];
      let e = signal * o[k] + noise * value;
      if (card.prediction === "eps") {
        x0 = (value - noise * o[k]) / signal;
        e = o[k];
      }
      if (!isLatent) {
        x0 = Math.min(Math.max(x0, -1), 1);
        e = (value - signal * x0) / noise;
      }
      now[k] = x0;
      if (extrapolate) {
        x0 += step * (x0 - last.x0[k]);
        e = (value - signal * x0) / noise;
      }
      return Math.sqrt(b) * x0 + Math.sqrt(1 - b) * e;
    });
    last = { a, x0: now };
  }
  if (!isLatent) return x;
  const size = shape[1] * shape[2];
  const z = x.map((value, k) => {
    const channel = Math.floor(k / size);
    return value * card.latent_std[channel] + card.latent_mean[channel];
  });
  const file = path.replace(".onnx", "_decoder.onnx");
  const decoder = await ort.InferenceSession.create(readFileSync(file));
  return run(decoder, { z: tensor(z, shape) });
}
