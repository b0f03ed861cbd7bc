// What tests/test_web.py runs in node: one JSON request from stdin, one JSON answer to stdout.
import { readFileSync } from "node:fs";
import { basename, dirname, join } from "node:path";
import { webcrypto } from "node:crypto";
import * as ort from "../web/node_modules/onnxruntime-web/dist/ort.wasm.bundle.min.mjs";
import * as sampler from "../web/sampler.js";

globalThis.crypto ??= webcrypto; // node 18 has it under this name only
ort.env.wasm.numThreads = 1;
ort.env.logLevel = "fatal";

function base64(array) {
  return Buffer.from(array.buffer, array.byteOffset, array.byteLength).toString("base64");
}

const COMMANDS = {
  // The noise of [seed, image]: `count` normal numbers, then one uniform number.
  noise({ keys, count }) {
    return keys.map(([seed, image]) => {
      const stream = new sampler.NoiseStream(BigInt(seed), image);
      const normal = base64(sampler.nextNoise([stream], count));
      return [normal, stream.nextDouble()];
    });
  },

  pairs({ cases }) {
    return cases.map(([numTimesteps, steps]) => [
      sampler.timePairs(numTimesteps, steps),
      sampler.dpmPairs(numTimesteps, steps),
    ]);
  },

  // The class that each text names, or the error; then file names, and texts for all.
  classes({ texts, names }) {
    const found = texts.map((text) => {
      try {
        return sampler.classIndex(text, names);
      } catch (error) {
        return error.message;
      }
    });
    const named = names.map((_, y) => sampler.classText(y, names));
    return [found, sampler.fileStems(names), named];
  },

  // The card of each file; an error instead is {error, kind}.
  cards({ paths }) {
    const read = (path) => attempt(() => sampler.readCard(basename(path), readFileSync(path)));
    return Promise.all(paths.map(read));
  },

  // Pictures of each of the options; an error instead is {error, kind}.
  async sample({ path, labels, cases }) {
    const readPart = async (file) => readFileSync(join(dirname(path), file));
    const model = await sampler.loadModel(ort, path, readFileSync(path), readPart);
    const answers = [];
    for (const { seed = "0", ...options } of cases) {
      let steps = 0;
      const trace = async (t) => { steps += t >= 0; };
      const given = { ...options, seed: BigInt(seed), trace };
      answers.push(await attempt(async () => {
        const pixels = base64(await sampler.sample(model, labels, given));
        return { pixels, steps, evaluations: sampler.evaluations(model.card, given) };
      }));
    }
    return answers;
  },
};

async function attempt(work) {
  try {
    return await work();
  } catch (error) {
    return { error: error.message, kind: error.constructor.name };
  }
}

const { command, ...request } = JSON.parse(readFileSync(0, "utf8"));
process.stdout.write(JSON.stringify(await attempt(() => COMMANDS[command](request))));
