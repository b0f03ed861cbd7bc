/* Sample from an exported model with onnxruntime-web: what infer_onnx.py does, in JavaScript.

   It touches no page, so that node can run it too. The functions and, but for the spelling, most of
   their names are those of infer_onnx.py. The same seed gives the same picture: noise is NumPy's,
   number for number, and arithmetic rounds where NumPy's does, so that the pictures of the two
   differ by one grey level at most.

   Arrays are Float32Array, images (B, C, H, W) in [-1, 1]. Numbers that NumPy computes in float64,
   such as sqrt(alpha_bar_t), are plain numbers here. */

const METADATA_KEY = "model_card"; // of the metadata entry whose JSON says how to use the model
const METADATA_FORMAT = 5;
const SEAL_BYTES = 12 + 64; // see isSealed
const CARD_KEYS = ["model", "kind", "class_names", "image_shape", "parts"];
const DIFFUSION_OPTIONS = ["steps", "guidance", "guidance_interval"]; // defaults are in the card
const KIND_KEYS = {
  diffusion: ["null_label", "alpha_bars", "prediction", "guidance_fixed", ...DIFFUSION_OPTIONS],
  codes: ["latent_dim", "prior"], // decodes a latent code: VAE and GAN
};
// The options of sample() that each model has here; infer_onnx.py has more.
export const MODEL_OPTIONS = {
  ddim: [...DIFFUSION_OPTIONS, "solver"],
  ddpm: DIFFUSION_OPTIONS,
  ldm: [...DIFFUSION_OPTIONS, "solver"],
  distill: ["steps"], // and only those that it was trained for
  vae: [],
  gan: [],
};
const NEEDED_PARTS = ["decoder"]; // of the parts that a card names; a VAE's encoder samples nothing
export const SOLVERS = ["ddim", "dpm++"];
export const MAX_SEED = 2n ** 63n - 1n;

const f32 = Math.fround;
const size = (shape) => shape.reduce((a, b) => a * b, 1);

/** The model file cannot be used; the message is one line. */
export class ModelError extends Error {}

/** Wrong input from the user; the message is one line. */
export class InputError extends Error {}

/** The model ran and failed; the message is one line. */
export class RunError extends Error {}

// --- Model ---------------------------------------------------------------------------------------

/** Check and open a model file and the files of its parts. Returns a model.

    ort: the module onnxruntime-web;  name: of the file, for messages;  bytes: Uint8Array;
    readPart: async (file name) -> its bytes, for the decoder of an LDM.
    The model is {ort, card, session, parts, sealed, prior}.  Throws ModelError. */
export async function loadModel(ort, name, bytes, readPart) {
  const sealed = await checkFile(name, bytes);
  const session = await openSession(ort, name, bytes).catch((error) => {
    throw sealed || error instanceof RunError ? error : damaged(name);
  });
  const parts = {};
  try {
    if (!sealed && "sha256" in readMetadata(bytes)) throw damaged(name); // a seal in a wrong place
    const card = readCard(name, bytes);
    for (const [key, part] of Object.entries(card.parts)) {
      if (!NEEDED_PARTS.includes(key)) continue;
      const content = await readPart(part.file);
      await checkFile(part.file, content);
      const digest = await sha256(content);
      if (digest !== null && digest !== part.sha256) {
        const remedy = "export both again, or seal them together with export.py seal";
        throw new ModelError(`${part.file} is not the ${key} of ${name}: ${remedy}`);
      }
      parts[key] = await openSession(ort, part.file, content);
    }
    return { ort, card, session, parts, sealed, prior: fittedPrior(card) };
  } catch (error) {
    for (const opened of [session, ...Object.values(parts)]) opened.release(); // free their memory
    throw error;
  }
}

/** Throw ModelError unless the bytes have the right seal, or none, as other tools write them.

    Returns whether they have it. */
async function checkFile(name, bytes) {
  const start = new TextDecoder("latin1").decode(bytes.subarray(0, 30));
  if (start.startsWith("version https://git-lfs")) {
    throw new ModelError(`${name} is a Git LFS pointer, not the model itself: run git lfs pull`);
  }
  if (start.startsWith("PK")) {
    throw new ModelError(`${name} is a checkpoint or an archive: export it with export.py`);
  }
  if (await isSealed(bytes)) return true;
  const tail = new TextDecoder("latin1").decode(bytes.subarray(-SEAL_BYTES - 10));
  if (tail.includes("\x06sha256") || /[0-9a-f]{64}$/.test(tail)) throw damaged(name);
  return false;
}

function damaged(name) {
  return new ModelError(
    `${name} is damaged, or not a file that export.py wrote: export it again ` +
      "(if you changed it: python export.py seal FILE)",
  );
}

/** Whether a file ends with one more metadata entry: the SHA-256 of all that comes before it.

    The entry is field 14 (metadata) of 74 bytes; its key is "sha256", its value has 64 bytes.
    onnxruntime does not detect corrupted weights: one wrong bit would change images silently. */
async function isSealed(bytes) {
  const end = bytes.length - SEAL_BYTES;
  const seal = new TextDecoder("latin1").decode(bytes.subarray(Math.max(end, 0)));
  if (!seal.startsWith("\x72\x4a\x0a\x06sha256\x12\x40")) return false;
  const digest = await sha256(bytes.subarray(0, end));
  return digest === null || seal.endsWith(digest);
}

/** SHA-256 in hexadecimal; null where the browser has none: http:// that is not localhost. */
async function sha256(bytes) {
  if (!globalThis.crypto?.subtle) return null;
  const digest = new Uint8Array(await crypto.subtle.digest("SHA-256", bytes));
  return Array.from(digest, (byte) => byte.toString(16).padStart(2, "0")).join("");
}

async function openSession(ort, name, bytes) {
  try {
    return await ort.InferenceSession.create(bytes, { logSeverityLevel: 4 });
  } catch (error) {
    if (error?.message?.includes("no available backend")) { // it never tries a second time
      throw new RunError("onnxruntime-web does not start here: reload this page");
    }
    throw new ModelError(
      `${name} is not an ONNX model that onnxruntime can load: ${oneLine(error)}`,
    );
  }
}

/** {key: value} of the metadata of an ONNX file, for which onnxruntime-web has no function.

    The file is a protobuf message: fields one after another, each a tag (8 * number + wire type)
    and a value. Field 14 is an entry of the metadata, a message of key (1) and value (2). */
export function readMetadata(bytes) {
  const metadata = {};
  for (const [number, entry] of fields(bytes)) {
    if (number !== 14) continue;
    const pair = Object.fromEntries(fields(entry));
    metadata[new TextDecoder().decode(pair[1])] = new TextDecoder().decode(pair[2]);
  }
  return metadata;
}

/** [number, bytes] of each field of a protobuf message that has a length; others are skipped. */
function* fields(bytes) {
  let at = 0;
  const varint = () => {
    let value = 0;
    for (let scale = 1; ; scale *= 128) {
      if (at >= bytes.length) throw new RangeError("a field beyond its end");
      const byte = bytes[at++];
      value += (byte & 127) * scale; // no shift: those are of 32 bits
      if (byte < 128) return value;
    }
  };
  while (at < bytes.length) {
    const tag = varint();
    const wireType = tag % 8;
    if (wireType === 0) varint();
    else if (wireType === 1) at += 8;
    else if (wireType === 5) at += 4;
    else if (wireType === 2) {
      const length = varint();
      if (at + length > bytes.length) throw new RangeError("a field beyond its end");
      yield [Math.floor(tag / 8), bytes.subarray(at, at + length)];
      at += length;
    } else throw new RangeError(`wire type ${wireType}`);
  }
}

/** The model card, JSON in the metadata. Throws ModelError if it is absent, broken or newer. */
export function readCard(name, bytes) {
  let card;
  try {
    const text = readMetadata(bytes)[METADATA_KEY];
    if (text === undefined) {
      const [, whole] = /^(.+)_(?:decoder|encoder)\.onnx$/.exec(name) ?? [];
      throw new ModelError(
        whole
          ? `${name} is a part of ${whole}.onnx: open that file, of ldm both at once`
          : `${name} is an ONNX model, but not one that export.py wrote`,
      );
    }
    card = JSON.parse(text);
    if (typeof card !== "object" || card === null) throw new TypeError("the card is no object");
    if (card.format === 4 && "guidance_limit" in card) { // the interval was [0, limit] then
      card.guidance_interval = [0, card.guidance_limit];
      delete card.guidance_limit;
      if (MODEL_OPTIONS[card.model]?.includes("solver")) card.solver = "ddim";
    }
  } catch (error) {
    if (error instanceof ModelError) throw error;
    throw new ModelError(`${name} has broken metadata: ${oneLine(error)}`);
  }
  if (![4, METADATA_FORMAT].includes(card.format)) {
    throw new ModelError(
      `${name} has metadata format ${card.format}, this page reads 4 and ${METADATA_FORMAT}: ` +
        (card.format > METADATA_FORMAT ? "update the page" : "export it again"),
    );
  }
  if (card.kind === "sampler") {
    throw new ModelError(`${name} is a sampler as one graph: open what it was made from`);
  }
  const solver = MODEL_OPTIONS[card.model]?.includes("solver") ? ["solver"] : [];
  const keys = [...CARD_KEYS, ...(KIND_KEYS[card.kind] ?? []), ...solver];
  const missing = keys.find((key) => !(key in card));
  if (missing) throw new ModelError(`${name}: no ${missing} in its metadata`);
  if (!(card.kind in KIND_KEYS) || !(card.model in MODEL_OPTIONS)) {
    throw new ModelError(`${name}: unknown kind ${card.kind} or model ${card.model}`);
  }
  if (solver.length && !SOLVERS.includes(card.solver)) {
    throw new ModelError(`${name}: unknown solver ${card.solver}`);
  }
  for (const [key, isRight] of Object.entries(valuesOf(card))) {
    if (!isRight) throw new ModelError(`${name}: cannot use the ${key} in its metadata`);
  }
  return card;
}

/** Whether the values of a card are such as export.py writes: {key: boolean}.

    Others would be sampled wrongly, or end in an error that says nothing. */
function valuesOf(card) {
  const all = (values, type) =>
    Array.isArray(values) && values.every((value) => typeof value === type);
  const isCount = (value, most) => Number.isInteger(value) && value >= 1 && value <= most;
  const { class_names, image_shape, value_range = [-1, 1], parts } = card;
  const needed = { ldm: ["decoder"], vae: ["encoder"] }[card.model] ?? [];
  const right = {
    class_names: all(class_names, "string") && class_names.length > 0,
    image_shape: all(image_shape, "number") && image_shape.length === 3,
    value_range: String(value_range) === "-1,1",
    parts: all(Object.values(parts ?? [0]).map((part) => part?.file), "string") &&
      needed.every((part) => part in Object(parts)),
    training: typeof (card.training ?? {}) === "object",
  };
  if (card.kind === "codes") {
    const isLength = isCount(card.latent_dim, 1e6);
    return { ...right, latent_dim: isLength, prior: isLength && isPrior(card) };
  }
  const alphaBars = all(card.alpha_bars, "number") ? card.alpha_bars : [];
  const falls = [...alphaBars, 0].every((value, i) => value < (alphaBars[i - 1] ?? 1));
  const interval = card.guidance_interval;
  if (card.model === "ldm") {
    const { latent_shape, latent_mean, latent_std } = card;
    right.latent_shape = all(latent_shape, "number") && latent_shape.length === 3;
    right.latent_mean = all(latent_mean, "number") && latent_mean.length === latent_shape?.[0];
    right.latent_std = all(latent_std, "number") && latent_std.length === latent_shape?.[0];
  }
  return {
    ...right,
    prediction: ["eps", "v"].includes(card.prediction),
    alpha_bars: falls && alphaBars.length > 0,
    guidance_interval: all(interval, "number") && interval.length === 2
      && interval[0] >= 0 && interval[0] <= interval[1] && interval[1] <= 1,
    steps: isCount(card.steps, alphaBars.length),
    guidance: typeof card.guidance === "number" && card.guidance >= 0 && card.guidance <= 1000,
    null_label: Number.isInteger(card.null_label),
  };
}

/** Whether a card's prior, if it has one, gives each class its Gaussians. */
function isPrior(card) {
  try {
    const prior = fittedPrior(card);
    if (prior === null) return card.prior === null;
    const { components, total, weights, means, scales } = prior;
    const [D, classes] = [card.latent_dim, card.class_names.length];
    return (
      weights.length === classes * components &&
      prior.first.length === classes &&
      means.length === total * D &&
      scales.length === (total * D * (D + 1)) / 2
    );
  } catch {
    return false;
  }
}

// --- Denoise -------------------------------------------------------------------------------------

/** The first output of a session for named inputs {name: [array, dims]}: Float32Array. */
async function runSession(ort, session, inputs) {
  const feed = {};
  for (const [name, [array, dims]] of Object.entries(inputs)) {
    const type = array instanceof BigInt64Array ? "int64" : "float32";
    feed[name] = new ort.Tensor(type, array, dims);
  }
  try {
    const outputs = await session.run(feed);
    return outputs[session.outputNames[0]].data;
  } catch (error) {
    throw new RunError(`onnxruntime failed: ${oneLine(error)}`);
  }
}

/** denoise(x_t, t) -> network output, with classifier-free guidance (Ho & Salimans 2022).

    output = output_u + guidance * (output_c - output_u), where u is without a class and c is with
    class y, labels (B);  start, stop: of guidedTimes; at other t, guidance above 1 is 1. */
function denoiser(model, labels, shape, guidance, start, stop) {
  const nullLabels = labels.map(() => model.card.null_label);

  function network(x_t, t, y) {
    return runSession(model.ort, model.session, {
      x_t: [x_t, [y.length, ...shape]],
      t: [new BigInt64Array(y.length).fill(BigInt(t)), [y.length]],
      y: [BigInt64Array.from(y, BigInt), [y.length]],
    });
  }

  return async function denoise(x_t, t) {
    if (!isGuided(guidance, t, start, stop)) {
      return network(x_t, t, guidance === 0 ? nullLabels : labels);
    }
    const twice = new Float32Array(2 * x_t.length);
    twice.set(x_t);
    twice.set(x_t, x_t.length);
    const outputs = await network(twice, t, [...nullLabels, ...labels]);
    const output_u = outputs.subarray(0, x_t.length);
    const output_c = outputs.subarray(x_t.length);
    return combine(1, output_u, guidance, combine(1, output_c, -1, output_u));
  };
}

/** Whether step t needs the network both with a class and without it. */
function isGuided(guidance, t, start, stop) {
  return guidance !== 0 && guidance !== 1 && (guidance < 1 || (start <= t && t < stop));
}

// --- Walk ----------------------------------------------------------------------------------------

/** a * x + b * y for numbers a, b and arrays x, y: each operation is rounded to float32. */
function combine(a, x, b, y) {
  const [a32, b32] = [f32(a), f32(b)];
  return x.map((value, i) => f32(a32 * value) + f32(b32 * y[i])); // stored, the sum is rounded too
}

/** x / a for an array x and a number a, in float32. */
function divide(x, a) {
  const a32 = f32(a);
  return x.map((value) => value / a32);
}

function clipped(x) {
  return x.map((value) => Math.min(Math.max(value, -1), 1)); // NaN stays
}

/** How many timesteps, counted from t = 0, a walk covers: all, or fewer where eps is predicted.

    x_0_hat divides by sqrt(alpha_bar_t): at the end of the cosine schedule an error of eps_hat
    would count 20,000 times.  There a walk starts at the largest t with alpha_bar above 3e-5. */
export function walkLength(card) {
  if (card.prediction !== "eps") return card.alpha_bars.length;
  return card.alpha_bars.filter((alpha_bar) => alpha_bar > 3e-5).length;
}

/** [[t, t_prev], ..., [t, -1]]: exactly `steps` pairs from t = T-1 down, closer near the image.

    t + 1 = T * (i / steps)^1.3 for i = steps ... 1, but at least i, so that all differ. */
export function timePairs(numTimesteps, steps) {
  if (!Number.isInteger(steps) || steps < 1 || steps > numTimesteps) {
    throw new InputError(`steps ${steps} is not a whole number from 1 to ${numTimesteps}`);
  }
  const times = [];
  for (let i = steps; i > 0; i--) {
    times.push(Math.max(Math.floor(numTimesteps * (i / steps) ** 1.3 + 0.5), i) - 1);
  }
  return times.map((t, k) => [t, times[k + 1] ?? -1]);
}

/** Pairs like those of timePairs, but closer near noise, too: for dpmSample.

    t + 1 = T * 3 i^2 / (3 i^2 + (steps - i)^2) for i = steps ... 1, shifted so that all differ:
    in the cosine schedule nearer to even in log SNR. */
export function dpmPairs(numTimesteps, steps) {
  if (!Number.isInteger(steps) || steps < 1 || steps > numTimesteps) {
    throw new InputError(`steps ${steps} is not a whole number from 1 to ${numTimesteps}`);
  }
  const times = [];
  for (let i = steps; i > 0; i--) {
    const noise = 3 * i ** 2;
    const signal = (steps - i) ** 2;
    const end = (2 * numTimesteps * noise + noise + signal) / (2 * (noise + signal));
    times.push(Math.max(Math.min(Math.floor(end), numTimesteps - steps + i), i) - 1);
  }
  return times.map((t, k) => [t, times[k + 1] ?? -1]);
}

/** [start, stop]: the timesteps start <= t < stop at which guidance above 1 acts.

    interval: [low, high], fractions of T.  Throws InputError unless 0 <= low <= high <= 1. */
function guidedTimes([low, high], numTimesteps) {
  if (!(0 <= low && low <= high && high <= 1)) {
    throw new InputError(`guidance interval ${low} ${high}: right is 0 <= LOW <= HIGH <= 1`);
  }
  return [low * numTimesteps, high * numTimesteps];
}

/** x_0_hat and eps_hat, the image and the noise that a network output stands for.

    eps   x_0_hat = (x_t - sqrt(1 - alpha_bar_t) * eps) / sqrt(alpha_bar_t)   DDPM (15)
    v     x_0_hat = sqrt(alpha_bar_t) * x_t - sqrt(1 - alpha_bar_t) * v       Salimans & Ho 2022
    With clip, x_0_hat is limited to [-1, 1] and eps_hat derived again: both still make up x_t. */
function predictX0AndEps(output, x_t, prediction, alpha_bar_t, clip) {
  const signal_t = Math.sqrt(alpha_bar_t);
  const noise_t = Math.sqrt(1 - alpha_bar_t);
  let x_0_hat;
  let eps_hat;
  if (prediction === "eps") {
    x_0_hat = divide(combine(1, x_t, -noise_t, output), signal_t);
    eps_hat = output;
  } else {
    x_0_hat = combine(signal_t, x_t, -noise_t, output);
    eps_hat = combine(signal_t, output, noise_t, x_t);
  }
  if (clip) {
    x_0_hat = clipped(x_0_hat);
    eps_hat = divide(combine(1, x_t, -signal_t, x_0_hat), noise_t);
  }
  return [x_0_hat, eps_hat];
}

/** One reverse step, DDIM eq. (12) with sigma_t = 0: no noise is added. */
function ddimStep(x_0_hat, eps_hat, alpha_bar_prev) {
  return combine(Math.sqrt(alpha_bar_prev), x_0_hat, Math.sqrt(1 - alpha_bar_prev), eps_hat);
}

/** Walk from noise to images.

    denoise: async (x_t, t) -> network output;  x_T: (B, C, H, W) ~ N(0, 1);  pairs: from
    timePairs;  trace: async (t, x_t, x_0_hat), called at each step, at last with (-1, x_0, x_0).
    Returns x_0, like x_T, in [-1, 1] with clip. */
async function ddimSample(denoise, x_T, alpha_bars, pairs, prediction, clip, trace) {
  let x_t = x_T;
  for (const [t, t_prev] of pairs) {
    const alpha_bar_t = alpha_bars[t];
    const alpha_bar_prev = t_prev >= 0 ? alpha_bars[t_prev] : 1;
    const output = await denoise(x_t, t);
    const [x_0_hat, eps_hat] = predictX0AndEps(output, x_t, prediction, alpha_bar_t, clip);
    await trace(t, x_t, x_0_hat);
    x_t = ddimStep(x_0_hat, eps_hat, alpha_bar_prev);
  }
  await trace(-1, x_t, x_t);
  return x_t;
}

/** What ddimStep takes for x_0_hat and eps_hat to be of second order.

    Lu et al. 2022 (arXiv:2211.01095) algorithm 2: D = x_0_hat + h / (2 h_last) * (x_0_hat -
    x_0_last), where h and h_last are this step and the one before, measured in lambda =
    log(alpha_bar / (1 - alpha_bar)) / 2; and the noise that makes up x_t together with D. */
function dpmExtrapolate(x_t, x_0_hat, alpha_bar_t, alpha_bar_prev, x_0_last, alpha_bar_last) {
  const lambda = (alpha_bar) => Math.log(alpha_bar / (1 - alpha_bar)) / 2;
  const h = lambda(alpha_bar_prev) - lambda(alpha_bar_t);
  const h_last = lambda(alpha_bar_t) - lambda(alpha_bar_last);
  const D = combine(1, x_0_hat, h / h_last / 2, combine(1, x_0_hat, -1, x_0_last));
  const rest = combine(1, x_t, -Math.sqrt(alpha_bar_t), D);
  return [D, divide(rest, Math.sqrt(1 - alpha_bar_t))];
}

/** Walk from noise to images by DPM-Solver++(2M), Lu et al. 2022 algorithm 2: for few steps.

    The first step is that of DDIM, and so is one to x_0.  Arguments and result as in ddimSample. */
async function dpmSample(denoise, x_T, alpha_bars, pairs, prediction, clip, trace) {
  let x_t = x_T;
  let last = null; // x_0_hat and alpha_bar of the step before
  for (const [t, t_prev] of pairs) {
    const alpha_bar_t = alpha_bars[t];
    const alpha_bar_prev = t_prev >= 0 ? alpha_bars[t_prev] : 1;
    const output = await denoise(x_t, t);
    const [x_0_hat, eps_hat] = predictX0AndEps(output, x_t, prediction, alpha_bar_t, clip);
    await trace(t, x_t, x_0_hat);
    let [D, D_eps] = [x_0_hat, eps_hat];
    if (last !== null && t_prev >= 0) {
      [D, D_eps] = dpmExtrapolate(x_t, x_0_hat, alpha_bar_t, alpha_bar_prev, ...last);
    }
    last = [x_0_hat, alpha_bar_t];
    x_t = ddimStep(D, D_eps, alpha_bar_prev);
  }
  await trace(-1, x_t, x_t);
  return x_t;
}

/** Mean and variance of q(x_prev | x_t, x_0 = x_0_hat), DDPM eq. (7).

    With skipped steps beta_t = 1 - alpha_bar_t / alpha_bar_prev, Nichol & Dhariwal section 4. */
function posterior(x_0_hat, x_t, alpha_bar_t, alpha_bar_prev) {
  const alpha_t = alpha_bar_t / alpha_bar_prev;
  const beta_t = 1 - alpha_t;
  const of_x_0 = (Math.sqrt(alpha_bar_prev) * beta_t) / (1 - alpha_bar_t);
  const of_x_t = (Math.sqrt(alpha_t) * (1 - alpha_bar_prev)) / (1 - alpha_bar_t);
  const variance = ((1 - alpha_bar_prev) / (1 - alpha_bar_t)) * beta_t;
  return [combine(of_x_0, x_0_hat, of_x_t, x_t), variance];
}

/** Walk from noise to images by DDPM algorithm 2: noise enters every step but the last.

    noise: () -> standard normal noise like x_T; the rest is as in ddimSample. */
async function ddpmSample(denoise, x_T, alpha_bars, pairs, prediction, clip, trace, noise) {
  let x_t = x_T;
  for (const [t, t_prev] of pairs) {
    const alpha_bar_t = alpha_bars[t];
    const alpha_bar_prev = t_prev >= 0 ? alpha_bars[t_prev] : 1;
    const output = await denoise(x_t, t);
    const [x_0_hat] = predictX0AndEps(output, x_t, prediction, alpha_bar_t, clip);
    await trace(t, x_t, x_0_hat);
    const [mean, sigma_squared] = posterior(x_0_hat, x_t, alpha_bar_t, alpha_bar_prev);
    x_t = t_prev >= 0 ? combine(1, mean, Math.sqrt(sigma_squared), noise()) : mean;
  }
  await trace(-1, x_t, x_t);
  return x_t;
}

// --- Picture -------------------------------------------------------------------------------------

/** Sample one image for each label: uint8 (N, C, H, W); image i has noise (seed, first + i).

    model: from loadModel;  labels: array of indices into the class names of the card;
    steps, guidance, guidance_interval, solver: of the models that have them (MODEL_OPTIONS),
    default from the card;  seed: BigInt;  trace: of diffusion models, as in ddimSample.  Throws
    InputError for other options or values, RunError if the network fails or its output is not
    finite. */
export async function sample(model, labels, options = {}) {
  const { card } = model;
  const { seed = 0n, first = 0, trace = async () => {} } = options;
  const { pairs, guidance, times, solver } = checkedOptions(card, labels, options);
  const streams = labels.map((_, i) => new NoiseStream(seed, first + i));
  if (card.kind === "codes") return sampleCodesAndDecode(model, labels, streams);
  const alpha_bars = card.alpha_bars;
  const shape = card.latent_shape ?? card.image_shape; // latent_shape: of an LDM
  const clip = !card.latent_shape;
  const noise = () => nextNoise(streams, size(shape));
  const denoise = denoiser(model, labels, shape, guidance, ...times);
  const walk = [denoise, noise(), alpha_bars, pairs, card.prediction, clip, trace];
  let x_0;
  if (card.model === "ddpm") x_0 = await ddpmSample(...walk, noise);
  else if (solver === "dpm++") x_0 = await dpmSample(...walk);
  else x_0 = await ddimSample(...walk);
  return asBytes(await toImages(model, x_0));
}

/** {pairs, guidance, times, solver}, the model's where they are not given. Throws InputError.

    pairs: of timePairs or dpmPairs;  times: [start, stop] of guidedTimes;  solver: undefined for
    ddpm, which has one sampler. */
export function checkedOptions(card, labels, options = {}) {
  const { seed = 0n, first = 0 } = options;
  const classes = card.class_names.length;
  if (!labels.length || !labels.every((y) => Number.isInteger(y) && y >= 0 && y < classes)) {
    throw new InputError(`labels ${labels} must be one or more of 0..${classes - 1}`);
  }
  if (typeof seed !== "bigint") {
    throw new InputError(`seed ${seed} must be a BigInt, as 5n is`);
  }
  if (seed < 0n || seed > MAX_SEED) {
    throw new InputError(`seed ${seed} is not a whole number from 0 to ${MAX_SEED}`);
  }
  if (!Number.isSafeInteger(first) || first < 0) {
    throw new InputError(`first ${first} is not a whole number from 0`);
  }
  const known = ["seed", "first", "trace", ...MODEL_OPTIONS[card.model]];
  for (const [key, value] of Object.entries(options)) {
    if (value === undefined || known.includes(key)) continue;
    throw new InputError(`${key} is not for ${card.model} models here: leave it out`);
  }
  if (card.kind === "codes") return {};
  const solver = options.solver ?? card.solver;
  if (solver !== undefined && !SOLVERS.includes(solver)) {
    throw new InputError(`solver ${solver} is not ddim or dpm++`);
  }
  const guidance = options.guidance ?? card.guidance;
  const steps = options.steps ?? card.steps;
  const pairs = (solver === "dpm++" ? dpmPairs : timePairs)(walkLength(card), steps);
  if (card.steps_fixed && steps !== card.steps) {
    throw new InputError(`this model supports no other number of steps than ${card.steps}`);
  }
  if (!(guidance >= 0 && guidance <= 1000)) {
    throw new InputError(`guidance ${guidance} is not a number from 0 to 1000`);
  }
  const interval = options.guidance_interval ?? card.guidance_interval;
  const times = guidedTimes(interval, card.alpha_bars.length);
  if (card.guidance_fixed && guidance !== card.guidance) {
    throw new InputError(`this model supports no other guidance than ${card.guidance}`);
  }
  return { pairs, guidance, times, solver };
}

/** Network evaluations per image: a guided step takes two. */
export function evaluations(card, options = {}) {
  if (card.kind === "codes") return 1;
  const { pairs, guidance, times } = checkedOptions(card, [0], options);
  let count = 0;
  for (const [t] of pairs) {
    count += isGuided(guidance, t, ...times) ? 2 : 1;
  }
  return count;
}

/** Images of a walk's arrays: those of an LDM are latents, z_0 = x * latent_std + latent_mean. */
export async function toImages(model, x) {
  const { card, ort } = model;
  if (!card.latent_shape) return x;
  const each = size(card.latent_shape.slice(1)); // values of one channel
  const channel = (i) => Math.floor(i / each) % card.latent_shape[0];
  const std = Float32Array.from(card.latent_std);
  const mean = Float32Array.from(card.latent_mean);
  const z = x.map((value, i) => f32(value * std[channel(i)]) + mean[channel(i)]);
  const count = x.length / size(card.latent_shape);
  return runSession(ort, model.parts.decoder, { z: [z, [count, ...card.latent_shape]] });
}

/** Images in [-1, 1] -> uint8 0..255. Clips; throws RunError if they are not finite. */
export function asBytes(images) {
  if (!images.every(Number.isFinite)) throw new RunError("the network's output is not finite");
  const scaled = clipped(images).map((value) => f32(value + 1) * 127.5);
  return Uint8ClampedArray.from(scaled); // which rounds halves to even, as NumPy does
}

async function sampleCodesAndDecode(model, labels, streams) {
  const { card, ort } = model;
  const numClasses = card.class_names.length;
  const codes = sampleCodes(model.prior, labels, streams, card.latent_dim);
  const oneHot = new Float32Array(labels.length * numClasses);
  labels.forEach((y, i) => (oneHot[i * numClasses + y] = 1));
  const images = await runSession(ort, model.session, {
    z: [codes, [labels.length, card.latent_dim]],
    classes: [oneHot, [labels.length, numClasses]],
  });
  return asBytes(images);
}

// --- Classes -------------------------------------------------------------------------------------

/** "T-shirt/top" -> "t-shirt-top": what spellings of a name share, and safe in a file name.

    Letters, digits and, beyond ASCII, marks and symbols stay, in lower case and NFC. */
export function fold(name) {
  const text = name.toUpperCase().toLowerCase().normalize("NFC");
  const isKept = (c) => /[\p{L}\p{N}\u200c\u200d]|(?!\p{ASCII})[\p{M}\p{S}]/u.test(c);
  return Array.from(text, (c) => (isKept(c) ? c : "-")).join("");
}

/** Each class as a part of a file name: short, and different even where case is ignored. */
export function fileStems(classNames) {
  const stems = classNames.map((name) => Array.from(fold(name)).slice(0, 50).join(""));
  return stems.map((stem, y) => {
    const isUnique = stems.filter((other) => other === stem).length === 1;
    return stem && isUnique ? stem : `${stem || "class"}_${y}`;
  });
}

/** The index of the class that a text names.

    Tried in this order: the exact name (NFC), an index, the folded name, a prefix of one folded
    name.  Throws InputError, which lists the indices of an ambiguous name. */
export function classIndex(text, classNames) {
  const indices = (isSame) => [...classNames.keys()].filter((y) => isSame(classNames[y]));
  const stem = fold(text);
  // A comma matches only a comma: fold would make it a dash.
  const folded = (name) =>
    text.includes(",") ? name.split(",").map((part) => fold(part.trim())).join() : fold(name);
  if (stem === "all") {
    throw new InputError("all means every class: name a class that is called so by its index");
  }
  let found = indices((name) => name.normalize("NFC") === text.normalize("NFC"));
  if (!found.length && /^(0|[1-9]\d{0,8})$/.test(text) && Number(text) < classNames.length) {
    return Number(text);
  }
  if (!found.length) found = indices((name) => folded(name) === folded(text));
  if (!found.length && /[^-]/.test(stem) && !/^\p{Nd}+$/u.test(stem)) {
    found = indices((name) => fold(name).startsWith(stem));
  }
  if (found.length === 1) return found[0];
  if (found.length) {
    const list = found.slice(0, 10).map((y) => `${y} (${classNames[y]})`);
    const more = found.length > 10 ? ", ..." : "";
    throw new InputError(
      `class ${text} is ambiguous, give an index: ${list.join(", ")}${more}`,
    );
  }
  const some = [...new Set(classNames)].slice(0, 10);
  throw new InputError(`no class ${text}: choose one of ${some.join(", ")}`);
}

/** A text that names class y: its name, or its index where the name does not. */
export function classText(y, classNames, name = classNames[y]) {
  try {
    if (classIndex(name, classNames) === y) return name;
  } catch {
    // it is called all, or as another class is
  }
  return String(y);
}

// --- Codes and noise -----------------------------------------------------------------------------

/** The Gaussian mixtures in a card as arrays for sampleCodes; null stands for N(0, 1). */
function fittedPrior({ prior }) {
  if (!prior) return null;
  const [classes, components] = prior.weights.shape;
  const counts = prior.counts // given where classes have different numbers of Gaussians
    ? Array.from(fromBase64(prior.counts.int64, BigInt64Array), Number)
    : Array(classes).fill(components);
  let total = 0;
  const first = counts.map((count) => (total += count) - count); // Gaussian of each class
  return {
    components,
    total,
    first,
    weights: fromBase64(prior.weights.float32, Float32Array),
    means: fromBase64(prior.means.float32, Float32Array),
    scales: Float32Array.from(fromBase64(prior.scales.float16, Uint16Array), halfToNumber),
  };
}

/** One latent code per label: float32 (N, D).

    prior: null for N(0, 1), else a Gaussian mixture for each class y: component k has probability
    weights[y, k] and gives means[y, k] + L @ noise, scales[y, k] being the lower triangle of L row
    by row. */
function sampleCodes(prior, labels, streams, D) {
  const noise = nextNoise(streams, D);
  if (prior === null) return noise;
  const { components, first, total: mixtures, weights, means, scales } = prior;
  const triangle = (D * (D + 1)) / 2; // numbers in L
  const codes = new Float32Array(noise.length);
  labels.forEach((y, i) => {
    const chance = f32(streams[i].nextDouble());
    const last = (first[y + 1] ?? mixtures) - first[y] - 1; // k of this class's last Gaussian
    let k = 0;
    for (let total = weights[y * components]; k < last && chance >= total; ) {
      k += 1;
      total = f32(total + weights[y * components + k]);
    }
    const mixture = first[y] + k;
    for (let row = 0, at = mixture * triangle; row < D; row++) {
      let sum = 0; // in float64: NumPy's order of float32 sums depends on the machine
      for (let column = 0; column <= row; column++, at++) {
        sum += scales[at] * noise[i * D + column];
      }
      codes[i * D + row] = means[mixture * D + row] + f32(sum);
    }
  });
  return codes;
}

/** An array of a given type from base64, little endian. */
function fromBase64(base64, Type) {
  return new Type(Uint8Array.from(atob(base64), (c) => c.charCodeAt(0)).buffer);
}

/** The number of a float16's 16 bits: sign, 5 bits of exponent, 10 of fraction. */
function halfToNumber(bits) {
  const sign = bits >> 15 ? -1 : 1;
  const exponent = (bits >> 10) & 31;
  const fraction = (bits & 1023) / 1024;
  if (exponent === 31) return fraction ? NaN : sign * Infinity;
  return exponent ? sign * 2 ** (exponent - 15) * (1 + fraction) : sign * 2 ** -14 * fraction;
}

/** The next `count` standard normal numbers of every stream, one after another: float32. */
export function nextNoise(streams, count) {
  const noise = new Float32Array(streams.length * count);
  streams.forEach((stream, i) => {
    for (let k = 0; k < count; k++) noise[i * count + k] = stream.nextNormal();
  });
  return noise;
}

const MASK = 2n ** 64n - 1n;
const MULTIPLIERS = [0xd2e7470ee14c6c93n, 0xca5a826395121157n];
const KEY_STEPS = [0x9e3779b97f4a7c15n, 0xbb67ae8584caa73bn];

/** np.random.Generator(np.random.Philox(key=[seed, index])), number for number.

    Philox4x64-10: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3". Ten rounds mix
    a counter and a key into four numbers of 64 bits; the next four have the next counter. */
export class NoiseStream {
  constructor(seed, index) {
    this.key = [BigInt(seed), BigInt(index)];
    this.counter = 0n;
    this.block = []; // numbers of 64 bits that were not used yet
    this.half = null; // the upper 32 bits of one of which the lower were used
  }

  next64() {
    if (!this.block.length) {
      this.counter += 1n;
      let [a, b, c, d] = [this.counter, 0n, 0n, 0n];
      let [key_0, key_1] = this.key;
      for (let round = 0; round < 10; round++) {
        const p = MULTIPLIERS[0] * a;
        const q = MULTIPLIERS[1] * c;
        [a, b, c, d] = [(q >> 64n) ^ b ^ key_0, q & MASK, (p >> 64n) ^ d ^ key_1, p & MASK];
        key_0 = (key_0 + KEY_STEPS[0]) & MASK;
        key_1 = (key_1 + KEY_STEPS[1]) & MASK;
      }
      this.block = [a, b, c, d];
    }
    return this.block.shift();
  }

  next32() {
    if (this.half !== null) {
      const upper = this.half;
      this.half = null;
      return upper;
    }
    const both = this.next64();
    this.half = Number(both >> 32n);
    return Number(both & 0xffffffffn);
  }

  /** Uniform in [0, 1), a float32 of 24 random bits. */
  nextFloat() {
    return (this.next32() >>> 8) / 2 ** 24;
  }

  /** Uniform in [0, 1), a float64 of 53 random bits. */
  nextDouble() {
    return Number(this.next64() >> 11n) / 2 ** 53;
  }

  /** Standard normal, float32: the ziggurat of Marsaglia & Tsang 2000, as NumPy has it.

      In the tail NumPy takes log1p from the C library, whose last bit may be another. */
  nextNormal() {
    for (;;) {
      const bits = this.next32();
      const layer = bits & 255;
      const negative = (bits >>> 8) & 1;
      const position = bits >>> 9; // of 23 bits
      const x = f32(position * WIDTH[layer]) * (negative ? -1 : 1);
      if (position < INSIDE[layer]) return x; // 99 % end here
      if (layer === 0) {
        for (;;) { // the tail, beyond R: Marsaglia 1964
          const beyond = f32(f32(-1 / R) * f32(Math.log1p(-this.nextFloat())));
          const y = -f32(Math.log1p(-this.nextFloat()));
          if (f32(y + y) > f32(beyond * beyond)) {
            return f32(f32(R) + beyond) * ((position >>> 8) & 1 ? -1 : 1);
          }
        }
      }
      const height = f32(HEIGHT[layer - 1] - HEIGHT[layer]);
      if (f32(f32(height * this.nextFloat()) + HEIGHT[layer]) < Math.exp(-0.5 * x * x)) return x;
    }
  }
}

// The ziggurat: 256 layers of equal area AREA under f(x) = exp(-x^2 / 2). Layer i > 0 reaches to
// edge[i], the widest to R, and layer 0 is the strip below it together with the tail beyond R.
const R = 3.654152885361009;
const AREA = 0.004928673233974658; // R * f(R) + the integral of f from R
const f = (x) => Math.exp((-x * x) / 2);
const edge = new Float64Array(256);
edge[255] = R;
for (let i = 254; i > 0; i--) {
  edge[i] = Math.sqrt(-2 * Math.log(AREA / edge[i + 1] + f(edge[i + 1])));
}
const STRIP = AREA / f(R); // the width that layer 0 would have as a rectangle
// WIDTH: x of one position;  INSIDE: the first position that may lie outside f;  HEIGHT: f(edge).
const WIDTH = Float32Array.from(edge, (x, i) => (i ? x : STRIP) / 2 ** 23);
const INSIDE = Uint32Array.from(edge, (x, i) =>
  Math.round((i ? edge[i - 1] / x : R / STRIP) * 2 ** 23),
);
const HEIGHT = Float32Array.from(edge, f);

/** The first line of an error's text, for a message of one line. */
export function oneLine(error) {
  const text = String(error?.message ?? error).trim();
  return (text.split("\n")[0] || "unknown error").slice(0, 200);
}
